"""Generation within the positions that a model has, of which padding takes none."""

from abc import ABC
from typing import Any

from torch import Tensor
from transformers import GenerationMixin, MaxLengthCriteria

from expertmesh.errors import UserError
from expertmesh.hf.adapter import DecoderForCausalLM


class WithinPositions(DecoderForCausalLM, ABC):
    """A decoder that says so where ``max_position_embeddings`` are too few.

    Positions count from a row's first real token, in ``forward`` and in ``generate`` alike.
    transformers counts padding too, cuts its default length by that, and goes on with a warning.
    """

    def _check_positions(self, length: int, attention_mask: Tensor | None) -> None:
        """Refuse a sequence of ``length`` tokens, those under the mask not counted."""
        limit = self.config.max_position_embeddings
        if length > limit:
            length -= num_padding(attention_mask)
        if length > limit:
            raise UserError(
                f"the sequence has {length} tokens, but the model has {limit} positions "
                "(max_position_embeddings); shorten the prompt or lower max_new_tokens"
            )

    def _prepare_generated_length(  # type: ignore[override]  # the rest is given by name
        self: Any, generation_config: Any, has_default_max_length: bool, **given: Any
    ) -> Any:
        """transformers' sum, but its default is left whole until the mask is at hand."""
        usual = generation_config.max_length
        prepared = GenerationMixin._prepare_generated_length(
            self, generation_config, has_default_max_length=has_default_max_length, **given
        )
        # The configuration is this call's own copy, and transformers' way to pass such things on.
        prepared._prompt_length = given["input_ids_length"]
        prepared._may_be_shorter = has_default_max_length and prepared.max_new_tokens is None
        if prepared._may_be_shorter:
            prepared.max_length = usual + given["input_ids_length"]
        return prepared

    def _prepare_cache_for_generation(
        self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """transformers' step where lengths and mask are first known both."""
        self._fit_positions(generation_config, num_padding(model_kwargs.get("attention_mask")))
        return GenerationMixin._prepare_cache_for_generation(
            self, generation_config, model_kwargs, *args, **kwargs
        )

    def _fit_positions(self, generation_config: Any, padding: int) -> None:
        limit = self.config.max_position_embeddings
        prompt = generation_config._prompt_length - padding
        new, room = generation_config.max_length - generation_config._prompt_length, limit - prompt
        tokens = f"{prompt} tokens" + (" besides padding" if padding else "")
        if room < 1:
            raise UserError(
                f"the prompt has {tokens}, but the model has {limit} positions "
                f"(max_position_embeddings); shorten it to at most {limit - 1}"
            )
        if new > room and not generation_config._may_be_shorter:
            raise UserError(
                f"a prompt of {tokens} leaves {room} of the model's {limit} positions, got {new} "
                f"new tokens; set max_new_tokens={room}"
            )
        generation_config.max_length -= max(new - room, 0)

    def _get_stopping_criteria(self: Any, *args: Any, **kwargs: Any) -> Any:
        """transformers' criteria, without the reminder of positions, which were looked at."""
        criteria = GenerationMixin._get_stopping_criteria(self, *args, **kwargs)
        for criterion in criteria:
            if isinstance(criterion, MaxLengthCriteria):
                criterion.max_position_embeddings = None
        return criteria


def num_padding(attention_mask: Tensor | None) -> int:
    """Padding of the row that has least of it: columns that take no position in any row."""
    return 0 if attention_mask is None else int((attention_mask == 0).sum(dim=-1).min())
