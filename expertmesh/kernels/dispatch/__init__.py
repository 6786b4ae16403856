"""What dispatch between ranks does with a few numbers of each token, in few launches on a GPU."""

from expertmesh.kernels.dispatch.op import (
    destinations,
    mask_others,
    pack_choices,
    places,
    take_rows,
    unpack_choices,
)
from expertmesh.kernels.dispatch.reference import Places

__all__ = [
    "Places",
    "destinations",
    "mask_others",
    "pack_choices",
    "places",
    "take_rows",
    "unpack_choices",
]
