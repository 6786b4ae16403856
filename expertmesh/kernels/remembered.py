"""Kernels whose compiled forms are looked up by what tells them apart, and by nothing else.

Triton's own lookup asks every argument and option anew at each launch. In a step of training that
takes the host 27 us a kernel, twice what remains of it here: where experts are narrow, the host is
what a layer waits for.
"""

from functools import partial
from typing import Any

from torch import Tensor
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

_HALF = 2**31
"""Numbers from here on are 64-bit."""


def remembered(kernel: Any) -> Any:
    """A kernel that is started from the host; under the interpreter the kernel as it is."""
    return Remembered(kernel) if isinstance(kernel, JITFunction) else kernel


class Remembered:
    """Starts a kernel as Triton does, ``kernel[grid](*arguments, **options)``.

    The first launch of each form goes through Triton, which compiles it. Arguments are given by
    position, the last constants by name if one likes. What Triton asks at each launch beside its
    arguments (whether debugging was switched on, or a global changed) is asked at the first.

    Attributes:
        kernel: Triton's; its constants are its last parameters, and none has a default.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._names = [param.name for param in kernel.params]
        if any(param.has_default for param in kernel.params):
            raise ValueError(f"parameters of {kernel.fn.__name__} must have no defaults")
        constant = [param.is_constexpr for param in kernel.params]
        self._first_constant = constant.index(True) if any(constant) else len(constant)
        if not all(constant[self._first_constant :]):
            raise ValueError(f"constants must be the last parameters of {kernel.fn.__name__}")
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return partial(self._start, grid)

    def _start(self, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        key = (
            driver.active.get_current_device(),
            arguments[self._first_constant :],
            *map(_form, arguments[: self._first_constant]),
            *options.items(),
        )
        compiled = self._compiled.get(key)
        if compiled is None:
            self._compiled[key] = self.kernel[grid](*arguments, **options)
            return
        if len(arguments) < len(self._names):
            arguments += tuple(options[name] for name in self._names[len(arguments) :])
        compiled[(*grid, 1, 1)[:3]](*arguments)


def _form(argument: Any) -> Any:
    """What Triton makes a form of its own for: of tensors the dtype and whether they start at a
    multiple of 16 bytes, of numbers their type, 1, and multiples of 16.
    """
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() & 15 == 0
    if type(argument) is int:
        return _kind(argument)
    if argument is None or isinstance(argument, float | bool):
        return type(argument)
    # A descriptor: its layout in shared memory follows from these.
    return argument.base.dtype, *argument.block_shape


def _kind(number: int) -> str:
    if -_HALF <= number < _HALF:
        return "1" if number == 1 else "d" if number & 15 == 0 else ""
    return "wide d" if number & 15 == 0 else "wide"
