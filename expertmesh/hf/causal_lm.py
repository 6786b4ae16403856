"""A decoder language model as a ``transformers`` model: generation, saving, Auto classes."""

import dataclasses
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from expertmesh.hf.adapter import DecoderForCausalLM
from expertmesh.models import DecoderConfig, DecoderLM


class ExpertmeshConfig(PreTrainedConfig):
    """Holds a ``DecoderConfig`` where transformers looks for a configuration.

    Args:
        shape: Fields of ``DecoderConfig``.
        kwargs: transformers' own, such as ``eos_token_id``.
    """

    model_type = "expertmesh"

    def __init__(self, shape: dict[str, Any] | None = None, **kwargs: Any) -> None:
        # transformers builds a configuration without arguments to compare with when it saves.
        self.shape = dict(shape or {})
        if shape is not None:
            config = DecoderConfig(**shape)
            kwargs |= {
                "vocab_size": config.vocab_size,
                "hidden_size": config.dim,
                "num_hidden_layers": config.num_layers,
                "num_attention_heads": config.num_heads,
                "max_position_embeddings": config.max_seq_len,
                # Tied weights are one parameter here, so there is nothing to tie after loading.
                "tie_word_embeddings": False,
            }
        super().__init__(**kwargs)

    @staticmethod
    def of(config: DecoderConfig, **kwargs: Any) -> "ExpertmeshConfig":
        """From a model's shape; ``kwargs`` are transformers' own."""
        return ExpertmeshConfig(dataclasses.asdict(config), **kwargs)

    def decoder_config(self) -> DecoderConfig:
        """The model's shape."""
        return DecoderConfig(**self.shape)


class ExpertmeshForCausalLM(DecoderForCausalLM):
    """``DecoderLM`` behind transformers' interface, saved under our own names.

    Args:
        config: The shape.
        model: A decoder to share; None builds one.
    """

    config_class = ExpertmeshConfig

    def __init__(self, config: ExpertmeshConfig, model: DecoderLM | None = None) -> None:
        super().__init__(config, config.decoder_config(), model)


def as_transformers(model: DecoderLM, **kwargs: Any) -> ExpertmeshForCausalLM:
    """A decoder with ``generate`` and ``save_pretrained``, sharing its weights.

    Args:
        model: Stays usable, and sees every change of the weights.
        kwargs: Of the configuration, such as ``eos_token_id`` and ``pad_token_id``.

    Returns:
        The adapter, in evaluation or training mode as the model is.
    """
    adapter = ExpertmeshForCausalLM(ExpertmeshConfig.of(model.config, **kwargs), model)
    return adapter.train(model.training)


AutoConfig.register("expertmesh", ExpertmeshConfig)
AutoModelForCausalLM.register(ExpertmeshConfig, ExpertmeshForCausalLM)
