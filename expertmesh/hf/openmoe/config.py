"""OpenMoE's configuration for transformers: the published keys."""

import os
from typing import Any

from transformers import PreTrainedConfig

from expertmesh.convert.openmoe import decoder_config, is_openmoe, published_config
from expertmesh.errors import UserError
from expertmesh.models import DecoderConfig

# Where code of the hub would be looked for: it needs ColossalAI, and is not run.
_ELSEWHERE = ("auto_map", "model_type", "rope_scaling", "rope_parameters")
_HUB_OPTIONS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)


class OpenMoeConfig(PreTrainedConfig):
    """The content of a published ``config.json``, every key an attribute.

    Args:
        keys: Published keys, or the older ones of ColossalAI's files; ``router_capacity_mode``
            (``"dropless"``, ``"jax"``, ``"jax_34b"``, ``"pytorch"``) is ours. What is not given
            has the published value; sizes have none.
    """

    model_type = "openmoe"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  (transformers' attribute)

    def __init__(self, **keys: Any) -> None:
        # transformers builds a configuration without arguments to compare with when it saves.
        shape = decoder_config(keys) if "num_experts" in keys else None
        known = {} if shape is None else published_config(shape)
        given = {key: value for key, value in keys.items() if key not in _ELSEWHERE}
        mode = {"router_capacity_mode": "dropless"}
        super().__init__(**{**mode, **_without(known, _ELSEWHERE), **given})

    @staticmethod
    def of(config: DecoderConfig, **keys: Any) -> "OpenMoeConfig":
        """From a model's shape; ``keys`` are further ones.

        Raises:
            UserError: If the shape is not OpenMoE's.
        """
        return OpenMoeConfig(**{**published_config(config), **keys})

    def decoder_config(self) -> DecoderConfig:
        """The model's shape.

        Raises:
            UserError: If keys are missing, or say what the model cannot be.
        """
        return decoder_config(self.to_dict())

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The keys of a folder, and the arguments that are left.

        Raises:
            UserError: If they are not OpenMoE's.
        """
        keys, rest = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not is_openmoe(keys):
            raise UserError(
                f"{pretrained_model_name_or_path} is not OpenMoE's: its config.json has no "
                "num_experts and moe_layer_interval; load it with transformers' Auto classes"
            )
        return {**keys, "model_type": cls.model_type}, rest


def _without(keys: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in keys.items() if key not in names}


def hub_options(arguments: dict[str, Any]) -> dict[str, Any]:
    """Of the arguments of a ``from_pretrained``, those that say where its files are."""
    return {key: arguments[key] for key in _HUB_OPTIONS if arguments.get(key) is not None}
