"""A folder of weights, whatever kind it is."""

from pathlib import Path

from expertmesh.convert.pickled import PickledFolder, is_pickled
from expertmesh.convert.source import INDEX, SINGLE, SafetensorsFolder, Source
from expertmesh.convert.t5x import T5xCheckpoint, find_checkpoint, is_t5x


def open_source(path: Path) -> Source:
    """The tensors of a folder: safetensors, else t5x's arrays, else pickled ones.

    Raises:
        UserError: If there are none, or they cannot be read.
    """
    if not any((path / name).is_file() for name in (SINGLE, INDEX)):
        if is_t5x(path):
            return T5xCheckpoint(find_checkpoint(path))
        if is_pickled(path):
            return PickledFolder(path)
    return SafetensorsFolder(path)
