"""Files of another layout into a model, each rank its own part."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from expertmesh.convert.check import check_floating, check_tensors, named
from expertmesh.convert.layout import Layout
from expertmesh.convert.slabs import slabs
from expertmesh.convert.source import Source
from expertmesh.dispatch.collectives import Group
from expertmesh.errors import UserError
from expertmesh.parallel.agreement import Agreement
from expertmesh.parallel.checkpoint.box import Box, held


def load(
    model: nn.Module,
    source: Source,
    layout: Layout,
    *,
    group: Group | None = None,
    device: torch.device | str | None = None,
) -> None:
    """Copy values from files into a model, in the model's dtypes.

    A rank reads what overlaps the boxes it holds, a slab at a time: beside the model the host
    holds little. All ranks of ``group`` call it together.

    Args:
        model: Plain, or placed on a mesh. A model on the meta device is given memory.
        source: Where the values are.
        layout: Where each parameter lies in there.
        group: The ranks that hold the model together; None is this process alone.
        device: Where parameters on the meta device get their memory; None is the default device.

    Raises:
        UserError: On every rank, naming all tensors that are missing, unexpected or misshapen;
            then the model is as it was. Also if a file cannot be read.
    """
    ranks = Agreement(group)
    own = parameters(model)
    everyones = {name for names in ranks.gather(list(own)) for name in names}
    with ranks.together():
        check_tensors(layout, source.shapes, str(source.path))
        check_floating(source.tensors, str(source.path))
        check_names(layout, everyones)
    if any(tensor.is_meta for tensor in own.values()):
        model.to_empty(device=torch.get_default_device() if device is None else device)
        own = parameters(model)
    with ranks.together(), torch.no_grad():
        for name, tensor in own.items():
            _fill(name, tensor, source, layout)


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, as this rank holds them."""
    # Asking for the state makes FSDP2 put its shards back, where parameters may be gathered.
    return {name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}


def check_names(layout: Layout, names: Iterable[str]) -> None:
    """Raise unless these are the parameters that a layout has a place for."""
    given, expected = set(names), layout.our_shapes
    faults = []
    if without := sorted(given - set(expected)):
        faults.append(f"the files have no place for {named(without)}")
    if absent := sorted(set(expected) - given):
        faults.append(f"no rank holds {named(absent)}")
    if faults:
        raise UserError("; ".join(faults) + "; the model was changed after it was built")


def _fill(name: str, tensor: Tensor, source: Source, layout: Layout) -> None:
    shard = held(name, tensor)
    own = Box.of(shard)
    for piece in layout.of_ours[name]:
        overlap = piece.box.overlap(own)
        if overlap is None:
            continue
        itemsize = source.tensors[piece.theirs].dtype.itemsize
        for slab in slabs(overlap, itemsize):
            values = source.read(piece.theirs, piece.to_theirs(slab))
            shard.local[slab.within(own)].copy_(piece.as_ours(values, slab))
