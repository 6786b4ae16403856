"""Rows of the equivalence table: a layout against one process."""

import functools
from collections.abc import Sequence

from expertmesh.testing import run_on_ranks
from expertmesh.testing.equivalence import Observation, errors, join
from tests.distributed import training
from tests.distributed.layouts import Layout
from tests.distributed.settings import SETTINGS
from tests.distributed.training import FLOAT64, Numbers

LIMIT = 1e-10
"""Largest relative error in float64 that counts as rounding."""


@functools.cache
def reference(name: str, numbers: Numbers = FLOAT64) -> Observation:
    """The setting in this process."""
    return training.alone(name, numbers)


def compare(
    layout: Layout,
    names: Sequence[str],
    numbers: Numbers = FLOAT64,
    *,
    timeout: float = 240.0,
) -> dict[str, dict[str, float]]:
    """Relative errors of a layout, by setting and by what is compared."""
    by_rank = run_on_ranks(
        layout.world, training.on_rank, layout, list(names), numbers, timeout=timeout
    )
    found = {}
    for place, name in enumerate(names):
        seen = join([views[place] for views in by_rank], SETTINGS[name].num_tokens)
        found[name] = errors(seen, reference(name, numbers))
    return found


def suited(layout: Layout) -> list[str]:
    """The settings that can be laid out so."""
    return [name for name, setting in SETTINGS.items() if layout.suits(setting)]
