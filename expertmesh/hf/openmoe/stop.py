"""When an OpenMoE chat model is done."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

END_OF_ANSWER = (15501, 281, 926)
"""The text ``</s>`` after a space, as umT5 splits it; chat models write it in place of id 1."""


class StopAtEndOfAnswer(StoppingCriteria):
    """Stops a sequence whose last new tokens are ``</s>`` spelled out.

    Args:
        num_prompt: Tokens of the prompt, padding included; what they spell is no end.
        ending: The ids that end an answer.

    Example:
        >>> stop = StopAtEndOfAnswer(inputs["input_ids"].shape[1])
        >>> model.generate(**inputs, stopping_criteria=[stop])
    """

    def __init__(self, num_prompt: int, ending: Sequence[int] = END_OF_ANSWER) -> None:
        self.num_prompt = num_prompt
        self.ending = tuple(ending)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Which sequences are done: bool ``(B,)``.

        Args:
            input_ids: ``(B, S)``, prompt included.
            scores: Not looked at.
            kwargs: Nor these.
        """
        length = len(self.ending)
        if input_ids.shape[1] - self.num_prompt < length:
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        ending = torch.tensor(self.ending, device=input_ids.device)
        return (input_ids[:, -length:] == ending).all(dim=1)
