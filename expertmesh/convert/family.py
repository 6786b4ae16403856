"""A family of published models: what its files are called, and what its ``config.json`` says."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any

from expertmesh.convert.layout import Layout
from expertmesh.models import DecoderConfig

EXPERT_DROPOUT = "expert_dropout_rate"
"""Our own key for ``expert_dropout``, written where there is any: no family has one for it."""


class Family(ABC):
    """Models with one configuration and one table of names.

    Attributes:
        name: As on the command line.
        kinds: Of files; the first is the published one.
        presets: Names of ``decoder_preset`` for its published sizes.
    """

    name: str
    kinds: tuple[str, ...]
    presets: tuple[str, ...]

    @abstractmethod
    def recognises(self, keys: Mapping[str, Any]) -> bool:
        """Whether a ``config.json`` is of this family."""

    @abstractmethod
    def decoder_config(self, keys: Mapping[str, Any]) -> DecoderConfig:
        """The model's shape from a ``config.json``.

        Raises:
            UserError: If it says what the decoder cannot be.
        """

    @abstractmethod
    def published_config(self, config: DecoderConfig) -> dict[str, Any]:
        """What goes into ``config.json``.

        Raises:
            UserError: If the model is not of this family.
        """

    @abstractmethod
    def layout(self, config: DecoderConfig, kind: str) -> Layout:
        """Where each parameter lies in files of a kind.

        Raises:
            UserError: If the model is not of this family, or there is no such kind.
        """

    @abstractmethod
    def kind_of(self, names: Collection[str]) -> str:
        """Which kind of files has tensors of these names."""
