"""Moving tokens to the ranks that hold their experts, and back."""

from expertmesh.dispatch.dispatcher import Dispatched, Dispatcher
from expertmesh.dispatch.local import LocalDispatcher

__all__ = ["Dispatched", "Dispatcher", "LocalDispatcher"]
