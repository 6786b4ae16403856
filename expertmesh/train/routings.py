"""Looking at every routing of a model's MoE layers while it runs."""

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from expertmesh.layer import moe_layers
from expertmesh.recompute import is_recompute
from expertmesh.routing import Router, Routing
from expertmesh.uncompiled import uncompiled


class EveryRouting(ABC):
    """A context that sees what each MoE layer of a model decides, and nothing twice.

    Args:
        model: Run inside the context; gives its routers the tokens' ids.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for name, moe in moe_layers(self._model).items():
            self._begin(name, moe.router)
            hook = moe.router.register_forward_hook(self._shower(name), with_kwargs=True)
            self._hooks.append(hook)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    @abstractmethod
    def _begin(self, name: str, router: Router) -> None:
        """Told of each layer, by its name, before the model runs."""

    @abstractmethod
    def _see(self, name: str, ids_T: Tensor, routing: Routing) -> None:
        """Told of each decision.

        Args:
            name: The layer's.
            ids_T: The id of the token of each of the routing's rows.
            routing: The decision.
        """

    def _shower(self, name: str) -> Any:
        # What a compiled model has traced once it would not look up again.
        @uncompiled
        def show(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], routing: Routing
        ) -> None:
            if is_recompute():
                return
            ids_T = kwargs["token_ids"]
            self._see(name, ids_T if routing.token_N is None else ids_T[routing.token_N], routing)

        return show
