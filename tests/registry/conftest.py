"""The small registry of world.py in a fresh folder, and the ways tests change it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from composer.registry import Loaded, load_catalog
from tests.registry.world import FAMILIES, write_world

Load = Callable[..., Loaded]


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    """The registry file of a sound small world."""
    return write_world(tmp_path)


@pytest.fixture
def load(registry: Path) -> Load:
    """Loads the world's registry as it now stands; further arguments go to `load_catalog`."""

    def run(**arguments: Any) -> Loaded:
        return load_catalog(registry, arguments.pop("families", FAMILIES), version=1, **arguments)

    return run


@pytest.fixture
def edit(registry: Path) -> Callable[[str, str], None]:
    """Replaces one piece of the registry's text by another."""

    def run(old: str, new: str) -> None:
        text = registry.read_text()
        assert old in text
        registry.write_text(text.replace(old, new, 1))

    return run
