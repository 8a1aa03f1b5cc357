"""What several tests of training share."""

from __future__ import annotations

import pytest

from composer.routing.families import FAMILIES


@pytest.fixture
def short_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two settings of each family: how they are chosen does not depend on their number."""
    for kind in FAMILIES.values():
        few = list(kind.grid())[:2]
        monkeypatch.setattr(kind, "grid", classmethod(lambda cls, few=few: few))
