"""Cutting a box into parts small enough to hold in memory, in the order of its elements."""

import itertools
from collections.abc import Iterator

from expertmesh.parallel.checkpoint.box import Box

# As long as the chunks that t5x writes.
SLAB_BYTES = 2**26


def slabs(box: Box, itemsize: int, most_bytes: int = SLAB_BYTES) -> Iterator[Box]:
    """Boxes that make up a box, one after the other as its elements lie in memory.

    Args:
        box: What is cut; nothing comes of an empty one.
        itemsize: Bytes of an element.
        most_bytes: No part is longer, unless it is one element.
    """
    if not box.shape or box.num_elements == 0:
        yield from [box] * box.num_elements
        return
    # A part has one index of the first dims, several of `dim`, and all of the dims after it.
    dim, row = 0, box.num_elements * itemsize // box.shape[0]
    while row > most_bytes and dim + 1 < len(box.shape):
        dim += 1
        row //= box.shape[dim]
    length = max(1, most_bytes // row)
    for first in itertools.product(*map(range, box.start[:dim], box.stop[:dim])):
        after = tuple(index + 1 for index in first)
        for start in range(box.start[dim], box.stop[dim], length):
            stop = min(start + length, box.stop[dim])
            yield Box((*first, start, *box.start[dim + 1 :]), (*after, stop, *box.stop[dim + 1 :]))
