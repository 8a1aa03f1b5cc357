"""What a generation takes over from the one before it."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from composer.build import build_generation, build_ways
from composer.engines import keys
from composer.engines.launch import Launch
from composer.engines.openai import OpenAISettings
from composer.engines.processes import ManagedProcess
from composer.engines.vllm_launch import VllmSettings
from composer.registry import RegistryError
from composer.types import (
    Adapter,
    Catalog,
    Expert,
    FloatArray,
    Gated,
    SamplingDefaults,
    Server,
)


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
        assert not (await before.engines["remote"].health()).ok
        assert not before.places["remote"].there
        after = await build_generation(second, [before], NoEmbedder())  # type: ignore[arg-type]
        assert after.engines["remote"] is before.engines["remote"]
        assert after.catalog.experts.keys() == {"two"}
    finally:
        await before.engines["remote"].close()


async def test_servers_of_ours_see_nobodys_keys(
    nowhere: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "_hidden", set())
    monkeypatch.setenv("FAR_KEY", "secret")
    monkeypatch.setenv("COMPOSER_API_KEY", "ours")
    monkeypatch.setenv("HF_TOKEN", "theirs")
    assert "FAR_KEY" in keys.inherited()
    settings = OpenAISettings(url=nowhere, model="m", api_key_env="FAR_KEY")
    server = Server("far", "openai", settings)
    catalog = Catalog(1, "a", {"far": server}, {"one": Expert("one", "far")}, {})
    made = await build_generation(catalog, [], NoEmbedder())  # type: ignore[arg-type]
    await made.engines["far"].close()
    launch = Launch(env={"MINE": "1"})
    process = ManagedProcess("s", launch, lambda port: [], {}, _never, _never)
    environment = process._environment("/venv/bin/python")
    assert environment.keys() >= {"HF_TOKEN", "MINE", "PATH"}
    assert not environment.keys() & {"FAR_KEY", "COMPOSER_API_KEY"}


async def _never() -> Any:
    raise AssertionError("nothing is started here")


async def test_a_remote_server_whose_key_is_missing_counts_as_there(
    nowhere: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that its calls are refused at once, instead of waiting for it."""
    monkeypatch.delenv("TEST_KEY", raising=False)
    settings = OpenAISettings(url=nowhere, model="m", api_key_env="TEST_KEY")
    vllm = VllmSettings(url=nowhere, api_key_env="TEST_KEY")
    servers = {"a": Server("a", "openai", settings), "b": Server("b", "vllm", vllm)}
    catalog = Catalog(1, "a", servers, {id_: Expert(id_, id_) for id_ in servers}, {})
    made = await build_generation(catalog, [], NoEmbedder())  # type: ignore[arg-type]
    for id_, engine in made.engines.items():
        assert made.places[id_].there
        assert f"server {id_!r} has no API key" in str((await engine.health()).reason)
        await engine.close()


def test_an_experts_revision_changes_with_what_its_answers_come_from() -> None:
    def revision(expert: Expert, model: str = "m", **more: Any) -> str:
        settings = OpenAISettings(url="http://127.0.0.1:9/v1", model=model, **more)
        server = Server("far", "openai", settings)
        return Catalog(1, "a", {"far": server}, {expert.id: expert}, {}).revision(expert.id)

    same = revision(Expert("one", "far"))
    assert revision(Expert("two", "far", description="other words"), in_flight=7) == same
    others = [
        revision(Expert("one", "far"), model="n"),
        revision(Expert("one", "far", sampling=SamplingDefaults(temperature=1.0))),
    ]
    assert len({same, *others}) == 3


async def test_a_gate_that_reads_requests_names_its_embedder() -> None:
    class Known(NoEmbedder):
        id, digest = "mini", "d1"

    def catalog(digest: str) -> Catalog:
        gate = Gated(
            "glider", ("x",), ("sha256:1",), per_request=True, embedder="other",
            embedder_digest=digest,
        )  # fmt: skip
        adapter = Adapter(Path("g"), "sha256:2", 1, 1.0, (), gate=gate)
        return Catalog(1, "a", {}, {"one": Expert("one", "box", adapter=adapter)}, {})

    for digest in ("", "d1"):
        assert await build_ways(catalog(digest), Known()) == {}  # type: ignore[arg-type]
    with pytest.raises(RegistryError, match=r"as the embedder 'other' sees them, .* is 'mini'"):
        await build_ways(catalog("d2"), Known())  # type: ignore[arg-type]
