"""Hugging Face models on this layer, and OpenMoE in its Auto classes. Needs the extra ``hf``."""

from expertmesh.errors import require

require("transformers", extra="hf")

from expertmesh.hf.causal_lm import (  # noqa: E402  (after the check, so that its message comes first)
    ExpertmeshConfig,
    ExpertmeshForCausalLM,
    as_transformers,
)
from expertmesh.hf.openmoe import (  # noqa: E402  (likewise)
    OpenMoeConfig,
    OpenMoeForCausalLM,
    OpenMoeTokenizer,
    StopAtEndOfAnswer,
    as_openmoe,
)

__all__ = [
    "ExpertmeshConfig",
    "ExpertmeshForCausalLM",
    "OpenMoeConfig",
    "OpenMoeForCausalLM",
    "OpenMoeTokenizer",
    "StopAtEndOfAnswer",
    "as_openmoe",
    "as_transformers",
]
