"""Hugging Face models on this layer. Needs the extra ``hf``."""

from expertmesh.errors import require

require("transformers", extra="hf")

from expertmesh.hf.causal_lm import (  # noqa: E402  (after the check, so that its message comes first)
    ExpertmeshConfig,
    ExpertmeshForCausalLM,
    as_transformers,
)

__all__ = ["ExpertmeshConfig", "ExpertmeshForCausalLM", "as_transformers"]
