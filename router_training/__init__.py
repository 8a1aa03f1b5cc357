"""Offline: labelled outcomes in, routers that the service can load out. Imports nothing until it is
asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from router_training.loading import OfflineRouter, load_router

__all__ = ["OfflineRouter", "load_router"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from router_training import loading

        return getattr(loading, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
