"""Ranks that lay a model out together have the same model, and ask for the same."""

from torch import Tensor, nn

from expertmesh.dispatch.collectives import Group
from expertmesh.parallel.board import Board
from expertmesh.parallel.handshake import same_on_all_ranks
from expertmesh.parallel.mesh import Mesh


def same_placement(model: nn.Module, mesh: Mesh, call: str, **options: object) -> None:
    """Compare the models of each stage's ranks, and what all ranks of the mesh ask for.

    Values are not compared: those of the first rank count.

    Args:
        model: Not laid out yet.
        mesh: Of more than one rank.
        call: The function of this package that will do it.
        options: Its arguments.

    Raises:
        UserError: On every rank of the stage, or of the mesh, naming what differs.
    """
    asked = {f"{name}=": value for name, value in options.items()}
    if mesh.degree("pp") > 1:
        _compare(asked, mesh.everyone, call)
    tensors = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    _compare(asked | {name: _kind(tensor) for name, tensor in tensors}, mesh.stage, call)


def _compare(facts: dict[str, object], group: Group, call: str) -> None:
    name = f"{call}/{group.name}/{next(group.agreements)}"
    same_on_all_ranks(
        facts,
        Board(name, group.ranks, group.timeout),
        mistake=f"the ranks gave expertmesh.{call} different models or arguments",
        remedy="build the same model and ask for the same on every rank",
    )


def _kind(tensor: Tensor) -> str:
    shape = ", ".join(map(str, tensor.shape))
    kind = f"({shape}) {tensor.dtype}".replace("torch.", "")
    if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
        kind += " without gradient"
    return kind + (" on meta" if tensor.is_meta else "")
