"""OpenMoE: the one table of its names, and its ``config.json``."""

from expertmesh.convert.openmoe.config import decoder_config, is_openmoe, published_config
from expertmesh.convert.openmoe.names import KINDS, layout

__all__ = ["KINDS", "decoder_config", "is_openmoe", "layout", "published_config"]
