"""How long work tells how far it is. Knows no screen."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with what is being done, and how many of how many steps are."""


def silent(label: str, done: int, total: int) -> None:
    """Tells nobody."""
