"""OpenMoE in transformers' Auto classes, also for published folders that say they are LLaMA."""

from collections.abc import Callable
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils.hub import cached_file

from expertmesh.convert.openmoe import is_openmoe
from expertmesh.hf.openmoe.config import OpenMoeConfig, hub_options
from expertmesh.hf.openmoe.model import OpenMoeForCausalLM
from expertmesh.hf.openmoe.tokenizer import OpenMoeTokenizer

# Arguments of the Auto classes that concern the choice of a class and nothing else.
_CHOICE = ("trust_remote_code", "code_revision", "use_fast", "tokenizer_type", "config")
_TOKENIZERS = ("OpenMoeTokenizer", "T5Tokenizer", "T5TokenizerFast")

Recognise = Callable[[Any, dict[str, Any]], bool]


def register() -> None:
    """Make the Auto classes know OpenMoE.

    Published folders say ``model_type`` ``"llama"`` and name code of the hub that needs
    ColossalAI. They are recognised by their keys before transformers looks at either, so
    ``trust_remote_code`` runs nothing for them; all other folders take transformers' own way.
    """
    AutoConfig.register(OpenMoeConfig.model_type, OpenMoeConfig)
    AutoModelForCausalLM.register(OpenMoeConfig, OpenMoeForCausalLM)
    AutoTokenizer.register(OpenMoeConfig, OpenMoeTokenizer)
    _divert(AutoConfig, OpenMoeConfig, _has_openmoe_config)
    _divert(AutoTokenizer, OpenMoeTokenizer, _has_openmoe_tokenizer)


def _divert(auto: type, ours: Any, recognises: Recognise) -> None:
    """Let a class of ours answer for an Auto class where it knows the folder."""
    usual = auto.from_pretrained  # type: ignore[attr-defined]  # both Auto classes have it

    def from_pretrained(
        cls: type, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """transformers' ``from_pretrained``, which knows OpenMoE's published folders too."""
        if recognises(pretrained_model_name_or_path, kwargs):
            kept = {key: value for key, value in kwargs.items() if key not in _CHOICE}
            return ours.from_pretrained(pretrained_model_name_or_path, *args, **kept)
        return usual(pretrained_model_name_or_path, *args, **kwargs)

    auto.from_pretrained = classmethod(from_pretrained)  # type: ignore[attr-defined]  # as above


def _has_openmoe_config(name: Any, kwargs: dict[str, Any]) -> bool:
    if kwargs.get("gguf_file"):
        return False
    try:
        keys, _ = PreTrainedConfig.get_config_dict(name, **hub_options(kwargs))
    except (OSError, ValueError):
        # transformers finds the same and says what there is to say.
        return False
    return is_openmoe(keys)


def _has_openmoe_tokenizer(name: Any, kwargs: dict[str, Any]) -> bool:
    config = kwargs.get("config")
    known = isinstance(config, OpenMoeConfig) or _has_openmoe_config(name, kwargs)
    if not known or kwargs.get("tokenizer_type"):
        return False
    if get_tokenizer_config(name, **hub_options(kwargs)).get("tokenizer_class") in _TOKENIZERS:
        return True
    vocabulary = OpenMoeTokenizer.vocab_files_names["vocab_file"]
    found = cached_file(
        name, vocabulary, _raise_exceptions_for_missing_entries=False, **hub_options(kwargs)
    )
    return found is not None
