"""OpenMoE as a family of published models."""

from collections.abc import Collection, Mapping
from typing import Any, final

from expertmesh.convert.family import Family
from expertmesh.convert.layout import Layout
from expertmesh.convert.openmoe import names as table
from expertmesh.convert.openmoe.config import decoder_config, is_openmoe, published_config
from expertmesh.models import DecoderConfig


@final
class OpenMoe(Family):
    """OpenMoE (arXiv 2402.01739): ``OrionZheng/openmoe-*`` and ``hpcai-tech/openmoe-*``."""

    name = "openmoe"
    kinds = table.KINDS
    presets = ("openmoe-base", "openmoe-8b", "openmoe-34b", "openmoe-test")

    def recognises(self, keys: Mapping[str, Any]) -> bool:
        return is_openmoe(keys)

    def decoder_config(self, keys: Mapping[str, Any]) -> DecoderConfig:
        return decoder_config(keys)

    def published_config(self, config: DecoderConfig) -> dict[str, Any]:
        return published_config(config)

    def layout(self, config: DecoderConfig, kind: str) -> Layout:
        return table.layout(config, kind)

    def kind_of(self, names: Collection[str]) -> str:
        if any(name.endswith("mlp.experts.0.gate_proj.weight") for name in names):
            return "per-expert"
        return "t5x" if any("/" in name for name in names) else "published"
