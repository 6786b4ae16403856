"""Tools for tests: this project's, and yours."""

from expertmesh.testing.causality import is_causal
from expertmesh.testing.compare import assert_close, relative_error
from expertmesh.testing.ranks import RankError, RankPool, RankTimeout, run_on_ranks

__all__ = [
    "RankError",
    "RankPool",
    "RankTimeout",
    "assert_close",
    "is_causal",
    "relative_error",
    "run_on_ranks",
]
