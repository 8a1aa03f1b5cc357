"""Compressed adapters in experts.yaml: expanded when it is loaded, or refused at their place."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from composer.adapters.compression import compress_folder
from composer.adapters.files import TERNARY
from composer.errors import CatalogError
from tests.registry.conftest import Load


def test_what_cannot_be_expanded_is_told_at_the_expert(load: Load, registry: Path) -> None:
    fox = registry.parent / "adapters" / "fox"
    compress_folder(fox, registry.parent / "adapters" / "small")
    shutil.rmtree(fox)
    (registry.parent / "adapters" / "small").rename(fox)
    assert load().catalog.experts["fox"].adapter is not None
    (fox / TERNARY).write_bytes(b"damaged")
    with pytest.raises(CatalogError) as caught:
        load()
    [problem] = caught.value.problems
    assert problem.path == "experts.fox.adapter"
    assert "it cannot be read" in problem.message
