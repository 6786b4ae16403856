import pytest
import torch

from expertmesh.errors import UserError
from expertmesh.routing import HashRouter, random_table

X = torch.randn(6, 4)
TABLE = torch.tensor([2, 0, 1, 2, 1])
IDS = torch.tensor([4, 0, 1, 3, 3, 2])


@pytest.mark.parametrize(
    ("by", "experts"),
    [
        ("token", [1, 2, 0, 2, 2, 1]),
        ("previous", [1, 1, 2, 2, 2, 2]),
        ("position", [2, 0, 1, 2, 0, 1]),
    ],
)
def test_what_is_looked_up(by, experts):
    routing = HashRouter(4, 3, TABLE, by=by)(X, token_ids=IDS, sequence_length=3)
    assert routing.expert_TK.flatten().tolist() == experts
    assert routing.weight_TK.flatten().tolist() == [1.0] * 6
    assert routing.losses == {}
    assert routing.logits_TE is None


def test_the_first_token_behind_padding_takes_itself():
    router = HashRouter(4, 3, TABLE, by="previous")
    mask = torch.tensor([True, True, False, False, False, True])
    for filling in (-100, 4):
        ids = torch.where(mask, filling, IDS)
        routing = router(X, token_ids=ids, padding_mask=mask, sequence_length=6)
        # Tokens 1, 3, 3 take the entries of 1, 1 and 3.
        assert routing.expert_TK.flatten().tolist() == [3, 3, 0, 0, 2, 3]


def test_the_table_is_saved_and_loaded():
    saved = HashRouter(4, 3, random_table(50, 3, seed=1))
    ids = torch.arange(50)
    other = HashRouter(4, 3, random_table(50, 3, seed=2))
    x = torch.randn(50, 4)
    assert not torch.equal(saved(x, token_ids=ids).expert_TK, other(x, token_ids=ids).expert_TK)
    other.load_state_dict(saved.state_dict())
    assert torch.equal(saved(x, token_ids=ids).expert_TK, other(x, token_ids=ids).expert_TK)
    saved.bfloat16()
    assert saved.table_V.dtype == torch.int64


def test_the_table_comes_back_where_memory_is_new():
    router = HashRouter(4, 3, TABLE, device="meta").to_empty(device="cpu")
    router.table_V.zero_()
    router.reset_parameters(0)
    assert torch.equal(router.table_V, TABLE)


def test_bad_input():
    router = HashRouter(4, 3, TABLE)
    with pytest.raises(ValueError, match="needs token_ids"):
        router(X)
    with pytest.raises(ValueError, match=r"from 0 to 4, the table's last; got 0 to 5"):
        router(X, token_ids=torch.arange(6))
    with pytest.raises(UserError, match=r"token_ids must be int64, got torch.float32; set token_i"):
        router(X, token_ids=torch.zeros(6))
    with pytest.raises(ValueError, match=r"got -1 to 0"):
        router(X, token_ids=torch.tensor([0, 0, 0, 0, 0, -1]))
    with pytest.raises(ValueError, match=r"ids by 'position' must be from 0 to 4"):
        HashRouter(4, 3, TABLE, by="position")(X)
    with pytest.raises(ValueError, match="did you mean 'previous'"):
        HashRouter(4, 3, TABLE, by="previou")
    with pytest.raises(ValueError, match="experts from 0 to 1, got 0 to 2"):
        HashRouter(4, 2, TABLE)
    with pytest.raises(ValueError, match="table must be int64"):
        HashRouter(4, 3, TABLE.float())
