"""One expert after another, all of its steps while its rows are in the cache.

The whole expert computation is one autograd function that saves x and the pre-activation, and
nothing after it: the hidden units are recomputed in backward, and the gradient of the combine
weights needs no output rows, since <dy, down h> = <down' dy, h> (SonicMoE, arXiv 2512.14080).
Rows pass in blocks that fit the second-level cache, and big buffers are few, because a fresh
page costs more than the arithmetic on it.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from expertmesh.kernels.activations import hidden_units, hidden_units_vjp
from expertmesh.kernels.backends import Problem
from expertmesh.kernels.dtypes import cast, without_autocast
from expertmesh.kernels.first_order import first_order
from expertmesh.kernels.grouped_gemm import LoopGemm
from expertmesh.kernels.grouped_gemm.matmul import matmul_transposed, row_multiple
from expertmesh.kernels.grouping import Grouping, combine_zeroed, group_by_expert
from expertmesh.kernels.moe_mlp.dropout import dropped, dropped_vjp
from expertmesh.kernels.moe_mlp.grouped import run_grouped
from expertmesh.kernels.moe_mlp.problem import MLPBackend, MLPOperands, MLPSpec

_BLOCK_ROWS = 1024


class LoopMLP(MLPBackend):
    """Every device and dtype. Reads the row counts on the host once per forward."""

    name: ClassVar[str] = "loop"
    summary: ClassVar[str] = "expert by expert in one autograd function; any dtype, float64 too"

    def refusal(self, problem: Problem) -> str | None:
        return "its row counts are read on the host" if problem.capturing else None

    def suits(self, problem: Problem) -> bool:
        return True

    def run(self, operands: MLPOperands, spec: MLPSpec) -> Tensor:
        if torch.compiler.is_compiling() or operands.x_RD.is_meta:
            return run_grouped(operands, spec, LoopGemm())
        grouping = group_by_expert(operands.expert_RK, operands.num_experts)
        keep = operands.needs_grad
        return _LoopFunction.apply(*operands.differentiable, operands.draw_R, grouping, spec, keep)


class _Block(NamedTuple):
    """Rows of one expert, by grouped position."""

    expert: int
    start: int
    stop: int
    first: bool


def _blocks(offsets_E: Tensor, dtype: torch.dtype) -> list[_Block]:
    # A weight's gradient is summed over the blocks in its own dtype: narrow ones are not split.
    size = _BLOCK_ROWS if dtype in (torch.float32, torch.float64) else None
    blocks, start = [], 0
    for expert, stop in enumerate(offsets_E.tolist()):
        for begin in range(start, stop, size or max(1, stop - start)):
            blocks.append(_Block(expert, begin, min(stop, begin + (size or stop)), begin == start))
        start = stop
    return blocks


def _take(x_RD: Tensor, row_B: Tensor) -> Tensor:
    """Rows of x, then rows of zeros up to a multiple that the products like.

    Zeros give nothing to weight gradients, and what they give elsewhere is cut off.
    """
    multiple = row_multiple(x_RD.dtype, x_RD.device)
    count = len(row_B)
    if count % multiple == 0:
        return x_RD.index_select(0, row_B)
    x_BD = x_RD.new_empty(-(-count // multiple) * multiple, x_RD.shape[1])
    torch.index_select(x_RD, 0, row_B, out=x_BD[:count])
    x_BD[count:].zero_()
    return x_BD


def _rows_by_position(x_RD: Tensor, num_rows: int, blocks: list[_Block]) -> Tensor:
    """A buffer of x's width for the blocks to fill; the rows of sentinels, past them, are zero."""
    rows_ND = x_RD.new_empty(num_rows, x_RD.shape[1])
    rows_ND[blocks[-1].stop if blocks else 0 :].zero_()
    return rows_ND


def _factor(
    spec: MLPSpec, draw_R: Tensor | None, row_B: Tensor, expert: int, hidden_BF: Tensor
) -> Tensor | None:
    """What dropout multiplies a block's hidden units by."""
    if spec.dropout is None or draw_R is None:
        return None
    return spec.dropout.factor(draw_R[row_B], expert, hidden_BF)


def _add(bias_EO: Tensor | None, expert: int, y_NO: Tensor) -> Tensor:
    return y_NO if bias_EO is None else y_NO.add_(bias_EO[expert])


class _LoopFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        weight_RK: Tensor,
        up_EHD: Tensor,
        down_EDF: Tensor,
        up_bias_EH: Tensor | None,
        down_bias_ED: Tensor | None,
        draw_R: Tensor | None,
        grouping: Grouping,
        spec: MLPSpec,
        keep: bool,
    ) -> Tensor:
        row_N, ups, downs = grouping.row_N, up_EHD.unbind(0), down_EDF.unbind(0)
        blocks = _blocks(grouping.offsets_E, x_RD.dtype)
        pre_blocks = []
        out_ND = _rows_by_position(x_RD, len(row_N), blocks)
        for expert, start, stop, _ in blocks:
            x_BD = _take(x_RD, row_N[start:stop])
            pre_BH = _add(up_bias_EH, expert, matmul_transposed(x_BD, ups[expert]))
            hidden_BF = hidden_units(spec.activation, pre_BH, spec.num_parts)
            factor_BF = _factor(spec, draw_R, row_N[start:stop], expert, hidden_BF)
            hidden_BF = dropped(hidden_BF, factor_BF)
            out_BD = matmul_transposed(hidden_BF, downs[expert])
            out_ND[start:stop] = _add(down_bias_ED, expert, out_BD)[: stop - start]
            if keep:
                pre_blocks.append(pre_BH)
        ctx.spec, ctx.blocks = spec, blocks
        ctx.save_for_backward(
            x_RD, weight_RK, up_EHD, down_EDF, down_bias_ED, draw_R, *grouping, *pre_blocks
        )
        return cast(combine_zeroed(out_ND, grouping, weight_RK, spec.sum_dtype), spec.out_dtype)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor | None, ...]:
        operands, grouping, pre_blocks = _unpack(ctx.saved_tensors)
        with without_autocast(dy_RD.device.type):
            gradient = _Gradient(operands, grouping, ctx)
            dy_RD = dy_RD.to(gradient.x_RD.dtype)
            for block, pre_BH in zip(ctx.blocks, pre_blocks, strict=True):
                gradient.add(block, pre_BH, dy_RD)
            return (*gradient.finish(), None, None, None, None)


def _unpack(saved: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Grouping, Sequence[Tensor]]:
    # Reading saved_tensors twice would recompute twice under activation checkpointing.
    operands, rest = tuple(saved[:6]), saved[6:]
    split = len(Grouping._fields)
    return operands, Grouping(*rest[:split]), rest[split:]


class _Gradient:
    """The gradients being filled, block by block; only those that are wanted."""

    def __init__(self, operands: tuple[Tensor, ...], grouping: Grouping, ctx: Any) -> None:
        x_RD, weight_RK, up_EHD, down_EDF, down_bias_ED, self.draw_R = operands
        self.grouping = grouping
        self.spec: MLPSpec = ctx.spec
        self.x_RD, self.ups, self.downs = x_RD, up_EHD.unbind(0), down_EDF.unbind(0)
        self.down_bias_ED = down_bias_ED
        self.row_N = self.grouping.row_N
        self.weight_N1 = weight_RK.reshape(-1)[self.grouping.order_N].unsqueeze(1)
        wants_x, wants_weight, wants_up, wants_down, wants_up_bias, wants_down_bias = (
            ctx.needs_input_grad[:6]
        )
        num_rows, dtype = len(self.row_N), self.spec.sum_dtype
        idle = [e for e, count in enumerate(_counts(ctx.blocks, len(up_EHD))) if count == 0]
        self.dx_ND = _rows_by_position(x_RD, num_rows, ctx.blocks) if wants_x else None
        self.dweight_N = weight_RK.new_empty(num_rows, dtype=dtype) if wants_weight else None
        self.dup_EHD = _buffer(up_EHD, idle) if wants_up else None
        self.ddown_EDF = _buffer(down_EDF, idle) if wants_down else None
        self.dup_bias_EH = up_EHD.new_zeros(up_EHD.shape[:2]) if wants_up_bias else None
        self.ddown_bias_ED = down_EDF.new_zeros(down_EDF.shape[:2]) if wants_down_bias else None
        self.wants_pre = wants_x or wants_up or wants_up_bias

    def add(self, block: _Block, pre_BH: Tensor, dy_RD: Tensor) -> None:
        """Take in one block's share."""
        expert, start, stop, first = block
        rows = slice(start, stop)
        dy_BD = _take(dy_RD, self.row_N[rows])
        spec = self.spec
        hidden = hidden_units_vjp(spec.activation, pre_BH, spec.num_parts)
        factor_BF = _factor(spec, self.draw_R, self.row_N[rows], expert, hidden.hidden)
        hidden_BF, pre_gradient = dropped_vjp(hidden, factor_BF)
        dhidden_BF = None
        if self.wants_pre or self.dweight_N is not None:
            dhidden_BF = matmul_transposed(dy_BD, self.downs[expert].t())
        if self.dweight_N is not None and dhidden_BF is not None:
            dtype = self.spec.sum_dtype
            share_B = torch.linalg.vecdot(dhidden_BF.to(dtype), hidden_BF.to(dtype))
            if self.down_bias_ED is not None:
                share_B = share_B + dy_BD.to(dtype) @ self.down_bias_ED[expert].to(dtype)
            self.dweight_N[rows] = share_B[: stop - start]
        dy_BD[: stop - start].mul_(self.weight_N1[rows])
        if self.ddown_EDF is not None:
            _accumulate(self.ddown_EDF[expert], dy_BD, hidden_BF, first)
        if self.ddown_bias_ED is not None:
            self.ddown_bias_ED[expert] += dy_BD.sum(0)
        if self.wants_pre and dhidden_BF is not None:
            dhidden_BF[: stop - start].mul_(self.weight_N1[rows])
            self._add_pre(block, pre_gradient(dhidden_BF))

    def _add_pre(self, block: _Block, dpre_BH: Tensor) -> None:
        expert, start, stop, first = block
        if self.dx_ND is not None:
            dx_BD = matmul_transposed(dpre_BH, self.ups[expert].t())
            self.dx_ND[start:stop] = dx_BD[: stop - start]
        if self.dup_EHD is not None:
            x_BD = _take(self.x_RD, self.row_N[start:stop])
            _accumulate(self.dup_EHD[expert], dpre_BH, x_BD, first)
        if self.dup_bias_EH is not None:
            self.dup_bias_EH[expert] += dpre_BH.sum(0)

    def finish(self) -> tuple[Tensor | None, ...]:
        """Bring what lies by grouped position back to rows; in the order of ``forward``."""
        dx_RD, dweight_RK = None, None
        if self.dx_ND is not None:
            dx_RD = combine_zeroed(self.dx_ND, self.grouping, None, self.spec.sum_dtype)
            dx_RD = dx_RD.to(self.x_RD.dtype)
        if self.dweight_N is not None:
            dweight_RK = self.dweight_N[self.grouping.inverse_RK]
            dweight_RK = dweight_RK.masked_fill_(~self.grouping.valid_RK, 0)
            dweight_RK = dweight_RK.to(self.weight_N1.dtype)
        matrices = (self.dup_EHD, self.ddown_EDF, self.dup_bias_EH, self.ddown_bias_ED)
        return (dx_RD, dweight_RK, *matrices)


def _counts(blocks: list[_Block], num_experts: int) -> list[int]:
    counts = [0] * num_experts
    for expert, start, stop, _ in blocks:
        counts[expert] += stop - start
    return counts


def _buffer(parameter: Tensor, idle: list[int]) -> Tensor:
    """A gradient whose idle experts are zero; the others are written by their first block."""
    gradient = torch.empty_like(parameter, memory_format=torch.contiguous_format)
    for expert in idle:
        gradient[expert].zero_()
    return gradient


def _accumulate(gradient_IO: Tensor, a_BI: Tensor, b_BO: Tensor, first: bool) -> None:
    # oneDNN copies the left operand to have it contiguous, so the narrower one goes there.
    if a_BI.shape[1] <= b_BO.shape[1]:
        product_IO = matmul_transposed(a_BI.t(), b_BO.t())
    else:
        product_IO = matmul_transposed(b_BO.t(), a_BI.t()).t()
    if first:
        gradient_IO.copy_(product_IO)
    else:
        gradient_IO.add_(product_IO)
