"""What several tests of training share."""

from __future__ import annotations

from pathlib import Path

import pytest

from composer.routing.families import FAMILIES
from tests.replayed import Recorded, record


@pytest.fixture
def short_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two settings of each family: how they are chosen does not depend on their number."""
    for kind in FAMILIES.values():
        few = list(kind.grid())[:2]
        monkeypatch.setattr(kind, "grid", classmethod(lambda cls, few=few: few))


@pytest.fixture
def recorded(tmp_path: Path) -> Recorded:
    return record(tmp_path)
