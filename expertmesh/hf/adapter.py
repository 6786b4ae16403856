"""What every decoder of ours is to transformers: the part that names and files have no say in."""

from abc import ABC
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from expertmesh.errors import UserError
from expertmesh.models import DecoderConfig, DecoderLM

# What transformers' own models can be asked for or given, and these cannot.
_REFUSED = ("inputs_embeds", "output_attentions", "output_hidden_states", "output_router_logits")


class DecoderForCausalLM(PreTrainedModel, GenerationMixin, ABC):
    """``DecoderLM`` behind transformers' interface; ``.model`` is the decoder itself.

    Args:
        config: transformers' side of the configuration.
        shape: The decoder's.
        model: A decoder to share; None builds one.

    Raises:
        UserError: If another ``attn_implementation`` than ``"sdpa"`` is asked for.
    """

    base_model_prefix = "model"
    main_input_name = "input_ids"
    # transformers' own attributes: what stays on one device, and what finds its device itself.
    _no_split_modules = ["DenseBlock", "MoEBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(
        self, config: PreTrainedConfig, shape: DecoderConfig, model: DecoderLM | None
    ) -> None:
        check_attention(config)
        super().__init__(config)
        self.model = DecoderLM(shape) if model is None else model
        self._has_values = not self.model.embedding.weight.is_meta
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss if there are labels.

        Args:
            input_ids: ``(B, S)``, always needed.
            attention_mask: ``(B, P + S)``, 0 at padding on either side.
            past_key_values: Cache of the P positions before, which grows, as ``DynamicCache`` does.
            use_cache: Make a cache if none is given.
            labels: ``(B, S)`` ids, -100 where there is none; shifted here.
            logits_to_keep: Only the last so many positions, or these indices; 0 is all.
            kwargs: ``position_ids`` ``(B or 1, S)``, in place of counting from the first token that
                is no padding; they change nothing of what attention sees. ``num_items_in_batch``
                for the loss. ``return_dict`` is taken as True.

        Raises:
            UserError: Without ids, for embeddings in place of them, if states or attention are to
                be returned, and for a cache of a fixed length.
        """
        input_ids = check_arguments(input_ids, past_key_values, kwargs)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        hidden = self.model.hidden(
            input_ids,
            padding_mask=padding_of(attention_mask),
            cache=past_key_values,
            positions=kwargs.get("position_ids"),
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.logits(hidden[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.model.config.vocab_size,
                num_items_in_batch=kwargs.get("num_items_in_batch"),
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.model.embedding

    def get_output_embeddings(self) -> nn.Module | None:
        """The output layer, or None where it is the embedding."""
        return self.model.head

    def _init_weights(self, module: nn.Module) -> None:
        """Called by transformers for modules that it holds to be without values.

        A decoder built here drew its own, and one that is loaded must find every weight: what is
        still on the meta device lies on disk.
        """
        if self._has_values:
            return
        for name, param in module.named_parameters(recurse=False):
            if not param.is_meta and not getattr(param, "_is_hf_initialized", False):
                raise UserError(
                    f"the checkpoint has no {name} for a {type(module).__name__}; "
                    "expected every weight of the model, so it may be of another one"
                )


def check_attention(config: PreTrainedConfig) -> None:
    """Refuse an implementation of attention that would change nothing.

    Raises:
        UserError: If one is asked for that is not ours.
    """
    asked = config._attn_implementation
    if asked not in (None, "sdpa"):
        raise UserError(
            f"attn_implementation must be 'sdpa', got {asked!r}; attention here is torch's "
            "scaled_dot_product_attention, so leave it out"
        )


def check_arguments(input_ids: Tensor | None, cache: Any, kwargs: Mapping[str, Any]) -> Tensor:
    """Refuse what would be passed over in silence, or lead to wrong numbers.

    Returns:
        The ids.

    Raises:
        UserError: If there is such an argument, or no ids.
    """
    for name in _REFUSED:
        # False says what is the case anyway.
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise UserError(f"{name} is not supported by this model; leave it out")
    if getattr(cache, "is_compileable", False):
        raise UserError(
            f"a cache of fixed length is not supported, got a {type(cache).__name__}; use "
            "DynamicCache, and leave cache_implementation out"
        )
    if input_ids is None:
        raise UserError("input_ids are missing; give ids of shape (B, S)")
    return input_ids


def padding_of(attention_mask: Tensor | None) -> Tensor | None:
    """True at padding; None where nothing is, which spares attention its mask."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise UserError(
            f"attention_mask must have shape (B, P + S), got {tuple(attention_mask.shape)}"
        )
    padding = attention_mask == 0
    return padding if bool(padding.any()) else None
