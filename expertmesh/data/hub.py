"""Tables of the Hugging Face hub, and folders in its layout, through the ``datasets`` library."""

import re
from dataclasses import dataclass
from typing import Any

from expertmesh.errors import UserError, require

PREFIX = "hf:"
"""Begins a source that is read through ``datasets``."""
_CONVERTED = "refs/convert/parquet"
# Not the one of a slice: `train[:10%]` is a split.
_COLON = re.compile(r":(?![^\[]*\])")


@dataclass(frozen=True)
class HubSource:
    """``hf:NAME[@CONFIG][:SPLIT[:FIELD]]`` in its parts; NAME may be a local folder."""

    name: str
    config: str
    split: str
    field: str

    @staticmethod
    def parse(source: str) -> "HubSource":
        """The parts of a source; the split is ``train`` unless given, and may be a slice of one.

        Raises:
            UserError: If it names no data set, or has more parts.
        """
        name, split, field, *more = [*_COLON.split(source.removeprefix(PREFIX)), "", ""]
        if any(more):
            raise UserError(
                f"data.source {source!r} has too many parts; write hf:NAME[@CONFIG][:SPLIT[:FIELD]]"
            )
        name, _, config = name.partition("@")
        if not name:
            raise UserError(f"data.source {source!r} names no data set; write hf:NAME")
        return HubSource(name, config, split or "train", field)

    def load(self) -> Any:
        """The table, an iterable of dicts with a length.

        A data set that is made by a script, which the library no longer runs, is read from the
        hub's own conversion of it to parquet.

        Raises:
            UserError: If the library cannot load it; holds its words.
        """
        datasets = require("datasets", extra="hf")
        try:
            try:
                return datasets.load_dataset(self.name, self.config or None, split=self.split)
            except RuntimeError as error:
                if "scripts are no longer supported" not in str(error):
                    raise
                return datasets.load_dataset(
                    self.name,
                    data_dir=self.config or None,
                    split=self.split,
                    revision=_CONVERTED,
                )
        # The library raises dozens of unrelated kinds: of the network, of the hub, of the files.
        except Exception as error:
            raise UserError(f"data.source {str(self)!r}: {error}") from error

    def __str__(self) -> str:
        config = f"@{self.config}" if self.config else ""
        field = f":{self.field}" if self.field else ""
        return f"{PREFIX}{self.name}{config}:{self.split}{field}"
