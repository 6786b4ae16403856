"""Experts made of any module, their parameters stacked like those of the built-in families."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from expertmesh.experts.base import Experts
from expertmesh.experts.per_expert import run_per_expert, with_zero_gradients
from expertmesh.random import fold, fresh_seed
from expertmesh.shards import Shard, local, shard_of


class ModuleExperts(Experts):
    """One module class as the experts of a layer.

    The factory is called once for each expert, under its own random state. Parameters and buffers
    are then stacked to ``[E, ...]`` under the module's own names, so that they shard, save and
    optimise like every other expert parameter: ``stacked.fc1.weight`` is ``(E, out, in)``. The
    experts run one after another, each on its rows, with ``torch.func.functional_call``.

    Args:
        factory: Makes one expert, which maps ``(n, D)`` to ``(n, D)``. Every call must give
            the same structure; draws from torch's generators are governed by ``seed``.
        num_experts: Number of experts E.
        dim: Width D of the rows.
        seed: Governs the initial values; None draws one from torch's generator.

    Raises:
        ValueError: If the factory's modules differ in parameters or buffers.
    """

    hidden_separable = False

    def __init__(
        self,
        factory: Callable[[], nn.Module],
        num_experts: int,
        *,
        dim: int,
        seed: int | None = None,
    ) -> None:
        super().__init__(num_experts, dim)
        self.factory = factory
        on_meta = torch.empty(0).is_meta
        seed = 0 if on_meta else fresh_seed() if seed is None else seed
        experts = [_make(factory, seed, expert) for expert in range(num_experts)]
        self.stacked = _stack(experts)

    @property
    def hidden_dims(self) -> dict[str, int | None]:
        return {f"stacked.{name}": None for name in _tensors(self.stacked)}

    def forward(
        self, x_RD: Tensor, expert_RK: Tensor, weight_RK: Tensor, draw_R: Tensor | None = None
    ) -> Tensor:
        self._check(x_RD)
        state = {**dict(self.stacked.named_parameters()), **dict(self.stacked.named_buffers())}
        # unbind, not an index for each expert: its gradient is one stack, with zeros for the idle
        slices = {name: local(value).unbind(0) for name, value in state.items()}
        num_local = len(next(iter(slices.values()), range(self.num_experts)))

        def run(expert: int, rows: Tensor) -> Tensor:
            own = {name: values[expert] for name, values in slices.items()}
            return torch.func.functional_call(self.stacked, own, (rows,))

        y_RD, idle = run_per_expert(run, x_RD, expert_RK, weight_RK, num_local)
        if len(idle) == num_local:
            return with_zero_gradients(y_RD, map(local, self.stacked.parameters()))
        return y_RD

    @torch.no_grad()
    def reset_parameters(self, seed: int | None = None) -> None:
        """Call the factory again for each expert, and take its parameters and buffers."""
        seed = fresh_seed() if seed is None else seed
        target = {name: shard_of(value) for name, value in _tensors(self.stacked).items()}
        for expert in range(self.num_experts):
            for name, value in _tensors(_make(self.factory, seed, expert)).items():
                own = target[name]
                place = expert - own.offset[0]
                if 0 <= place < len(own.local):
                    own.local[place].copy_(_box(value, own))

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, dim={self.dim}"


def _box(value: Tensor, stack: Shard) -> Tensor:
    """The part of one expert's value that belongs to a shard of the stack."""
    for dim, (begin, size) in enumerate(zip(stack.offset[1:], stack.local.shape[1:], strict=True)):
        value = value.narrow(dim, begin, size)
    return value


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by every name they have: ``to_empty`` parts tied ones."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _make(factory: Callable[[], nn.Module], seed: int, expert: int) -> nn.Module:
    with expert_random_state(seed, expert):
        return factory()


@contextmanager
def expert_random_state(seed: int, expert: int) -> Iterator[None]:
    """Torch's generators seeded for one expert; what they were before is restored after."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    key = fold(seed, expert)
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(key)
        if devices:
            torch.cuda.manual_seed(key)
        yield


def _stack(experts: list[nn.Module]) -> nn.Module:
    """A copy of the first expert whose parameters and buffers hold all experts'."""
    _check_alike(experts)
    stacked = copy.deepcopy(experts[0])
    sources = [dict(expert.named_modules()) for expert in experts]
    made: dict[int, nn.Parameter] = {}  # by identity, so that tied parameters stay tied
    for path, module in stacked.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                values = [source[path]._parameters[name] for source in sources]
                joined = torch.stack([v.detach() for v in values if v is not None])
                made[id(parameter)] = nn.Parameter(joined, parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                buffers = [source[path]._buffers[name] for source in sources]
                module._buffers[name] = torch.stack([b for b in buffers if b is not None])
    return stacked


def _check_alike(experts: list[nn.Module]) -> None:
    def structure(module: nn.Module) -> dict[str, tuple[int, ...]]:
        tensors = (*module.named_parameters(), *module.named_buffers())
        return {name: tuple(tensor.shape) for name, tensor in tensors}

    first = structure(experts[0])
    for expert, module in enumerate(experts):
        own = structure(module)
        if own != first:
            name = next(n for n in {**first, **own} if first.get(n) != own.get(n))
            raise ValueError(
                f"experts must have equal structure: {name} is {first.get(name)} in expert 0 and "
                f"{own.get(name)} in expert {expert}; use HeterogeneousExperts for different ones"
            )
