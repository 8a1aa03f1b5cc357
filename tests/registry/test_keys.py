"""The `keys:` block: whom callers' keys exclude, and what may be wrong with it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from composer.errors import CatalogError
from tests.registry.conftest import Load
from tests.registry.world import RABBIT, said

KEYS = """\
keys:
  ann: {key_env: ANN_KEY, exclude: [general]}
  bob: {key_env: BOB_KEY}
"""


@pytest.fixture(autouse=True)
def keyed(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.write_text(registry.read_text() + KEYS)
    monkeypatch.setenv("ANN_KEY", "a")
    monkeypatch.setenv("BOB_KEY", "b")


def test_keys_are_known_by_their_digests(load: Load) -> None:
    keys = load().catalog.keys
    assert keys["ann"].exclude == {"general"}
    assert keys["bob"].exclude == frozenset()
    assert not keys["bob"].admin
    assert keys["ann"].digest == hashlib.sha256(b"a").digest()
    assert keys["ann"].opens(b"a")
    assert not keys["ann"].opens(b"b")


def test_a_run_time_expert_can_be_excluded(load: Load, edit: Callable[[str, str], None]) -> None:
    edit("[general]", "[rabbit]")
    assert load(runtime=[RABBIT]).catalog.keys["ann"].exclude == {"rabbit"}
    with pytest.raises(CatalogError) as error:
        load()
    (told,) = said(error)
    assert told.startswith("keys.ann.exclude[0]: no expert is called 'rabbit'")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("[general]", "[generl]", "keys.ann.exclude[0]: no expert is called 'generl'"),
        ("ANN_KEY", "BOB_KEY", "keys.bob.key_env: it is the key of 'ann' too"),
        ("key_env: BOB_KEY", "key: b", "keys.bob.key_env: "),
        ("key_env: BOB_KEY", "key_env: not-a-name", "keys.bob.key_env: "),
        ("{key_env: BOB_KEY}", "{key_env: BOB_KEY, admin: 1}", "keys.bob.admin: "),
        ("bob:", "Bob:", "keys.Bob: 'Bob' cannot be an id"),
        ("{key_env: BOB_KEY}", "BOB_KEY", "keys.bob: it should have keys below it"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(
    load: Load, edit: Callable[[str, str], None], old: str, new: str, says: str
) -> None:
    edit(old, new)
    with pytest.raises(CatalogError) as error:
        load()
    assert any(told.startswith(says) for told in said(error)), said(error)


def test_a_key_that_is_not_set_is_a_warning_and_opens_nothing(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BOB_KEY", " ")
    loaded = load()
    (warning,) = loaded.warnings
    assert warning.path == "keys.bob.key_env"
    assert loaded.catalog.keys["bob"].digest is None
    assert not loaded.catalog.keys["bob"].opens(b"")


def test_whom_a_key_excludes_is_part_of_what_is_served(
    load: Load, edit: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan made under other exclusions does not stand."""
    before = load().catalog.digest
    monkeypatch.setenv("BOB_KEY", "another")
    assert load().catalog.digest == before
    edit("{key_env: BOB_KEY}", "{key_env: BOB_KEY, admin: true}")
    admin = load().catalog
    assert admin.keys["bob"].admin
    edit("[general]", "[fox]")
    assert len({before, admin.digest, load().catalog.digest}) == 3
