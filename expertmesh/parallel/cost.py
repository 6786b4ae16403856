"""What one optimizer step costs a rank, by arithmetic: bytes in memory, bytes sent.

The formulas stand in the docstrings of ``memory`` and ``traffic``. They take experts to be equally
loaded, with the tokens' choices spread over all of them, and drop nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import comb, prod
from types import MappingProxyType

from expertmesh.kernels.cross_entropy.chunked import LOGITS_AT_ONCE
from expertmesh.models.config import DecoderConfig
from expertmesh.parallel.fake import FakeRank, Stored

_ID = 4  # bytes of an expert's id on its way
_COUNT = 4  # and of a number of rows
_NUMBER = 4  # bytes of a number of the optimizer
_COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "counts", "send")


@dataclass(frozen=True, kw_only=True)
class Work:
    """One rank's part of an optimizer step.

    Attributes:
        config: The model's shape.
        degrees: Of every axis of the mesh.
        per_rank: Pipeline stages of the rank.
        zero: ZeRO stage of all but the experts.
        expert_zero: That of the experts.
        rows: Sequences of one micro-batch that the rank computes.
        seq_len: S, their whole length.
        num_micro_batches: M of the step.
        wide: Bytes of a number between blocks, in norms and routers.
        narrow: Bytes of a number in matrix products: those of ``wide``, or 2 under autocast.
        recompute: Whether blocks are recomputed in backward.
        optimizer: Its name: ``"adamw"`` or ``"adafactor"``.
    """

    config: DecoderConfig
    degrees: dict[str, int]
    per_rank: int = 1
    zero: int = 2
    expert_zero: int = 2
    rows: int
    seq_len: int
    num_micro_batches: int = 1
    wide: int = 4
    narrow: int = 4
    recompute: bool = False
    optimizer: str = "adamw"

    @property
    def slice_len(self) -> int:
        """Positions of a sequence that the rank's attention computes: ``ceil(S / cp)``."""
        return -(-self.seq_len // self.degrees["cp"])

    @property
    def num_tokens(self) -> int:
        """T of a micro-batch, outside attention: ``rows * ceil(slice / tp)``."""
        return self.rows * -(-self.slice_len // self.degrees["tp"])

    @property
    def expert_ranks(self) -> int:
        """P, the ranks among which tokens are exchanged."""
        return self.degrees["ep"] * self.degrees["etp"]

    @property
    def rows_per_token(self) -> float:
        """Ranks that a token goes to, the mean over all choices of K of the E experts.

        ``etp * ep * (1 - C(E - E/ep, K) / C(E, K))``: a token goes once to each rank that holds
        one of its experts, and to every slice of them.
        """
        num_experts, k, ep = (
            self.config.num_experts,
            self.config.experts_per_token,
            self.degrees["ep"],
        )
        missed = comb(num_experts - num_experts // ep, k) / comb(num_experts, k)
        return self.degrees["etp"] * ep * (1.0 - missed)

    def is_rounded_first(self, parameter: Stored) -> bool:
        """Whether it is rounded to what autocast is on with before it is gathered.

        So are experts of which other ranks hold copies; see ``parallelize``.
        """
        return self.narrow < self.wide and parameter.expert and parameter.ranks > 1

    def stage_of(self, parameter: Stored) -> int:
        """The ZeRO stage that holds for a parameter."""
        return self.expert_zero if parameter.expert else self.zero


def memory(rank: FakeRank, work: Work) -> dict[str, int]:
    """Bytes that a rank needs, at their largest, by purpose.

    - ``parameters``: the rank's pieces. They are float32 and are the masters: autocast rounds
      them for the products.
    - ``gathered``: pieces of others beside its own. In ZeRO stages 1 and 2 all of them, in stage 3
      those of the two largest blocks, one at work and one on its way. What is rounded before it is
      gathered lies there whole, ``narrow / wide`` of it.
    - ``rounded``: under autocast, ``narrow / wide`` of the other parameters, whole, for every
      micro-batch in flight, or with recomputation of the largest block.
    - ``gradients``: in stage 0 and 1 whole, in 2 and 3 the pieces and the largest block's whole.
    - ``optimizer``: of AdamW two moments of every piece. Of Adafactor the second alone: of a matrix
      the means of its rows and of its columns, whole on every rank, of a vector that of the piece.
    - ``activations``: see ``activations``.
    """
    whole = dict.fromkeys(_units(rank), 0)
    for parameter in rank.parameters:
        if not work.is_rounded_first(parameter):
            whole[_block_of(parameter)] += parameter.gathered
    held = sum(parameter.held for parameter in rank.parameters)
    rounded = 0
    if work.narrow < work.wide:
        passes = 1 if work.recompute else in_flight(rank, work) / work.per_rank
        each = max(whole.values()) if work.recompute else sum(whole.values())
        rounded = int(passes * each * work.narrow / work.wide)
    return {
        "parameters": held,
        "gathered": _gathered(rank, work),
        "rounded": rounded,
        "gradients": _gradients(rank, work),
        "optimizer": sum(map(_STATES[work.optimizer], rank.parameters)),
        "activations": activations(rank, work),
    }


def in_flight(rank: FakeRank, work: Work) -> int:
    """Forward passes of this rank's stages that wait for their backward pass, at most.

    For pipeline rank r ``pp - r`` with 1F1B, and M with fewer micro-batches than ranks, which go
    through GPipe. Interleaved with v stages of each rank, and rounds of m micro-batches, where
    ``m = M / max(1, M // pp)``, they are ``min(v M, (v - 1) m + 2 (pp - r - 1) + 1)``.
    """
    pp, place = work.degrees["pp"], rank.coordinates["pp"]
    stages, num_micro_batches = work.per_rank, work.num_micro_batches
    if stages == 1:
        return num_micro_batches if num_micro_batches < pp else pp - place
    round_size = num_micro_batches // max(1, num_micro_batches // pp)
    return min(stages * num_micro_batches, (stages - 1) * round_size + 2 * (pp - place - 1) + 1)


def activations(rank: FakeRank, work: Work) -> int:
    """Bytes that forward passes keep for backward, without scores of attention.

    For a token, with w bytes of a wide and n of a narrow number; what a norm gives is narrow, and
    kept once for all products that read it:

    - norms: ``2 D w`` each (input and quotient; fused norms of GPUs need half);
    - attention: ``tp D n``; n for each number of queries, keys, values (of all slices) and output,
      the latter in two layouts;
    - dense MLP of P parts, 2 or doubly gated 3: ``D n + 2 P F n``;
    - MoE: ``D w + 2 E w`` of the router, ``r D n`` of dispatched rows, where a token has r
      (``Work.rows_per_token``), ``P K F n`` before the activation, ``36 r K`` of weights, ids and
      places, and a shared MLP as a dense one; an extra MLP with its norm. What is the same tensor,
      the router's input where nothing is rounded and the rows on one rank, counts once;
    - after the last norm: ``D w``, the gradient that the loss keeps, for one micro-batch, and
      ``w + n`` for each of the logits that live at a time. The output weight's gradient, whole
      from the forward pass on, is among the gradients of ``memory``.

    With recomputation blocks keep their input, ``D w``, and one of them the rest.
    """
    per_block = [_block(work, block) for block in rank.blocks]
    passes = in_flight(rank, work) / work.per_rank
    dim, wide = work.config.dim, work.wide
    if work.recompute:
        kept = passes * dim * wide * len(per_block) + max(per_block)
    else:
        kept = passes * sum(per_block)
    logits = 0
    if work.config.num_layers - 1 in rank.blocks:
        kept += 3 * dim * wide
        logits = min(LOGITS_AT_ONCE, work.num_tokens * work.config.vocab_size)
    return int(work.num_tokens * kept) + logits * (wide + work.narrow)


def traffic(rank: FakeRank, work: Work) -> dict[str, int]:
    """Bytes that leave a rank in one optimizer step, by collective.

    A ring's bytes are counted for all-gather and reduce-scatter, ``(n - 1)`` pieces, and for
    all-reduce, twice as many. M is the number of micro-batches; statistics of routing, which are
    small, are left out.

    - ``all-gather`` of parameters: once in a step in ZeRO stages 1 and 2, and ``2 M`` times in 3,
      where they are rounded first as narrow numbers; of attention's input over ``tp`` and of keys
      and values over ``cp``.
    - ``reduce-scatter`` of gradients: once in stage 1, M times in 2 and 3; of attention's output
      over ``tp``, and of gradients of what was gathered.
    - ``all-reduce`` of gradients in stage 0; of the norm over all heads under ``tp``; over a
      stage, of Adafactor's sums by row and column and two more numbers of each parameter.
    - ``all-to-all``, for every MoE block and micro-batch: ``(P - 1) / P`` of ``r T`` rows leave,
      with ``D n + (w + 4) K`` bytes, and as many return with ``D n``; their gradients have the
      same but for 4 K bytes of ids. A row's numbers are what the experts compute in.
    - ``counts`` of rows, before each of them: ``4 (P - 1)`` bytes.
    - ``send``: activations to the next stage and gradients to the one before.

    Recomputed blocks communicate in forward a second time.
    """
    sent = dict.fromkeys(_COLLECTIVES, 0.0)
    for parameter in rank.parameters:
        _add(sent, _synchronised(parameter, work))
    forwards = 2 if work.recompute else 1
    for block in rank.blocks:
        _add(sent, _attention(work, forwards), work.num_micro_batches)
        if work.config.is_moe(block):
            sent["all-to-all"] += work.num_micro_batches * _exchanged(work, forwards)
            counts = _COUNT * (work.expert_ranks - 1)
            sent["counts"] += work.num_micro_batches * forwards * counts
    sent["send"] += work.num_micro_batches * _between_stages(rank, work)
    if work.optimizer == "adafactor":
        sent["all-reduce"] += _statistics(rank, work)
    return {name: round(num_bytes) for name, num_bytes in sent.items()}


def _two_moments(parameter: Stored) -> int:
    return 2 * parameter.held


def _factored_moment(parameter: Stored) -> int:
    return _NUMBER * _factors(parameter) or parameter.held


_STATES: Mapping[str, Callable[[Stored], int]] = MappingProxyType(
    {"adamw": _two_moments, "adafactor": _factored_moment}
)


def _factors(parameter: Stored) -> int:
    """Numbers of rows and columns, of all matrices of a stack; a vector has none."""
    if len(parameter.shape) < 2:
        return 0
    *stack, rows, columns = parameter.shape
    return prod(stack) * (rows + columns)


def _statistics(rank: FakeRank, work: Work) -> float:
    """What Adafactor sums in a step."""
    size = prod(work.degrees[axis] for axis in ("dp", "cp", "tp"))
    summed = sum(_factors(parameter) + 2 for parameter in rank.parameters)
    return 2 * (size - 1) / size * _NUMBER * summed


def _gathered(rank: FakeRank, work: Work) -> int:
    always, regathered = 0, dict.fromkeys(_units(rank), 0)
    for parameter in rank.parameters:
        others = parameter.gathered - parameter.held
        if work.is_rounded_first(parameter):
            others = parameter.gathered * work.narrow // work.wide
        if work.stage_of(parameter) == 3:
            regathered[_block_of(parameter)] += others
        else:
            always += others
    return always + sum(sorted(regathered.values())[-2:])


def _gradients(rank: FakeRank, work: Work) -> int:
    always, passing = 0, dict.fromkeys(_units(rank), 0)
    for parameter in rank.parameters:
        if work.stage_of(parameter) < 2 or parameter.ranks == 1:
            always += parameter.gathered
        else:
            always += parameter.held
            passing[_block_of(parameter)] += parameter.gathered
    return always + max(passing.values())


def _synchronised(parameter: Stored, work: Work) -> dict[str, float]:
    """What the storage of one parameter sends in a step."""
    stage, others = work.stage_of(parameter), parameter.ranks - 1
    if stage == 0:
        return {"all-reduce": 2 * others * parameter.held / parameter.ranks}
    pieces = others * parameter.held
    gathers: float = 2 * work.num_micro_batches if stage == 3 else 1
    if work.is_rounded_first(parameter):
        gathers *= work.narrow / work.wide
    sums = 1 if stage == 1 else work.num_micro_batches
    return {"all-gather": gathers * pieces, "reduce-scatter": sums * pieces}


def _attention(work: Work, forwards: int) -> dict[str, float]:
    """What one block's attention sends for one micro-batch."""
    config, tp, cp = work.config, work.degrees["tp"], work.degrees["cp"]
    own, whole = work.num_tokens, work.rows * work.slice_len
    rows = (tp - 1) * own * config.dim * work.narrow
    keys = (cp - 1) * whole * _key_values(config) // tp * work.narrow
    sent: dict[str, float] = {
        "all-gather": forwards * (rows + keys) + rows,
        "reduce-scatter": forwards * rows + rows + keys,
    }
    if config.attention == "gqa" and config.qk_norm == "full":
        squares = 2 * whole * work.wide
        sent["all-reduce"] = (forwards + 1) * 2 * (tp - 1) / tp * squares
    return sent


def _exchanged(work: Work, forwards: int) -> float:
    """What one MoE block sends for one micro-batch over the expert ranks."""
    ranks, k = work.expert_ranks, work.config.experts_per_token
    leaving = work.num_tokens * work.rows_per_token * (ranks - 1) / ranks
    row = work.config.dim * work.narrow
    forward = 2 * row + k * (work.wide + _ID)
    backward = 2 * row + k * work.wide
    return leaving * (forwards * forward + backward)


def _between_stages(rank: FakeRank, work: Work) -> int:
    """Activations to the next stages and gradients to those before, for one micro-batch."""
    place, pp = rank.coordinates["pp"], work.degrees["pp"]
    hidden = work.num_tokens * work.config.dim * work.wide
    onward = work.per_rank - (place == pp - 1)
    back = work.per_rank - (place == 0)
    return (onward + back) * hidden


def _block(work: Work, block: int) -> float:
    """Bytes that one block keeps of one token."""
    config, wide, narrow = work.config, work.wide, work.narrow
    dim = config.dim
    kept: float = 4 * dim * wide + work.degrees["tp"] * dim * narrow
    kept += _attended(config, work.degrees["cp"]) * narrow
    parts = {"gated": 2, "doubly_gated": 3}[config.mlp]
    dense = dim * narrow + 2 * parts * (config.dense_hidden or 0) * narrow
    if not config.is_moe(block):
        return kept + dense
    if config.extra_mlp:
        kept += 2 * dim * wide + dense
    rows, k = work.rows_per_token, config.experts_per_token
    kept += dim * wide + 2 * config.num_experts * wide
    kept += parts * k * config.expert_hidden * narrow + 36 * rows * k
    kept += 2 * parts * config.num_shared_experts * config.expert_hidden * narrow
    if work.expert_ranks > 1:
        kept += rows * dim * narrow
    # The norm's output: on one rank it is the rows, and without rounding what the router keeps.
    if narrow < wide and (work.expert_ranks == 1 or config.num_shared_experts):
        kept += dim * narrow
    return kept


def _attended(config: DecoderConfig, slices: int) -> int:
    """Numbers of queries, keys, values and output that attention keeps of a token."""
    if config.attention == "mla":
        key = (config.qk_nope_head_dim or 0) + (config.qk_rope_head_dim or 0)
        value = config.v_head_dim or 0
        latent = (config.q_lora_rank or 0) + (config.kv_lora_rank or 0)
        return config.num_heads * (key + 2 * value + slices * (key + value)) + 3 * latent
    normed = 0 if config.qk_norm == "none" else config.num_heads + config.kv_heads
    heads = 3 * config.num_heads + 2 * slices * config.kv_heads + 3 * normed
    return heads * config.head_width


def _key_values(config: DecoderConfig) -> int:
    """Numbers of keys and values of a token, in all heads."""
    if config.attention == "mla":
        key = (config.qk_nope_head_dim or 0) + (config.qk_rope_head_dim or 0)
        return config.num_heads * (key + (config.v_head_dim or 0))
    return 2 * config.kv_heads * config.head_width


def _units(rank: FakeRank) -> set[str]:
    return {_block_of(parameter) for parameter in rank.parameters}


def _block_of(parameter: Stored) -> str:
    """The block that a parameter is in, or nothing for those outside."""
    parts = parameter.name.split(".")
    return ".".join(parts[:2]) if parts[0] == "blocks" else ""


def _add(total: dict[str, float], more: dict[str, float], times: int = 1) -> None:
    for name, num_bytes in more.items():
        total[name] += times * num_bytes
