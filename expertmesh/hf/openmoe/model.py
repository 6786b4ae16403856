"""OpenMoE as a ``transformers`` model: published folders in and out, generation, many devices."""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from expertmesh.convert.openmoe import layout
from expertmesh.errors import UserError, require
from expertmesh.hf.adapter import DecoderForCausalLM, check_arguments
from expertmesh.hf.openmoe.config import OpenMoeConfig, hub_options
from expertmesh.hf.openmoe.devices import our_device_map
from expertmesh.hf.openmoe.positions import WithinPositions
from expertmesh.hf.openmoe.weights import check_checkpoint, conversions
from expertmesh.models import DecoderLM


class OpenMoeForCausalLM(WithinPositions):
    """An OpenMoE decoder that loads published folders and writes them again.

    Routing is dropless unless the configuration's ``router_capacity_mode`` says otherwise.

    Args:
        config: The published keys.
        model: A decoder to share; None builds one.

    Example:
        >>> model = OpenMoeForCausalLM.from_pretrained("openmoe-8b-chat", dtype=torch.bfloat16)
    """

    config_class = OpenMoeConfig

    def __init__(self, config: OpenMoeConfig, model: DecoderLM | None = None) -> None:
        super().__init__(config, config.decoder_config(), model)
        # transformers reverses these to write published names.
        self._weight_conversions = conversions(layout(self.model.config))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a published folder: safetensors, whole or in shards, or pickled ``.bin`` weights.

        Args:
            pretrained_model_name_or_path: A folder, or a name on the hub.
            args: transformers' own.
            kwargs: Likewise: ``dtype``, ``device_map``, ``max_memory``, ``offload_folder`` and so
                on. A ``device_map`` may use the published names or ours.

        Raises:
            UserError: If a tensor is missing, unexpected or misshapen (all are named, and nothing
                is loaded), the configuration is not OpenMoE's, or the map does not fit.
        """
        device_map = kwargs.get("device_map")
        if device_map is not None:
            require("accelerate", extra="hf")
        if isinstance(device_map, Mapping):
            config = kwargs.get("config")
            if not isinstance(config, OpenMoeConfig):
                hub = hub_options(kwargs)
                config = OpenMoeConfig.from_pretrained(pretrained_model_name_or_path, **hub)
            device_map = our_device_map(device_map, layout(config.decoder_config()))
            if "disk" in device_map.values() and kwargs.get("offload_folder") is None:
                raise UserError(
                    "device_map puts modules on disk, where they are written in another layout; "
                    "set offload_folder to a folder with room for them"
                )
            kwargs["device_map"] = device_map
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @staticmethod
    def _load_pretrained_model(
        model: Any,
        state_dict: dict[str, Tensor] | None,
        checkpoint_files: list[str] | None,
        load_config: Any,
        expected_keys: list[str] | None = None,
    ) -> Any:
        """transformers' step between building the model and giving it values."""
        files = layout(model.model.config)
        where = str(load_config.pretrained_model_name_or_path or "")
        check_checkpoint(files, checkpoint_files, state_dict, where)
        _warn_of_half(load_config.dtype)
        load_config = dataclasses.replace(load_config, weight_mapping=conversions(files))
        loaded = DecoderForCausalLM._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, expected_keys
        )
        if faults := loaded[0].missing_keys or loaded[0].conversion_errors:
            raise UserError(f"{where}: could not be loaded: {sorted(faults)}")
        return loaded

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
        """As of every decoder here, for as many positions as the model was trained with.

        Args:
            input_ids: ``(B, S)``, beginning with id 0.
            attention_mask: ``(B, P + S)``, 0 at padding, 1 on that first id.
            past_key_values: Cache of the P positions before.
            use_cache: As in ``DecoderForCausalLM``, like the rest.
            labels: Likewise.
            logits_to_keep: Likewise.
            kwargs: Likewise.

        Raises:
            UserError: If there are more positions than the model has, and as of every decoder.
        """
        input_ids = check_arguments(input_ids, past_key_values, kwargs)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        self._check_positions(past + input_ids.shape[1], attention_mask)
        return super().forward(
            input_ids,
            attention_mask,
            past_key_values,
            use_cache,
            labels,
            logits_to_keep,
            **kwargs,
        )

    def _prepare_attention_mask_for_generation(
        self, inputs_tensor: Tensor, generation_config: Any, model_kwargs: dict[str, Any]
    ) -> Any:
        """transformers' guess where no mask was given; id 0 before the text is its beginning."""
        ids = model_kwargs.get("input_ids", inputs_tensor)
        if ids.dim() != 2 or ids.dtype not in (torch.int32, torch.int64):
            return super()._prepare_attention_mask_for_generation(
                inputs_tensor, generation_config, model_kwargs
            )
        padding = ids == self.config.pad_token_id
        leading = padding.long().cumprod(dim=-1)
        # The last of the leading ones begins the text; the others fill the row.
        begins = leading.sum(dim=-1, keepdim=True) - 1
        position = torch.arange(ids.shape[1], device=ids.device)
        return (~padding | (position == begins)).long()


def as_openmoe(model: DecoderLM, **keys: Any) -> OpenMoeForCausalLM:
    """A decoder as OpenMoE, sharing its weights: ``save_pretrained`` writes a published folder.

    Args:
        model: Of OpenMoE's shape; stays usable.
        keys: Of the configuration.

    Raises:
        UserError: If the shape is not OpenMoE's.
    """
    adapter = OpenMoeForCausalLM(OpenMoeConfig.of(model.config, **keys), model)
    return adapter.train(model.training)


def _warn_of_half(dtype: torch.dtype | None) -> None:
    if dtype == torch.float16:
        warnings.warn(
            "float16 is not advised for OpenMoE: probabilities over 256,384 tokens and products of "
            "three activations leave its range, and answers get worse; use dtype=torch.bfloat16",
            stacklevel=2,
        )
