"""What ``expertmesh convert`` does: from one folder to another, or two folders compared."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from expertmesh.convert import folder as folders
from expertmesh.convert.check import check_tensors
from expertmesh.convert.destination import Destination, SafetensorsDestination, T5xDestination
from expertmesh.convert.families import FAMILIES
from expertmesh.convert.family import Family
from expertmesh.convert.layout import Layout, as_ours
from expertmesh.convert.opening import open_source
from expertmesh.convert.published import config_from, read_keys
from expertmesh.convert.source import Source, Stored
from expertmesh.convert.tokenizer import tokenizer_files
from expertmesh.convert.training import TrainingCheckpoint
from expertmesh.convert.transfer import (
    Progress,
    check_manifest,
    check_same,
    converted,
    transfer,
)
from expertmesh.errors import UserError
from expertmesh.models import DecoderConfig, decoder_preset, decoder_presets

# Keys of a source's configuration that would not be true of the result.
_NOT_KEPT = {"auto_map", "_name_or_path", "transformers_version", "dtype"}


@dataclass(frozen=True)
class Given:
    """A folder that is read.

    Attributes:
        source: Its tensors.
        kind: Of its names, as the family calls it.
        files: How parameters lie in it.
        config: The model's shape.
        keys: Its ``config.json``; empty if it has none.
    """

    source: Source
    kind: str
    files: Layout
    config: DecoderConfig
    keys: Mapping[str, Any]


def look_at(family: Family, path: Path, config: str | None = None) -> Given:
    """Open a folder and learn which model it holds.

    Args:
        family: Of the model.
        path: The folder.
        config: A ``config.json``, a folder with one, or a preset's name. None takes the folder's
            own, or the preset whose shapes its tensors have.

    Raises:
        UserError: If it cannot be opened, or the model is not known.
    """
    source = open_source(path)
    kind = family.kind_of(source.tensors)
    file = source.path / folders.CONFIG
    keys: dict[str, Any] = {}
    if config is not None and config in decoder_presets():
        shape = decoder_preset(config)
    elif config is not None or file.is_file():
        at, keys = read_keys(file if config is None else Path(config))
        _check_family(family, at, keys)
        shape = config_from(family, at, keys)
    else:
        shape = _by_shapes(family, source, kind)
    return Given(source, kind, family.layout(shape, kind), shape, keys)


def look_at_training(family: Family, path: Path, config: DecoderConfig) -> Given:
    """Open a checkpoint of a training run.

    Args:
        family: Of the model.
        path: The checkpoint's folder.
        config: The run's model.

    Raises:
        UserError: If it cannot be opened, or the model is not of the family.
    """
    files = as_ours(family.layout(config, family.kinds[0]).our_shapes)
    return Given(TrainingCheckpoint(path), "training checkpoint", files, config, {})


def convert(
    family: Family,
    given: Given,
    final: Path,
    kind: str,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = folders.SHARD_BYTES,
    tokenizer: Path | None = None,
    progress: Progress = lambda _: None,
) -> Mapping[str, Stored]:
    """Write a folder of another kind, read it back, and give it its name.

    Args:
        family: Of the model.
        given: What is read.
        final: What is written.
        kind: Of its names.
        dtype: Of its tensors; None keeps what each has.
        shard_bytes: Of a safetensors file, at most.
        tokenizer: A folder or file to copy; None copies what is beside the source's tensors.
        progress: Called with numbers of elements that were written.

    Returns:
        What was written, by name.

    Raises:
        UserError: If the source does not fit or is the folder to write, or something cannot be
            written or differs when it is read back; then nothing is left.
    """
    # Of a link the folder that it leads to, so that all is written on that disk.
    final = final.resolve()
    read = given.source.path.resolve()
    if final == read or final in read.parents:
        holds = "is" if final == read else "holds"
        raise UserError(f"{final} {holds} what is read; give the path of another folder to write")
    wanted = family.layout(given.config, kind)
    tensors = converted(given.source, given.files, wanted, dtype)
    config = _config(family, given, tensors)
    also = _tokenizer(tokenizer, given.source.path)
    with _written(final) as unfinished:
        destination: Destination
        if kind == "t5x":
            destination = T5xDestination(unfinished, tensors)
        else:
            destination = SafetensorsDestination(unfinished, tensors, shard_bytes)
        transfer(given.source, given.files, wanted, destination, config, progress)
        folders.copy_into(unfinished, also)
    return tensors


@contextmanager
def _written(final: Path) -> Iterator[Path]:
    """A folder to fill, which then gets its name; of one that cannot be filled nothing is left."""
    try:
        unfinished = folders.begin(final)
        try:
            yield unfinished
            folders.finish(unfinished, final)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
    except OSError as error:
        raise UserError(f"{final} cannot be written: {error.strerror or error}") from error


def verify(
    family: Family, given: Given, path: Path, progress: Progress = lambda _: None
) -> Mapping[str, Stored]:
    """Compare a folder with what converting another would give; nothing is written.

    Returns:
        What is in the folder.

    Raises:
        UserError: Naming all tensors that differ.
    """
    found = open_source(path)
    wanted = family.layout(given.config, family.kind_of(found.tensors))
    check_same(given.source, given.files, found, wanted, progress)
    return found.tensors


def verify_alone(path: Path) -> Mapping[str, Stored]:
    """Compare a folder with its own manifest.

    Returns:
        What is in the folder.

    Raises:
        UserError: If it has no manifest, or naming all tensors that differ.
    """
    found = open_source(path)
    check_manifest(found)
    return found.tensors


def _check_family(family: Family, file: Path, keys: Mapping[str, Any]) -> None:
    others = [other.name for other in FAMILIES.values() if other.recognises(keys)]
    if others and family.name not in others:
        raise UserError(
            f"{file} is of {others[0]}, not of {family.name}; give {others[0]} as the family"
        )


def _by_shapes(family: Family, source: Source, kind: str) -> DecoderConfig:
    """The preset whose tensors these are; one that most of them fit names those that do not."""
    where = f"{source.path} has no {folders.CONFIG}, and"
    for preset in family.presets:
        layout = family.layout(decoder_preset(preset), kind)
        if _mostly(layout, source):
            hint = f"; give another shape than {preset} with --config"
            check_tensors(layout, source.shapes, where, hint=hint)
            return decoder_preset(preset)
    raise UserError(
        f"{where} its shapes are those of none of {', '.join(family.presets)}; give a "
        f"{folders.CONFIG} with --config"
    )


def _mostly(layout: Layout, source: Source) -> bool:
    """Whether most tensors are there in the right shape."""
    same = sum(source.shapes.get(name) == shape for name, shape in layout.their_shapes.items())
    return 2 * same > len(layout.their_shapes)


def _config(family: Family, given: Given, tensors: Mapping[str, Stored]) -> dict[str, Any]:
    kept = {key: value for key, value in given.keys.items() if key not in _NOT_KEPT}
    dtypes = {stored.dtype for stored in tensors.values()}
    config = kept | family.published_config(given.config)
    if len(dtypes) == 1:
        config["torch_dtype"] = str(next(iter(dtypes))).removeprefix("torch.")
    return config


def _tokenizer(given: Path | None, source: Path) -> list[Path]:
    if given is not None:
        return tokenizer_files(given)
    try:
        return tokenizer_files(source)
    except UserError:
        return []
