"""All experts are here: nothing to move."""

from torch import Tensor

from expertmesh.dispatch.dispatcher import Dispatched, Dispatcher
from expertmesh.routing import Routing


class LocalDispatcher(Dispatcher):
    """The identity, for one rank."""

    def dispatch(self, x_TD: Tensor, routing: Routing, draw_T: Tensor | None = None) -> Dispatched:
        """Rows are tokens."""
        return Dispatched(x_TD, routing.expert_TK, routing.weight_TK, None, draw_T)

    def combine(self, y_RD: Tensor, context: None) -> Tensor:
        """Tokens are rows."""
        return y_RD
