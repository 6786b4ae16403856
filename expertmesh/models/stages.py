"""Cutting a decoder into the stages of a pipeline."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from expertmesh.errors import UserError
from expertmesh.models import counts
from expertmesh.models.config import DecoderConfig
from expertmesh.models.decoder import DecoderLM


@dataclass(frozen=True)
class Stages:
    """Which blocks make up each stage, and which rank holds which stages.

    With one stage per rank the schedule is 1F1B; with several, rank ``r`` of ``n`` holds the
    stages ``r``, ``r + n``, ... and the schedule is interleaved (Narayanan et al., 2021,
    arXiv 2104.04473), which makes the bubble as many times smaller and sends as many times more.

    Attributes:
        blocks: The blocks of each stage. The first stage has the embedding too, the last one the
            last norm and the output layer.
        ranks: Ranks of the pipeline.
    """

    blocks: tuple[range, ...]
    ranks: int

    @staticmethod
    def of(
        config: DecoderConfig,
        ranks: int,
        *,
        per_rank: int = 1,
        layers: Sequence[int] | None = None,
    ) -> "Stages":
        """Cut a model.

        Args:
            config: The model's shape.
            ranks: Ranks of the pipeline.
            per_rank: Stages of each rank.
            layers: Number of blocks of each stage. None makes the slowest stage as fast as can
                be, counting the weights that a token is multiplied with, the output layer's too.

        Raises:
            UserError: If the model cannot be cut so.
        """
        for name, value in (("ranks", ranks), ("per_rank", per_rank)):
            if value < 1:
                raise UserError(f"{name} must be at least 1, got {value}; set {name} = 1")
        num_stages = ranks * per_rank
        if num_stages > config.num_layers:
            raise UserError(
                f"every stage needs a block, got {num_stages} stages for num_layers="
                f"{config.num_layers}; set at most {config.num_layers} stages"
            )
        if num_stages > 1 and config.tied_embeddings:
            raise UserError(
                "tied_embeddings ties the first stage's embedding to the last stage's output, "
                f"which are on different ranks with {num_stages} stages; set "
                "model.tied_embeddings = false, or one stage"
            )
        sizes = _balanced(config, num_stages) if layers is None else list(layers)
        if len(sizes) != num_stages or min(sizes) < 1 or sum(sizes) != config.num_layers:
            raise UserError(
                f"layers must be {num_stages} numbers from 1 on that add up to num_layers="
                f"{config.num_layers}, got {sizes}; for example {_balanced(config, num_stages)}"
            )
        starts = [sum(sizes[:stage]) for stage in range(num_stages + 1)]
        blocks = tuple(range(a, b) for a, b in itertools.pairwise(starts))
        return Stages(blocks, ranks)

    @property
    def num_stages(self) -> int:
        """Stages of the whole pipeline."""
        return len(self.blocks)

    @property
    def per_rank(self) -> int:
        """Stages of each rank."""
        return len(self.blocks) // self.ranks

    def of_rank(self, rank: int) -> tuple[int, ...]:
        """The stages that a rank of the pipeline holds, in order."""
        return tuple(range(rank, self.num_stages, self.ranks))


def keep_stages(model: DecoderLM, stages: Stages, rank: int) -> DecoderLM:
    """Leave a model only what one rank of the pipeline holds, in place.

    What stays keeps its name (``blocks.7.attention.q.weight``), and with it its initial values and
    its place in checkpoints. Cut before the model gets memory: on the meta device.

    Args:
        model: The whole model; afterwards run by ``model.part``.
        stages: The cut.
        rank: The rank's place in the pipeline.

    Returns:
        ``model``.
    """
    own = stages.of_rank(rank)
    kept = {block for stage in own for block in stages.blocks[stage]}
    for block in set(range(model.config.num_layers)) - kept:
        # Not `del model.blocks[block]`, which would give the blocks after it new numbers.
        delattr(model.blocks, str(block))
    if 0 not in own:
        del model.embedding
        model.positions = None
    if stages.num_stages - 1 not in own:
        del model.norm
        model.head = None
    model.pipeline_ranks = stages.ranks
    return model


def _balanced(config: DecoderConfig, num_stages: int) -> list[int]:
    """Numbers of blocks with the least cost of the most costly stage.

    Where several cuts are as good, later stages get more: earlier ones hold the activations of
    more micro-batches at a time.
    """
    cost = [counts.block_matrices(config, block) for block in range(config.num_layers)]
    cost[-1] += config.vocab_size * config.dim
    before = [sum(cost[:block]) for block in range(len(cost) + 1)]
    # least[s][b]: over all ways to cut blocks from b on into s stages, that of the costliest.
    least = [[math.inf] * len(before) for _ in range(num_stages + 1)]
    least[0][len(cost)] = 0.0
    for stage in range(1, num_stages + 1):
        for start in range(len(cost)):
            least[stage][start] = min(
                max(before[end] - before[start], least[stage - 1][end])
                for end in range(start + 1, len(before))
            )
    sizes, start = [], 0
    for left in range(num_stages, 0, -1):
        end = min(
            end
            for end in range(start + 1, len(before))
            if max(before[end] - before[start], least[left - 1][end]) <= least[num_stages][0]
        )
        sizes.append(end - start)
        start = end
    return sizes
