import pytest
import torch

from expertmesh.routing import Capacity
from expertmesh.routing.capacity import FORMULAS
from expertmesh.routing.draw import Draw
from expertmesh.routing.population import Alone

SAME_FACTOR = {
    "switch": 15,
    "flaxformer": 16,
    "lingvo": 16,
    "vmoe": 32,
    "deepspeed": 32,
    "tutel": 32,
    "colossalai": 32,
    "megatron": 32,
    "proportional": 31,
}


@pytest.mark.parametrize("formula", FORMULAS)
def test_the_same_factor_means_other_limits(formula):
    # k=2, 100 tokens, 8 experts, factor 1.25: the conventions of published codes.
    capacity = Capacity(factor=1.25, formula=formula)
    assert capacity.slots(100, 8, 2, training=True) == SAME_FACTOR[formula]


def test_decimal_factors_count_as_written():
    assert Capacity(factor=1.1).slots(30, 3, 1, training=True) == 11
    assert Capacity(factor=0.1, formula="deepspeed").slots(300, 3, 1, training=True) == 10


def test_megatron_rounds_up_and_has_no_least_number():
    capacity = Capacity(factor=0.3, formula="megatron")
    assert capacity.slots(10, 8, 1, training=True) == 1
    assert capacity.slots(80, 8, 2, training=True) == 6


def test_evaluation_has_its_own_factor():
    capacity = Capacity(factor=1.0, eval_factor=2.0)
    assert capacity.slots(80, 8, 1, training=False) == 20
    assert Capacity(factor=1.0).slots(80, 8, 1, training=False) is None


def plain_drop(chosen_TK, order, slots, num_experts, size):
    """Serve flat choices one after another."""
    k = chosen_TK.shape[1]
    taken = {}
    out = chosen_TK.clone()
    for flat in order:
        t, c = divmod(int(flat), k)
        e = int(chosen_TK[t, c])
        if e == num_experts:
            continue
        seat = (t // size, e)
        if taken.get(seat, 0) >= slots:
            out[t, c] = num_experts
        taken[seat] = taken.get(seat, 0) + 1
    return out


def orders(chosen_TK, weight_TK):
    T, k = chosen_TK.shape
    flat = range(T * k)
    by_priority = sorted(range(T), key=lambda t: (-float(weight_TK[t].max()), t))
    return {
        "position": sorted(flat, key=lambda n: (n % k, n // k)),
        "token": list(flat),
        "priority": [t * k + c for c in range(k) for t in by_priority],
        "probability": sorted(flat, key=lambda n: (-float(weight_TK.view(-1)[n]), n)),
    }


@pytest.mark.parametrize("order", ["position", "token", "priority", "probability"])
@pytest.mark.parametrize("scope", ["micro_batch", "sequence", 4])
@pytest.mark.parametrize(("T", "E", "k"), [(24, 3, 2), (8, 5, 3), (48, 2, 1)])
def test_drop_equals_serving_one_by_one(order, scope, T, E, k):
    generator = torch.Generator().manual_seed(T)
    chosen = torch.rand(T, E, generator=generator).argsort(dim=1)[:, :k]
    chosen[torch.rand(T, generator=generator) < 0.2] = E
    weight = torch.randint(1, 5, (T, k), generator=generator).double()
    capacity = Capacity(factor=0.7, order=order, scope=scope)
    size = {"micro_batch": T, "sequence": 8, 4: 4}[scope]
    draw = Draw(None, 0, T, torch.device("cpu"), True)
    tokens = Alone().arrange(T, 8, None)
    dropped = capacity.drop(chosen, weight, E, training=True, order=tokens, draw=draw)
    slots = capacity.slots(size, E, k, training=True)
    expected = plain_drop(chosen, orders(chosen, weight)[order], slots, E, size)
    assert torch.equal(dropped, expected)
    assert (dropped == E).sum() > (chosen == E).sum()


def test_random_order_drops_evenly_and_follows_the_generator():
    chosen = torch.zeros(2000, 1, dtype=torch.int64)
    capacity = Capacity(factor=0.5, order="random")

    def drop(seed):
        torch.manual_seed(seed)
        draw = Draw(None, 0, 2000, torch.device("cpu"), True)
        weight = torch.ones(2000, 1)
        tokens = Alone().arrange(2000, None, None)
        return capacity.drop(chosen, weight, 1, training=True, order=tokens, draw=draw)

    first = drop(0)
    assert (first == 0).sum() == 1000
    assert torch.equal(first, drop(0))
    assert not torch.equal(first, drop(1))
    assert abs(int((first[:1000] == 0).sum()) - 500) < 60


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"factor": 0}, "capacity factor must be a finite number above 0, got 0"),
        ({"factor": -1.0}, "must be a finite number above 0"),
        ({"factor": 1.0, "eval_factor": 0}, "eval_factor must be a finite number above 0"),
        ({"factor": None}, "capacity factor must be a finite number above 0, got None"),
        ({"factor": "1"}, "capacity factor must be a finite number above 0, got '1'"),
        ({"factor": float("nan")}, "capacity factor must be a finite number above 0, got nan"),
        ({"factor": float("inf")}, "above 0, got inf; leave the capacity out for dropless"),
        ({"factor": 1.0, "eval_factor": float("inf")}, "eval_factor .* inf; None drops nothing"),
        ({"factor": 1.0, "formula": "swich"}, "did you mean 'switch'"),
        ({"factor": 1.0, "order": "positon"}, "did you mean 'position'"),
        ({"factor": 1.0, "scope": "batch"}, "capacity scope must be"),
        ({"factor": 1.0, "scope": 0}, "capacity scope must be"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        Capacity(**fields)


def test_groups_must_divide_the_tokens():
    draw = Draw(None, 0, 10, torch.device("cpu"), True)
    chosen, weight = torch.zeros(10, 1, dtype=torch.int64), torch.ones(10, 1)
    arguments = {"training": True, "order": Alone().arrange(len(chosen), None, None), "draw": draw}
    with pytest.raises(ValueError, match="divisible by 4, got 10"):
        Capacity(factor=1.0, scope=4).drop(chosen, weight, 2, **arguments)
    with pytest.raises(ValueError, match="needs the length of a sequence"):
        Capacity(factor=1.0, scope="sequence").drop(chosen, weight, 2, **arguments)
