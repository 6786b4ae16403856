"""OpenMoE's published models, on this package's decoder, for transformers."""

from expertmesh.hf.openmoe.auto import register
from expertmesh.hf.openmoe.config import OpenMoeConfig
from expertmesh.hf.openmoe.model import OpenMoeForCausalLM, as_openmoe
from expertmesh.hf.openmoe.stop import END_OF_ANSWER, StopAtEndOfAnswer
from expertmesh.hf.openmoe.tokenizer import OpenMoeTokenizer

__all__ = [
    "END_OF_ANSWER",
    "OpenMoeConfig",
    "OpenMoeForCausalLM",
    "OpenMoeTokenizer",
    "StopAtEndOfAnswer",
    "as_openmoe",
]

register()
