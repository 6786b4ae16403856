"""Random numbers that are a function of integers.

A draw depends on a 64-bit key and on the index of the element, and on nothing else: not on the
device, the shape of the batch, the number of ranks, or what was drawn before. So the noise of a
token and the initial value of a weight are the same on every mesh and under recompute.

The generator is a counter hash: SplitMix64's finaliser (Steele, Lea and Flood, 2014) over key and
index. It is meant for noise and initial values, not for cryptography.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from expertmesh.shards import Shard, global_index, shard_of

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
# Elements hashed at once when filling a parameter: bounds the int64 temporaries to a few MiB.
_CHUNK = 1 << 18


def _signed(value: int) -> int:
    """The two's complement reading of a 64-bit pattern, which is what int64 tensors hold."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _mix_int(z: int) -> int:
    z = ((z ^ (z >> 30)) * _MIX_1) & _MASK
    z = ((z ^ (z >> 27)) * _MIX_2) & _MASK
    return z ^ (z >> 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical shift: int64's own shift copies the sign bit, so the copies are masked away."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift_right(z, 30)) * _signed(_MIX_1)
    z = (z ^ _shift_right(z, 27)) * _signed(_MIX_2)
    return z ^ _shift_right(z, 31)


def label(name: str) -> int:
    """The number that stands for a name in ``fold``.

    Code that is to be compiled makes its labels once, as constants: hashing cannot be traced.
    """
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


_RADIUS, _ANGLE = label("radius"), label("angle")


@overload
def fold(key: int, *parts: int | str) -> int: ...
@overload
def fold(key: Tensor, *parts: int | str) -> Tensor: ...
def fold(key: int | Tensor, *parts: int | str) -> int | Tensor:
    """A new key from a key and labels.

    Args:
        key: An int, or an int64 tensor of keys.
        parts: Integers or names, for example a layer index and ``"noise"``. Order matters.

    Returns:
        A key of the same kind, equal for an int and for a tensor that holds it.
    """
    for part in parts:
        number = label(part) if isinstance(part, str) else part & _MASK
        mixed = _mix_int((number + _GOLDEN) & _MASK)
        if isinstance(key, Tensor):
            key = _mix((key ^ _signed(mixed)) + _signed(_GOLDEN))
        else:
            key = _signed(_mix_int((((key & _MASK) ^ mixed) + _GOLDEN) & _MASK))
    return key


def bits(key: int | Tensor, index: Tensor) -> Tensor:
    """64 random bits as int64, one number for each element of ``index``.

    Args:
        key: An int, or an int64 tensor that broadcasts with ``index``.
        index: int64 tensor of any shape.

    Returns:
        Tensor of the broadcast shape.
    """
    return _mix(_mix(index * _signed(_GOLDEN)) ^ key)


def uniform(key: int | Tensor, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers in [0, 1), one for each element of ``index``.

    Args:
        key: An int, or an int64 tensor that broadcasts with ``index``.
        index: int64 tensor of any shape; equal indices give equal numbers.
        dtype: float32 (24 random bits) or float64 (53 random bits).

    Returns:
        Tensor of ``index``'s shape.
    """
    width = 53 if dtype == torch.float64 else 24
    return _shift_right(bits(key, index), 64 - width).to(dtype) * 2.0**-width


def normal(key: int | Tensor, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers, one for each element of ``index`` (Box and Muller, 1958).

    Args:
        key: An int, or a 0-d int64 tensor.
        index: int64 tensor of any shape; equal indices give equal numbers.
        dtype: float32 or float64.

    Returns:
        Tensor of ``index``'s shape.
    """
    radius = torch.sqrt(-2.0 * torch.log1p(-uniform(fold(key, _RADIUS), index, dtype)))
    return radius * torch.cos((2.0 * math.pi) * uniform(fold(key, _ANGLE), index, dtype))


@torch.no_grad()
def fill_normal_(param: Tensor, std: float, key: int, *, truncate: float | None = None) -> Tensor:
    """Fill a parameter with normal numbers of one key, element by element.

    Of a sharded parameter the part that this rank holds is filled, with the values that it has in
    the whole.

    Args:
        param: Tensor of any shape, contiguous; overwritten.
        std: Standard deviation before truncation.
        key: The parameter's key.
        truncate: Cut the distribution off at this many standard deviations; None does not.

    Returns:
        ``param``.
    """
    _fill(shard_of(param), std, key, truncate)
    return param


@torch.no_grad()
def fill_expert_normal_(
    param: Tensor, std: float, key: int, *, truncate: float | None = None
) -> Tensor:
    """Fill stacked expert parameters; expert ``e`` draws from its own key.

    Args:
        param: ``(E, ...)``, contiguous; overwritten.
        std: Standard deviation before truncation.
        key: The parameter's key; expert ``e`` uses ``fold(key, e)``.
        truncate: As in ``fill_normal_``.

    Returns:
        ``param``.
    """
    stack = shard_of(param)
    for place, values in enumerate(stack.local.unbind(0)):
        expert = Shard(values, stack.shape[1:], stack.offset[1:])
        _fill(expert, std, fold(key, stack.offset[0] + place), truncate)
    return param


def _fill(shard: Shard, std: float, key: int, truncate: float | None) -> None:
    if shard.local.numel() == 0:
        return
    row = shard.local[0].numel()
    step = max(1, _CHUNK // row)
    for start in range(0, len(shard.local), step):
        part = shard.local[start : start + step]
        index = global_index(shard, start, start + len(part))
        if truncate is None:
            values = normal(key, index)
        else:
            tail = 0.5 * math.erfc(truncate / math.sqrt(2.0))
            values = torch.special.ndtri(tail + (1.0 - 2.0 * tail) * uniform(key, index))
        part.copy_(std * values)


def fresh_seed() -> int:
    """A seed drawn from torch's default generator, so that ``torch.manual_seed`` governs it."""
    return int(torch.randint(0, 1 << 62, (), dtype=torch.int64, device="cpu"))


@dataclass(frozen=True)
class RandomKey:
    """Names every random number of one forward pass.

    Attributes:
        seed: 0-d int64 tensor, made of the run's seed and the step.
        token_index: int64 tensor with the leading shape of the layer's input (without D): the
            index of each token in the step's global batch.
    """

    seed: Tensor
    token_index: Tensor

    @staticmethod
    def of(seed: int, step: int, token_index: Tensor) -> "RandomKey":
        """The key of one step; a tensor, so that compiled code serves every step."""
        folded = fold(seed, "step", step)
        if token_index.device.type != "cuda":
            return RandomKey(torch.tensor(folded, device=token_index.device), token_index)
        # Filled in, not copied: a copy from the host waits for all that the device has to do.
        value = torch.full((), folded, dtype=torch.int64, device=token_index.device)
        return RandomKey(value, token_index)
