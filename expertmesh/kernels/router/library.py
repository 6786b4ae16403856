"""The router's operations as torch knows them: schemas, implementations, shapes without values.

Defined with ``torch.library.define``: ``custom_op`` imports the compiler at the first call.

Products of bfloat16 and float32 run on tensor cores without loss: a float32 is the sum of three
bfloat16 numbers, and products of two bfloat16 numbers are exact in float32, in which they are
added. No float32 copy of x is made or saved.
"""

from typing import Any

import torch
from torch import Tensor

from expertmesh.kernels.triton_support import on_its_device

_FEW_TOKENS = 128
"""Up to this many tokens the logits are computed by fused multiply-add."""

_NARROW = torch.int16
"""Of the ids that are held until backward; there are at most 1024 experts."""

_SCHEMAS = {
    "router_balance": "(Tensor score, Tensor chosen, int size) -> (Tensor, Tensor)",
    "router_balance_backward": "(Tensor score, Tensor fraction, Tensor dproduct, int size)"
    " -> Tensor",
    "router_count": "(Tensor logits, Tensor chosen, Tensor? dropped, Tensor load,"
    " Tensor(a!)[] counters, int length) -> ()",
    "router_logits": "(Tensor x, Tensor weight) -> Tensor",
    "router_logits_again": "(Tensor x, Tensor weight) -> Tensor",
    "router_logits_backward": "(Tensor dlogits, Tensor x, Tensor weight, bool[2] wanted)"
    " -> (Tensor, Tensor)",
    "router_choose": "(Tensor logits, int k, bool sigmoid) -> Tensor",
    "router_select": "(Tensor logits, int k, bool sigmoid, bool renormalize, float scale)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    "router_gates": "(Tensor logits, Tensor chosen, bool sigmoid, bool renormalize, float scale)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "router_gates_backward": "(Tensor parts, Tensor narrow, Tensor? dscore, Tensor? dgate,"
    " Tensor? dnorm, bool sigmoid, bool renormalize, float scale) -> Tensor",
    "router_sums": "(Tensor score, Tensor chosen) -> Tensor",
    "router_z": "(Tensor logits) -> (Tensor, Tensor)",
    "router_z_backward": "(Tensor logits, Tensor norm, Tensor dmean) -> Tensor",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"expertmesh::{_name}", _schema)


def _implement(name: str) -> Any:
    register = torch.library.impl(f"expertmesh::{name}", "CompositeExplicitAutograd")
    return lambda run: register(on_its_device(run))


def _fake(name: str) -> Any:
    return torch.library.register_fake(f"expertmesh::{name}")


@_fake("router_logits")
def _empty_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    return x_TD.new_empty(x_TD.shape[0], weight_ED.shape[0], dtype=torch.float32)


@_implement("router_logits")
def _logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    from expertmesh.kernels.router import logits as kernels

    x_TD, weight_ED = x_TD.contiguous(), weight_ED.contiguous()
    if x_TD.shape[0] <= _FEW_TOKENS:
        logits_TE = _empty_logits(x_TD, weight_ED)
        kernels.few_logits(x_TD, weight_ED, logits_TE)
        return logits_TE
    if weight_ED.dtype == torch.bfloat16:
        return _product(x_TD, weight_ED.T)
    part_XD = kernels.split(weight_ED, (0, 1, 2), by_row=False)
    return kernels.add_parts(_product(x_TD, part_XD.T).view(x_TD.shape[0], 3, -1))


@_fake("router_logits_again")
def _empty_parts(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """Float32 weights make two parts: without the last, 2^-17 of the logits is left out."""
    T, E = x_TD.shape[0], weight_ED.shape[0]
    whole = weight_ED.dtype == torch.bfloat16 or T <= _FEW_TOKENS
    return x_TD.new_empty(T, 1 if whole else 2, E, dtype=torch.float32)


@_implement("router_logits_again")
def _logits_again(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    from expertmesh.kernels.router import logits as kernels

    x_TD, weight_ED = x_TD.contiguous(), weight_ED.contiguous()
    if x_TD.shape[0] <= _FEW_TOKENS:
        parts_TPE = _empty_parts(x_TD, weight_ED)
        kernels.few_logits(x_TD, weight_ED, parts_TPE)
        return parts_TPE
    if weight_ED.dtype == torch.bfloat16:
        return _product(x_TD, weight_ED.T).unsqueeze(1)
    part_XD = kernels.split(weight_ED, (0, 1), by_row=False)
    return _product(x_TD, part_XD.T).view(x_TD.shape[0], 2, -1)


@_fake("router_logits_backward")
def _empty_logits_backward(
    dlogits_TE: Tensor, x_TD: Tensor, weight_ED: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    dx, dweight = (
        like.new_empty(like.shape if want else (0,))
        for like, want in zip((x_TD, weight_ED), wanted, strict=True)
    )
    return dx, dweight


@_implement("router_logits_backward")
def _logits_backward(
    dlogits_TE: Tensor, x_TD: Tensor, weight_ED: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    from expertmesh.kernels.router import logits as kernels

    E, D = weight_ED.shape
    dx, dweight = x_TD.new_empty(0), weight_ED.new_empty(0)
    part_TX = kernels.split(dlogits_TE.contiguous(), (2, 0, 1, 0), by_row=True)
    if wanted[0]:
        # Two parts of the gradient times the rounded weights, and the first times what was rounded
        # off: what is left out is 2^-15 of the product, a fiftieth of bfloat16's own rounding.
        weight_XD = kernels.split(weight_ED.contiguous(), (0, 0, 1), by_row=False)
        dx = part_TX[:, E:] @ weight_XD
    if wanted[1]:
        part_XD = _product(part_TX[:, : 3 * E].T, x_TD.contiguous())
        dweight = part_XD.view(3, E, D).sum(dim=0).to(weight_ED.dtype)
    return dx, dweight


def _product(a_IJ: Tensor, b_JO: Tensor) -> Tensor:
    """A product of bfloat16 matrices in float32."""
    if a_IJ.device.type == "cuda":
        return torch.mm(a_IJ, b_JO, out_dtype=torch.float32)
    return a_IJ.float() @ b_JO.float()


@_fake("router_choose")
def _empty_choice(logits_TE: Tensor, k: int, sigmoid: bool) -> Tensor:
    return logits_TE.new_empty(logits_TE.shape[0], k, dtype=torch.int64)


@_implement("router_choose")
def _choose(logits_TE: Tensor, k: int, sigmoid: bool) -> Tensor:
    from expertmesh.kernels.router import selection as kernels

    chosen_TK = _empty_choice(logits_TE, k, sigmoid)
    kernels.choose(logits_TE.contiguous(), sigmoid, chosen_TK)
    return chosen_TK


@_fake("router_select")
def _empty_selection(
    logits_TE: Tensor, k: int, sigmoid: bool, renormalize: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    chosen_TK = _empty_choice(logits_TE, k, sigmoid)
    gates = _empty_gates(logits_TE, chosen_TK, sigmoid, renormalize, scale)
    return chosen_TK, *gates[:3]


@_implement("router_select")
def _select(
    logits_TE: Tensor, k: int, sigmoid: bool, renormalize: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from expertmesh.kernels.router import gates, selection

    rule = (sigmoid, renormalize, scale)
    logits_TE = logits_TE.contiguous()
    if logits_TE.shape[0] <= _FEW_TOKENS:
        chosen_TK, score_TE = _empty_choice(logits_TE, k, sigmoid), torch.empty_like(logits_TE)
        gate_TK = logits_TE.new_empty(chosen_TK.shape)
        load_E = selection.select(logits_TE, *rule, chosen_TK, score_TE, gate_TK)
        return chosen_TK, score_TE, gate_TK, load_E
    # All at once needs too many registers to be faster than one after the other.
    chosen_TK = _empty_choice(logits_TE, k, sigmoid)
    selection.choose(logits_TE, sigmoid, chosen_TK)
    score_TE, gate_TK, _, *unused = _empty_gates(logits_TE, chosen_TK, *rule)
    load_E = gates.gates(logits_TE, chosen_TK, *rule, score_TE, gate_TK, *unused)
    return chosen_TK, score_TE, gate_TK, load_E


@_fake("router_gates")
def _empty_gates(
    logits_TE: Tensor, chosen_TK: Tensor, sigmoid: bool, renormalize: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    score_TE = torch.empty_like(logits_TE, memory_format=torch.contiguous_format)
    gate_TK = logits_TE.new_empty(chosen_TK.shape)
    load_E = chosen_TK.new_empty(logits_TE.shape[1])
    norm_T = logits_TE.new_empty(logits_TE.shape[0])
    return score_TE, gate_TK, load_E, norm_T, chosen_TK.new_empty(chosen_TK.shape, dtype=_NARROW)


@_implement("router_gates")
def _gates(
    logits_TE: Tensor, chosen_TK: Tensor, sigmoid: bool, renormalize: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from expertmesh.kernels.router import gates as kernels

    logits_TE, chosen_TK = logits_TE.contiguous(), chosen_TK.contiguous()
    given = (logits_TE, chosen_TK, sigmoid, renormalize, scale)
    score_TE, gate_TK, _, norm_T, narrow_TK = _empty_gates(*given)
    load_E = kernels.gates(*given, score_TE, gate_TK, norm_T, narrow_TK)
    return score_TE, gate_TK, load_E, norm_T, narrow_TK


@_fake("router_gates_backward")
def _empty_gates_backward(
    parts_TPE: Tensor,
    narrow_TK: Tensor,
    dscore_TE: Tensor | None,
    dgate_TK: Tensor | None,
    dnorm_T: Tensor | None,
    sigmoid: bool,
    renormalize: bool,
    scale: float,
) -> Tensor:
    return parts_TPE.new_empty(parts_TPE.shape[0], parts_TPE.shape[2])


@_implement("router_gates_backward")
def _gates_backward(
    parts_TPE: Tensor,
    narrow_TK: Tensor,
    dscore_TE: Tensor | None,
    dgate_TK: Tensor | None,
    dnorm_T: Tensor | None,
    sigmoid: bool,
    renormalize: bool,
    scale: float,
) -> Tensor:
    from expertmesh.kernels.router import gates as kernels

    parts_TPE = parts_TPE.contiguous()
    dlogits_TE = parts_TPE.new_empty(parts_TPE.shape[0], parts_TPE.shape[2])
    if dscore_TE is not None and dscore_TE.stride(1) != 1:
        dscore_TE = dscore_TE.contiguous()
    kernels.gates_backward(
        parts_TPE,
        narrow_TK,
        dscore_TE,
        None if dgate_TK is None else dgate_TK.contiguous(),
        None if dnorm_T is None else dnorm_T.contiguous(),
        sigmoid,
        renormalize,
        scale,
        dlogits_TE,
    )
    return dlogits_TE


@_fake("router_count")
def _count_nothing(
    logits_TE: Tensor,
    chosen_TK: Tensor,
    dropped_TK: Tensor | None,
    load_E: Tensor,
    counters: list[Tensor],
    length: int,
) -> None:
    pass


@_implement("router_count")
def _count(
    logits_TE: Tensor,
    chosen_TK: Tensor,
    dropped_TK: Tensor | None,
    load_E: Tensor,
    counters: list[Tensor],
    length: int,
) -> None:
    from expertmesh.kernels.router.count import count

    count(
        logits_TE.contiguous(),
        chosen_TK.contiguous(),
        None if dropped_TK is None else dropped_TK.contiguous(),
        load_E.contiguous(),
        counters,
        length,
    )


@_fake("router_balance")
def _empty_balance(score_TE: Tensor, chosen_TK: Tensor, size: int) -> tuple[Tensor, Tensor]:
    T, E = score_TE.shape
    return score_TE.new_empty(T // size), score_TE.new_empty(T // size, E)


@_implement("router_balance")
def _balance(score_TE: Tensor, chosen_TK: Tensor, size: int) -> tuple[Tensor, Tensor]:
    from expertmesh.kernels.router.balance import balance

    if chosen_TK.stride(1) != 1:
        chosen_TK = chosen_TK.contiguous()
    return balance(score_TE.contiguous(), chosen_TK, size)


@_fake("router_balance_backward")
def _empty_balance_backward(
    score_TE: Tensor, fraction_GE: Tensor, dproduct_G: Tensor, size: int
) -> Tensor:
    return torch.empty_like(score_TE, memory_format=torch.contiguous_format)


@_implement("router_balance_backward")
def _balance_backward(
    score_TE: Tensor, fraction_GE: Tensor, dproduct_G: Tensor, size: int
) -> Tensor:
    from expertmesh.kernels.router.balance import balance_backward

    given = (score_TE.contiguous(), fraction_GE.contiguous(), dproduct_G.contiguous())
    return balance_backward(*given, size)


@_fake("router_sums")
def _empty_sums(score_TE: Tensor, chosen_TK: Tensor) -> Tensor:
    return score_TE.new_empty(2 * score_TE.shape[1] + 1)


@_implement("router_sums")
def _sums(score_TE: Tensor, chosen_TK: Tensor) -> Tensor:
    from expertmesh.kernels.router.balance import sums

    if chosen_TK.stride(1) != 1:
        chosen_TK = chosen_TK.contiguous()
    return sums(score_TE.contiguous(), chosen_TK)


@_fake("router_z")
def _empty_z(logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    return logits_TE.new_empty(()), logits_TE.new_empty(logits_TE.shape[0])


@_implement("router_z")
def _z(logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    from expertmesh.kernels.router.z import mean_square_norm

    return mean_square_norm(logits_TE.contiguous())


@_fake("router_z_backward")
def _empty_z_backward(logits_TE: Tensor, norm_T: Tensor, dmean: Tensor) -> Tensor:
    return torch.empty_like(logits_TE, memory_format=torch.contiguous_format)


@_implement("router_z_backward")
def _z_backward(logits_TE: Tensor, norm_T: Tensor, dmean: Tensor) -> Tensor:
    from expertmesh.kernels.router.z import mean_square_norm_backward

    return mean_square_norm_backward(logits_TE.contiguous(), norm_T, dmean)
