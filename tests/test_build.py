"""What a generation takes over from the one before it."""

from __future__ import annotations

import socket

import pytest

from composer.build import build_generation
from composer.engines.openai import OpenAISettings
from composer.types import Catalog, Expert, FloatArray, Server


class NoEmbedder:
    """Nobody routes here."""

    dim = 0

    async def embed(self, text: str) -> FloatArray:
        raise AssertionError(text)

    def embed_now(self, texts: list[str]) -> FloatArray:
        raise AssertionError(texts)


@pytest.fixture
def nowhere() -> str:
    """A URL that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/v1"


async def test_a_remote_server_that_is_away_keeps_no_change_from_being_made(nowhere: str) -> None:
    server = Server("remote", "openai", OpenAISettings(url=nowhere, model="m"))
    first = Catalog(1, "a", {"remote": server}, {"one": Expert("one", "remote")}, {})
    second = Catalog(2, "b", {"remote": server}, {"two": Expert("two", "remote")}, {})
    before = await build_generation(first, [], NoEmbedder())  # type: ignore[arg-type]
    try:
        assert not await before.engines["remote"].healthy()
        after = await build_generation(second, [before], NoEmbedder())  # type: ignore[arg-type]
        assert after.engines["remote"] is before.engines["remote"]
        assert after.catalog.experts.keys() == {"two"}
    finally:
        await before.engines["remote"].close()
