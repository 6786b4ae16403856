"""Kernels in Gluon as Python on a CPU: a thread for each role, barriers that count.

Triton's interpreter does not run Gluon. This runs a kernel's own functions, program by program,
with what they import from Gluon replaced: roles of ``warp_specialize`` become threads, barriers
count arrivals, bytes and phases, and a product or a store by the copy engine reads its operands as
late as it may. So it shows who waits for whom, which tiles and steps a role takes, what is read
before it was written or written before it was read, and what lies out of bounds; not what threads
of a warp do among each other, nor fences, nor layouts.
"""

import random
import threading
import time
from dataclasses import dataclass, field
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from expertmesh.kernels.remembered import Remembered

_PATIENCE_SECONDS = 20.0
_here = threading.local()
"""Program, number of programs, what this thread has asked for and not waited for."""


class Stuck(RuntimeError):
    """A role waited for a barrier that nobody opened."""


@dataclass
class Pointer:
    """An array in memory and a place in it, or many."""

    array: Tensor
    offset: Any = 0

    def __add__(self, more: Any) -> "Pointer":
        return Pointer(self.array, self.offset + more)

    def __getitem__(self, index: Any) -> "Pointer":
        return Pointer(self.array, self.offset[index])

    @property
    def dtype(self) -> Any:
        return SimpleNamespace(element_ty=self.array.dtype)


@dataclass
class Descriptor:
    """A matrix and the block that the copy engine takes of it."""

    matrix: Tensor
    block: list[int]
    layout: None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    @property
    def block_type(self) -> Any:
        return SimpleNamespace(shape=self.block, nbytes=self.block[0] * self.block[1])


class Shared:
    """Shared memory: numbers that were never written are NaN."""

    def __init__(self, data: Tensor) -> None:
        self.data = data

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    def index(self, place: Any) -> "Shared":
        return Shared(self.data[int(place)])

    def permute(self, dims: tuple[int, ...]) -> "Shared":
        return Shared(self.data.permute(dims))

    def store(self, value: Tensor) -> None:
        _dawdle()
        self.data.copy_(value)


@dataclass
class Barrier:
    """Opens when all have arrived and all announced bytes are there."""

    count: int = 0
    missing: int = 0
    bytes: int = 0
    phase: int = 0

    def look(self, changed: threading.Condition) -> None:
        assert self.missing >= 0, "more arrived than were expected"
        if self.missing == 0 and self.bytes == 0:
            self.phase ^= 1
            self.missing = self.count
            changed.notify_all()


class Barriers(list[Barrier]):
    def index(self, place: Any) -> Barrier:
        return self[int(place)]


@dataclass
class Sum:
    """An accumulator, and the products that it waits for."""

    value: Tensor
    pending: list[tuple[Shared, Shared]] = field(default_factory=list)


class Machine:
    """What one program's roles share, and Gluon's operations on it."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.stuck = False
        self.barriers: list[Barrier] = []
        self.errors: list[BaseException] = []

    # mbarrier

    def MBarrierLayout(self) -> None:
        """A barrier lies anywhere."""

    def init(self, barrier: Barrier, count: int) -> None:
        barrier.count = barrier.missing = int(count)

    def wait(self, barrier: Barrier, phase: Any) -> None:
        _dawdle()
        end = time.monotonic() + _PATIENCE_SECONDS
        with self.changed:
            while barrier.phase == int(phase):
                if self.stuck or time.monotonic() > end:
                    self.stuck = True
                    self.changed.notify_all()
                    raise Stuck(f"role {_here.role} of program {int(_here.program)}")
                self.changed.wait(0.5)

    def arrive(self, barrier: Barrier, *, count: int = 1, pred: Any = True) -> None:
        if not bool(pred):
            return
        _dawdle()
        with self.changed:
            barrier.missing -= count
            barrier.look(self.changed)

    def expect(self, barrier: Barrier, num_bytes: int) -> None:
        with self.changed:
            barrier.bytes += num_bytes
            barrier.missing -= 1
            barrier.look(self.changed)

    # The copy engine

    def async_copy_global_to_shared(
        self, desc: Descriptor, corner: list[Any], barrier: Barrier, target: Shared
    ) -> None:
        row, column = (int(place) for place in corner)
        high, wide = desc.block
        assert min(row, column) >= 0
        found = desc.matrix[row : row + high, column : column + wide]
        block = torch.zeros(high, wide)
        block[: found.shape[0], : found.shape[1]] = found
        target.data.copy_(block)
        _dawdle()
        with self.changed:
            barrier.bytes -= desc.block_type.nbytes
            barrier.look(self.changed)

    def async_copy_shared_to_global(
        self, desc: Descriptor, corner: list[Any], source: Shared
    ) -> None:
        _here.stores.append((desc, int(corner[0]), int(corner[1]), source))

    def store_wait(self, pendings: int) -> None:
        while len(_here.stores) > pendings:
            desc, row, column, source = _here.stores.pop(0)
            high, wide = desc.block
            target = desc.matrix[row : row + high, column : column + wide]
            assert min(row, column) >= 0, "store out of bounds"
            assert target.shape == (high, wide), "store out of bounds"
            target.copy_(source.data)

    # The rest

    def bring(self, source: Pointer, mask: Tensor | None, target: Shared, ready: Barrier) -> None:
        target.data.copy_(_load(source, mask, None if mask is None else 0))
        self.arrive(ready, count=128)

    def allocate(self, dtype: Any, shape: list[int], layout: Any) -> Any:
        if dtype is torch.int64:
            barriers = Barriers(Barrier() for _ in range(shape[0]))
            self.barriers += barriers
            return barriers
        return Shared(torch.full(shape, float("nan")))

    def warp_specialize(self, roles: list[Any], warps: list[int], registers: list[int]) -> None:
        place = (_here.program, _here.num_programs)

        def play(number: int, run: Any, arguments: Any) -> None:
            _enter(*place, role=number)
            try:
                run(*arguments)
                assert not _here.stores, "a store was not waited for"
            except BaseException as error:
                self.stuck = True
                self.errors.append(error)

        threads = [
            threading.Thread(target=play, args=(number, *role)) for number, role in enumerate(roles)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def launch(kernel: Any, num_programs: int, *arguments: Any, **replaced: Any) -> None:
    """Run all programs of a kernel, one after the other.

    Args:
        kernel: A kernel in Gluon.
        num_programs: Of the grid.
        arguments: Tensors stand for pointers.
        replaced: Functions of the kernel's modules that are to be others here, by name.

    Raises:
        Stuck: If roles wait for each other for ever.
    """
    given = [Pointer(a.view(-1)) if isinstance(a, Tensor) else a for a in arguments]
    for program in range(num_programs):
        machine = Machine()
        run = _rebound(machine, replaced)(_plain(kernel))
        _enter(torch.tensor(program), num_programs, role=None)
        run(*given)
        for error in sorted(machine.errors, key=lambda error: isinstance(error, Stuck)):
            raise error
        left = [b for b in machine.barriers if b.missing != b.count or b.bytes]
        assert not left, "somebody arrived and nobody waited"


def _enter(program: Tensor, num_programs: int, *, role: int | None) -> None:
    _here.program, _here.num_programs, _here.role = program, num_programs, role
    _here.stores = []


def _dawdle() -> None:
    """Let another thread go first, now and then."""
    if random.random() < 0.02:
        time.sleep(random.random() * 5e-4)


def _rebound(machine: Machine, replaced: dict[str, Any]) -> Any:
    """From Gluon's functions to Python's over this machine."""
    names = {
        "gl": _language(machine),
        "tl": _language(machine),
        "mbarrier": machine,
        "tma": machine,
        "bring": machine.bring,
        "fence_async_shared": lambda: None,
        "warpgroup_mma": _multiply,
        "warpgroup_mma_wait": _wait_for_products,
        "halves": lambda tile: tile.chunk(2, dim=0),
        "sides": lambda tile: tile.chunk(2, dim=1),
    } | replaced

    modules: dict[int, dict[str, Any]] = {}

    def rebind(plain: FunctionType) -> FunctionType:
        module = plain.__globals__
        if id(module) not in modules:
            known = modules[id(module)] = {}
            for name, value in module.items():
                function = _plain(value)
                if name in names:
                    known[name] = names[name]
                elif function is not None:
                    known[name] = rebind(function)
                else:  # a constant of the kernels, or anything of Python's
                    known[name] = getattr(value, "value", value)
        return FunctionType(plain.__code__, modules[id(module)], plain.__name__, plain.__defaults__)

    return rebind


def _plain(function: Any) -> FunctionType | None:
    """The Python function of what Triton has wrapped."""
    kernel = function.kernel if isinstance(function, Remembered) else function
    found = getattr(kernel, "fn", None)
    return found if isinstance(found, FunctionType) else None


def _multiply(left: Shared, right: Shared, total: Any, *, is_async: bool) -> Sum:
    total = total if isinstance(total, Sum) else Sum(total)
    return Sum(total.value, [*total.pending, (left, right)])


def _wait_for_products(most: int, deps: list[Any]) -> Any:
    (total,) = deps
    if not isinstance(total, Sum):  # no step at all
        return total
    value, pending = total.value, total.pending
    while len(pending) > most:
        left, right = pending[0]
        _dawdle()
        value, pending = value + left.data @ right.data, pending[1:]
    return Sum(value, pending) if most else value


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value)


def _load(pointer: Pointer, mask: Any = None, other: Any = None) -> Tensor:
    place, real = torch.broadcast_tensors(
        _tensor(pointer.offset).long(), _tensor(True if mask is None else mask)
    )
    asked = place[real]
    size = pointer.array.numel()
    assert not asked.numel() or (asked.min() >= 0 and asked.max() < size), "load out of bounds"
    found = pointer.array[torch.where(real, place, 0)]
    return found if mask is None else torch.where(real, found, _tensor(other).to(found.dtype))


def _store(pointer: Pointer, value: Tensor, mask: Any = None) -> None:
    place, value, real = torch.broadcast_tensors(
        _tensor(pointer.offset).long(), _tensor(value), _tensor(True if mask is None else mask)
    )
    asked = place[real]
    size = pointer.array.numel()
    assert not asked.numel() or (asked.min() >= 0 and asked.max() < size), "store out of bounds"
    pointer.array[asked] = value[real].to(pointer.array.dtype)


class _Layouts:
    """A layout is nothing here."""

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **options: None


def _language(machine: Machine) -> Any:
    """``gluon.language``, as far as the kernels use it."""
    nothing = _Layouts()
    return SimpleNamespace(
        int32=torch.int32,
        int64=torch.int64,
        float32=torch.float32,
        constexpr=lambda value: value,
        program_id=lambda axis: _here.program,
        num_programs=lambda axis: _here.num_programs,
        static_range=range,
        arange=lambda begin, end, layout=None: torch.arange(begin, end),
        zeros=lambda shape, dtype, layout=None: torch.zeros(shape),
        minimum=lambda a, b: torch.minimum(_tensor(a), _tensor(b)),
        maximum=lambda a, b: torch.maximum(_tensor(a), _tensor(b)),
        where=lambda condition, a, b: torch.where(_tensor(condition), _tensor(a), _tensor(b)),
        sum=lambda value, axis: value.sum(axis),
        load=_load,
        store=_store,
        convert_layout=lambda value, layout: value,
        allocate_shared_memory=machine.allocate,
        warp_specialize=machine.warp_specialize,
        SliceLayout=nothing.any,
        BlockedLayout=nothing.any,
        DistributedLinearLayout=nothing.any,
        NVMMADistributedLayout=nothing.any,
        NVMMASharedLayout=nothing,
    )
