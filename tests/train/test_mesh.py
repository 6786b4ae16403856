import pytest

from expertmesh.errors import UserError
from expertmesh.train.mesh import MeshConfig, check_single_process


def test_one_process_takes_the_default_and_explicit_ones() -> None:
    check_single_process(MeshConfig(), {})
    check_single_process(MeshConfig(dp=1, ep=1), {"WORLD_SIZE": "1"})


def test_other_degrees_are_named_with_what_to_set() -> None:
    with pytest.raises(
        UserError, match=r"got mesh.dp = 2, mesh.ep = 4; set mesh.dp = 1, mesh.ep = 1"
    ):
        check_single_process(MeshConfig(dp=2, ep=4), {})


def test_a_launcher_is_refused() -> None:
    with pytest.raises(UserError, match="WORLD_SIZE=4: the trainer runs in one process"):
        check_single_process(MeshConfig(), {"WORLD_SIZE": "4"})


@pytest.mark.parametrize(("axis", "value"), [("tp", 0), ("tp", -1), ("dp", 0), ("dp", -2)])
def test_degrees_below_one_are_refused(axis: str, value: int) -> None:
    with pytest.raises(UserError, match=rf"mesh.{axis} must be at least 1.*got {value}"):
        MeshConfig(**{axis: value})
