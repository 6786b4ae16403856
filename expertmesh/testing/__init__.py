"""Tools for tests: this project's, and yours."""

from expertmesh.testing.compare import assert_close, relative_error

__all__ = ["assert_close", "relative_error"]
