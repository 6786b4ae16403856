"""What goes wrong by a user's hand, and how it is said."""

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class UserError(ValueError):
    """A mistake the user can mend: the command line prints it without a traceback, exits with 2."""


class MissingDependency(UserError, ImportError):
    """An optional package was asked for and is not installed. The message is the pip command."""


class CausalityWarning(UserWarning):
    """A router in a causal decoder lets later tokens reach earlier ones."""


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional module.

    Args:
        module: Dotted name to import.
        extra: The extra of this package that installs it.

    Raises:
        MissingDependency: If it is not installed; the message holds the pip command.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        root = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != root:
            raise
        raise MissingDependency(
            f"{root} is needed here and is not installed; run: pip install 'expertmesh[{extra}]'"
        ) from None


def nearest(word: str, options: Iterable[str]) -> str:
    """A hint that names the option closest to ``word``, or an empty string."""
    close = difflib.get_close_matches(word, list(options), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
