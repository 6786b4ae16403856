"""Published folders into any decoder of this package, on any mesh, and back."""

import json
from pathlib import Path
from typing import Any

import torch

from expertmesh.convert.families import FAMILIES
from expertmesh.convert.family import Family
from expertmesh.convert.folder import CONFIG, SHARD_BYTES
from expertmesh.convert.load import load
from expertmesh.convert.opening import open_source
from expertmesh.convert.save import save
from expertmesh.convert.slabs import SLAB_BYTES
from expertmesh.convert.tokenizer import tokenizer_files
from expertmesh.dispatch.collectives import Group
from expertmesh.errors import UserError
from expertmesh.models import DecoderConfig, DecoderLM
from expertmesh.parallel.agreement import Agreement


def load_published(
    model: DecoderLM,
    folder: str | Path,
    group: Group | None = None,
    *,
    device: torch.device | str | None = None,
) -> None:
    """Copy published values into a model; each rank reads what its own part needs.

    Args:
        model: A decoder of the published shape in any dtype: plain, or placed on a mesh with all
            its stages. One on the meta device is given memory.
        folder: One file of safetensors, or several and an index, or a t5x checkpoint, or pickled
            weights. Stacked experts or one by one.
        group: The ranks that hold the model together, ``mesh.everyone``; None is this process
            alone. They call it together.
        device: Where a model on the meta device gets its memory; None is the default device.

    Raises:
        UserError: On every rank, naming all tensors that are missing, unexpected or misshapen;
            then nothing was loaded. Also if a file cannot be read, on whatever rank.

    Example:
        >>> with torch.device("meta"):
        ...     model = DecoderLM(read_config("openmoe-8b"))
        >>> parallelize(model, mesh)
        >>> load_published(model, "openmoe-8b", mesh.everyone)
    """
    # Each rank reads for itself, so that one alone may not find the folder.
    with Agreement(group).together():
        source = open_source(Path(folder))
        family = family_of_model(model.config)
        files = family.layout(model.config, family.kind_of(source.tensors))
    load(model, source, files, group=group, device=device)


def save_published(
    model: DecoderLM,
    folder: str | Path,
    group: Group | None = None,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    tokenizer: str | Path | None = None,
) -> None:
    """Write a model as a published folder; no rank ever holds all of it.

    Args:
        model: As for ``load_published``, with values.
        folder: Where; a folder that was written so before is replaced, once all is there. Ranks
            must share it.
        group: As for ``load_published``.
        dtype: Of the files; None keeps each parameter's.
        shard_bytes: Of a file, at most, unless one tensor is larger.
        tokenizer: A folder whose tokenizer files are copied too, or one such file.

    Raises:
        UserError: On every rank, if no family has such a model or the folder cannot be written;
            nothing of it is left then.
    """
    with Agreement(group).together():
        also = () if tokenizer is None else tokenizer_files(Path(tokenizer))
        family = family_of_model(model.config)
    keys = family.published_config(model.config)
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if dtype is not None or len(dtypes) == 1:
        # Under the name that all versions of transformers read.
        keys["torch_dtype"] = str(dtype or next(iter(dtypes))).removeprefix("torch.")
    save(
        model,
        Path(folder),
        family.layout(model.config, family.kinds[0]),
        config=keys,
        group=group,
        dtype=dtype,
        shard_bytes=shard_bytes,
        slab_bytes=SLAB_BYTES,
        also=also,
    )


def read_config(folder: str | Path) -> DecoderConfig:
    """The shape of a published model, from its folder's ``config.json`` or from such a file.

    Raises:
        UserError: If there is none, or it is of no known family.
    """
    file, keys = read_keys(Path(folder))
    for family in FAMILIES.values():
        if family.recognises(keys):
            return config_from(family, file, keys)
    known = ", ".join(FAMILIES)
    raise UserError(f"{file} is of no known family of models ({known})")


def config_from(family: Family, file: Path, keys: dict[str, Any]) -> DecoderConfig:
    """The shape that a family reads from a file's keys; messages name the file."""
    try:
        return family.decoder_config(keys)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error
    # A text where a number belongs, a list where a table does: told by what could not be done.
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{file}: a value is of another kind than expected: {error}") from error


def read_keys(path: Path) -> tuple[Path, dict[str, Any]]:
    """A ``config.json``, itself or of a folder.

    Returns:
        Its path and its content.

    Raises:
        UserError: If there is none, or it is no table.
    """
    file = path / CONFIG if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{file} is missing; give a folder with {CONFIG}, or such a file")
    try:
        keys: Any = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is no JSON: {error}") from error
    if not isinstance(keys, dict):
        raise UserError(f"{file} is no table of keys")
    return file, keys


def family_of_model(config: DecoderConfig) -> Family:
    """The family whose files a model can be written to.

    Raises:
        UserError: If there is none, with each family's reason.
    """
    reasons = []
    for family in FAMILIES.values():
        try:
            family.published_config(config)
        except UserError as error:
            reasons.append(f"{family.name}: {error}")
        else:
            return family
    raise UserError("no family of published models has such a model; " + "; ".join(reasons))
