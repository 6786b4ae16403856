"""The definition of the router's operations, in plain PyTorch."""

import torch
from torch import Tensor


def reference_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """``x W^T`` in float32 or wider, ``(T, E)``."""
    wide = torch.promote_types(torch.promote_types(x_TD.dtype, weight_ED.dtype), torch.float32)
    return x_TD.to(wide) @ weight_ED.to(wide).T


def reference_scores(logits_TE: Tensor, sigmoid: bool) -> Tensor:
    """Softmax over experts, or the sigmoid of each."""
    return torch.sigmoid(logits_TE) if sigmoid else logits_TE.softmax(dim=-1)


def reference_choose(logits_TE: Tensor, k: int, sigmoid: bool) -> Tensor:
    """The k experts of highest score, highest first, ties to the lowest index; int64 ``(T, k)``."""
    score_TE = reference_scores(logits_TE, sigmoid)
    return score_TE.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def reference_gates(
    logits_TE: Tensor, chosen_TK: Tensor, sigmoid: bool, renormalize: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores, the weights of the chosen, how often each expert was chosen, and norms.

    Args:
        logits_TE: ``(T, E)``.
        chosen_TK: int64 ``(T, K)``, different experts in each row; E where there is none.
        sigmoid: Whether scores are sigmoids; softmax otherwise.
        renormalize: Whether each row's weights are divided by their sum.
        scale: Multiplies the weights.

    Returns:
        ``score_TE``; ``gate_TK``, zero at sentinels; ``load_E`` int64; ``norm_T``, each token's
        logsumexp of logits.
    """
    num_experts = logits_TE.shape[1]
    score_TE = reference_scores(logits_TE, sigmoid)
    valid_TK = chosen_TK < num_experts
    gate_TK = score_TE.gather(1, chosen_TK.clamp_max(num_experts - 1))
    gate_TK = torch.where(valid_TK, gate_TK, 0.0)
    if renormalize:
        total_T1 = gate_TK.sum(dim=1, keepdim=True)
        gate_TK = gate_TK / total_T1.clamp_min(torch.finfo(gate_TK.dtype).tiny)
    load_E = torch.bincount(chosen_TK.reshape(-1), minlength=num_experts + 1)[:num_experts]
    return score_TE, scale * gate_TK, load_E, logits_TE.logsumexp(dim=1)
