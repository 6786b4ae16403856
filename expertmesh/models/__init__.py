"""Whole models built from the layer."""

from expertmesh.models.config import DecoderConfig
from expertmesh.models.decoder import DecoderLM
from expertmesh.models.presets import decoder_preset, decoder_presets
from expertmesh.models.routers import replace_routers

__all__ = ["DecoderConfig", "DecoderLM", "decoder_preset", "decoder_presets", "replace_routers"]
