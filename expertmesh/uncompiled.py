"""Functions that ``torch.compile`` leaves as they are."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
ResultT = TypeVar("ResultT")


def uncompiled(function: Callable[P, ResultT]) -> Callable[P, ResultT]:
    """``torch.compiler.disable``, but it imports the compiler, a second's work, only to compile."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> ResultT:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return call
