"""Pipeline parallelism: torch's schedules over the stages of a decoder.

A step's micro-batches flow through the stages, each with its own padding, noise and share of the
balance losses, and the gradients of all of them add up as those of one large batch would. Nothing
is scaled by the number of micro-batches: each brings its part of the step's one loss.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.pipelining.schedules import Schedule1F1B, _PipelineSchedule

from expertmesh.dispatch.collectives import Group
from expertmesh.errors import UserError
from expertmesh.models.decoder import DecoderLM, OutputLayer
from expertmesh.models.stages import Stages
from expertmesh.parallel.fsdp import gradient_sync


@dataclass(frozen=True)
class Piece:
    """One micro-batch, as every rank of the pipeline is given it.

    Attributes:
        tokens_BS: As for ``DecoderLM.forward``.
        loss: Hidden states after the last norm and the output's weight to this micro-batch's part
            of the step's loss, a scalar in float32 or wider: the sum over its target tokens
            divided by the number of them in the whole step. Called on the last stage.
        share: What multiplies the balance losses: its part of the step's tokens.
        arguments: ``padding_mask``, ``key`` and ``cache`` for ``DecoderLM.part``.
    """

    tokens_BS: Tensor
    loss: OutputLayer
    share: float = 1.0
    arguments: Mapping[str, Any] = field(default_factory=dict)


class Pipeline:
    """This rank's stages of a model, and their place in the schedule.

    Expert, data, context and tensor parallel work inside the stages.

    Args:
        model: A decoder of which ``keep_stages`` left this rank's part, wrapped or sharded as it
            may be since.
        stages: The cut.
        group: The ranks that hold the stages, in order (``mesh.group("pp")``).
        autocast: Makes the context of every forward pass, the loss's too.
        dtype: Of the activations between stages; None is that of the parameters.

    Raises:
        UserError: If the group does not have one rank for each of the pipeline's.
    """

    def __init__(
        self,
        model: DecoderLM,
        stages: Stages,
        group: Group,
        *,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        dtype: torch.dtype | None = None,
    ) -> None:
        if group.size != stages.ranks or group.size < 2:
            raise UserError(
                f"a pipeline needs two ranks or more, as many as the stages were cut for "
                f"({stages.ranks}), got a group of {group.size}; set mesh.pp"
            )
        # Else a sharded model would not gather its parameters for this method.
        register_fsdp_forward_method(model, "part")
        parameter = next(model.parameters())
        self.model = model
        self.stages = stages
        self.group = group
        self.device = parameter.device
        self.dtype = parameter.dtype if dtype is None else dtype
        self.autocast = autocast
        self._plans: dict[bool, _Plan] = {}

    def step(self, pieces: Sequence[Piece], *, scale: float = 1.0) -> Tensor:
        """Forward and backward of a step's micro-batches; their gradients are added.

        Args:
            pieces: The micro-batches, the same on all ranks of the pipeline, of one shape. As many
                as there are ranks or more keep all ranks busy.
            scale: Multiplies every gradient (the loss scale of float16).

        Returns:
            The step's loss where the last stage is, without ``scale``; 0 elsewhere. So a sum over
            ranks counts it once.

        Raises:
            UserError: If shapes differ, or interleaved stages cannot share the number evenly.
                Each rank compares its own shapes; ``ThroughPipeline`` looks at those of all ranks.
            ValueError: That a stage of this rank raised.
        """
        return self._run(pieces, scale, train=True)

    @torch.no_grad()
    def evaluate(self, piece: Piece) -> Tensor:
        """The loss of one micro-batch as ``step`` returns it, without gradients.

        One at a time, for a split's last batch is often of another shape, on some data ranks only:
        all must take stages and micro-batches in one order.
        """
        return self._run([piece], 1.0, train=False)

    def _run(self, pieces: Sequence[Piece], scale: float, *, train: bool) -> Tensor:
        self._check(pieces)
        tokens_BS = self.model.own_part(pieces[0].tokens_BS, 1)
        shape = (*tokens_BS.shape, self.model.config.dim)
        plan = self._plans.get(train)
        if plan is None or (plan.num_pieces, plan.shape) != (len(pieces), shape):
            # The one before is dropped: a plan holds a buffer for every micro-batch.
            plan = self._plans[train] = _Plan(self, len(pieces), shape, train=train)
        return plan.run(pieces, scale)

    def _check(self, pieces: Sequence[Piece]) -> None:
        if not pieces:
            raise UserError("a step needs at least one micro-batch, got none")
        shapes = [tuple(piece.tokens_BS.shape) for piece in pieces]
        if len(set(shapes)) > 1:
            raise UserError(
                f"micro-batches of a pipeline must have one shape, got {sorted(set(shapes))}; set "
                "train.micro_batch so that it divides train.batch, and both to multiples of dp"
            )
        rounds = max(1, len(pieces) // self.group.size)
        if self.stages.per_rank > 1 and len(pieces) % rounds:
            raise UserError(
                f"interleaved stages take micro-batches in rounds of {self.group.size} or more, "
                f"got {len(pieces)}, which {rounds} rounds cannot share evenly; set a multiple of "
                f"mesh.pp={self.group.size}, or one stage per rank"
            )


class _Plan:
    """A schedule for so many micro-batches of one shape, with its buffers."""

    def __init__(
        self, pipeline: Pipeline, num_pieces: int, shape: tuple[int, ...], *, train: bool
    ) -> None:
        self.num_pieces = num_pieces
        self.shape = shape
        self._group = pipeline.group
        self._runners = [
            _StageRunner(pipeline, stage, num_pieces)
            for stage in pipeline.stages.of_rank(pipeline.group.index)
        ]
        hidden = torch.empty(shape, dtype=pipeline.dtype, device="meta", requires_grad=train)
        place = torch.zeros(1, dtype=torch.int64, device="meta")
        loss = torch.empty((), dtype=_wide(pipeline.dtype), device="meta", requires_grad=train)
        last = pipeline.stages.num_stages - 1
        torch_stages = [
            PipelineStage(
                runner,
                runner.stage,
                pipeline.stages.num_stages,
                pipeline.device,
                # Given, because torch would otherwise run the model once to learn them.
                input_args=(place if runner.stage == 0 else hidden,),
                output_args=(loss if runner.stage == last else hidden,),
                group=pipeline.group.process_group,
            )
            for runner in self._runners
        ]
        self._schedule = _schedule(torch_stages, num_pieces, train=train)

    def run(self, pieces: Sequence[Piece], scale: float) -> Tensor:
        for runner in self._runners:
            runner.begin(pieces, scale)
        # Which micro-batch a stage is to run is all that torch hands around; it is on the host.
        place_M = torch.arange(self.num_pieces, device="cpu")
        first = [place_M] if self._runners[0].stage == 0 else []
        last = self._runners[-1].is_last
        with _mistakes_as_they_were_said():
            self._schedule.step(
                *first, target=place_M if last else None, return_outputs=False, place=place_M
            )
        return self._runners[-1].end()


class _StageRunner(nn.Module):
    """What torch's schedule calls: one stage, told by number which micro-batch comes."""

    def __init__(self, pipeline: Pipeline, stage: int, num_pieces: int) -> None:
        super().__init__()
        self.stage = stage
        self.is_last = stage == pipeline.stages.num_stages - 1
        self._pipeline = pipeline
        self._num_pieces = num_pieces
        self._pieces: Sequence[Piece] = ()
        self._scale = 1.0
        self._losses: list[Tensor] = []
        self._dtype = _wide(pipeline.dtype)

    def begin(self, pieces: Sequence[Piece], scale: float) -> None:
        """Take a step's micro-batches."""
        self._pieces, self._scale, self._losses = pieces, scale, []

    def end(self) -> Tensor:
        """The sum of the losses since ``begin``, without the scale."""
        self._pieces = ()
        losses, self._losses = self._losses, []
        if not losses:
            return torch.zeros((), dtype=self._dtype, device=self._pipeline.device)
        return torch.stack(losses).sum()

    def forward(self, x: Tensor, place: Tensor) -> Tensor:
        """Args: the activations before this stage, and which micro-batch they are of."""
        pipeline, index = self._pipeline, int(place)
        piece = self._pieces[index]
        with pipeline.autocast():
            y = pipeline.model.part(
                pipeline.stages.blocks[self.stage],
                None if self.stage == 0 else x,
                piece.tokens_BS,
                loss_scale=self._scale * piece.share,
                output=piece.loss,
                **piece.arguments,
            )
        y = self._scaled(y) if self.is_last else self._sent(y)
        if y.requires_grad:
            y.register_hook(partial(self._before_backward, index == self._num_pieces - 1))
        self._count(x, y)
        return y

    def _scaled(self, loss: Tensor) -> Tensor:
        loss = loss.to(self._dtype)
        self._losses.append(loss.detach())
        return loss * self._scale

    def _sent(self, y_BSD: Tensor) -> Tensor:
        if y_BSD.dtype != self._pipeline.dtype:
            raise UserError(
                f"stage {self.stage} gives activations of {y_BSD.dtype}, and the next one expects "
                f"{self._pipeline.dtype}; set Pipeline's dtype = {y_BSD.dtype}"
            )
        return y_BSD.contiguous()

    def _before_backward(self, is_last: bool, _: Tensor) -> None:
        """Say which parameters get their last gradient of the step in this backward pass."""
        model, stages = self._pipeline.model, self._pipeline.stages
        # What lies outside the blocks takes part in every stage's pass. A rank's first stage has
        # the last one.
        is_first_stage = self.stage == stages.of_rank(self._pipeline.group.index)[0]
        gradient_sync(model, last=is_last and is_first_stage)
        for name, block in model.blocks.named_children():
            gradient_sync(block, last=is_last and int(name) in stages.blocks[self.stage])

    def _count(self, x: Tensor, y: Tensor) -> None:
        """Bytes sent onward now, and back in the backward pass to come."""
        traffic = self._pipeline.group.traffic
        if not self.is_last:
            traffic.add("p2p", y.numel() * y.element_size())
        if self.stage > 0 and x.requires_grad:
            traffic.add("p2p backward", x.numel() * x.element_size())


@contextmanager
def _mistakes_as_they_were_said() -> Iterator[None]:
    """torch makes a ``RuntimeError`` of whatever a stage raises; a mistake is raised as it was."""
    try:
        yield
        return
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, ValueError):
            cause = cause.__cause__
        if cause is None:
            raise
    raise cause


def _schedule(torch_stages: list[Any], num_pieces: int, *, train: bool) -> _PipelineSchedule:
    """torch's schedule over ``PipelineStage`` objects."""
    loss_fn = _already_a_loss if train else None
    if len(torch_stages) > 1:
        return ScheduleInterleaved1F1B(torch_stages, num_pieces, loss_fn, scale_grads=False)
    stage = torch_stages[0]
    if num_pieces < stage.num_stages or not train:
        # torch's 1F1B refuses fewer micro-batches than stages. GPipe keeps all of these, which late
        # stages would not need to, and without a backward pass nothing is kept.
        return ScheduleGPipe(stage, num_pieces, loss_fn, scale_grads=False)
    return Schedule1F1B(stage, num_pieces, loss_fn, scale_grads=False)


def _already_a_loss(output: Tensor, _: Tensor) -> Tensor:
    """The last stage gives the loss itself: logits need no buffer, and no shape to agree on."""
    return output


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Losses are in float32 or wider."""
    return torch.promote_types(dtype, torch.float32)
