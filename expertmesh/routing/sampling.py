"""Choices drawn at random in training: by their probabilities, through Gumbel noise on logits."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from expertmesh.random import label
from expertmesh.routing.draw import Draw
from expertmesh.routing.selection import top_k

Sampling = Literal["no", "second", "all"]

_GUMBEL = label("gumbel")


def gumbel(draw: Draw, num_experts: int, dtype: torch.dtype) -> Tensor:
    """``-log(-log u)``, ``(T, E)``: added to logits, the largest sum is a draw from the softmax."""
    uniform_TE = draw.uniform(_GUMBEL, num_experts, dtype).clamp_min(torch.finfo(dtype).tiny)
    return -(-uniform_TE.log()).log()


def sample_all(logits_TE: Tensor, draw: Draw) -> Tensor:
    """By what to choose where every choice is drawn, without replacement."""
    return logits_TE + gumbel(draw, logits_TE.shape[1], logits_TE.dtype)


def sample_second(logits_TE: Tensor, draw: Draw) -> Tensor:
    """By what to choose where the best expert is taken and the others are drawn from the rest."""
    return sample_all(logits_TE, draw).scatter(1, top_k(logits_TE, 1), torch.inf)


SAMPLINGS: dict[str, Callable[[Tensor, Draw], Tensor]] = {
    "second": sample_second,
    "all": sample_all,
}
"""DeepSpeed's code has both: ``top2_2nd_expert_sampling`` for two choices, ``RSample`` for one."""
