"""Adapters and bases named on the hub, from a local hub cache. Nothing here reaches a network."""

from __future__ import annotations

import shutil
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from composer.adapters import hub as hub_module
from composer.adapters.hub import adapter_root, fetch_adapter, fetch_base_model
from composer.errors import CatalogError
from composer.registry import servers
from tests.registry.conftest import Load
from tests.registry.world import BASE_NAME, write_adapter, write_base

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB = "    adapter: {hub: acme/fox-lora, revision: v1}\n"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, offline."""
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    servers._fetch_base_model.cache_clear()
    return cache


def publish(hub: Path, name: str, write: Callable[[Path], None], revision: str = "v1") -> Path:
    """Puts a repository into the cache as the hub's client does: blobs, and a snapshot of links."""
    repository = hub / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    write(repository / "made")
    (repository / "blobs").mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted((repository / "made").iterdir())):
        blob = repository / "blobs" / f"{number:040x}"
        shutil.move(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    (repository / "made").rmdir()
    (repository / "refs").mkdir()
    (repository / "refs" / revision).write_text(COMMIT)
    return snapshot


def test_an_expert_with_an_adapter_on_the_hub(
    hub: Path, load: Load, edit: Callable[[str, str], None]
) -> None:
    snapshot = publish(hub, "acme/fox-lora", write_adapter)
    edit("    adapter: ./adapters/fox\n", HUB)
    fox = load().catalog.experts["fox"]
    assert fox.adapter is not None
    assert fox.adapter.path == snapshot.resolve()
    assert fox.examples == ("write this like a made",)  # the card came along


@pytest.mark.parametrize("revision", ["v1", COMMIT])
def test_a_cached_revision_is_found_by_tag_and_by_commit(hub: Path, revision: str) -> None:
    snapshot = publish(hub, "acme/fox-lora", write_adapter)
    assert fetch_adapter("acme/fox-lora", revision) == snapshot
    assert adapter_root(snapshot) == hub / "models--acme--fox-lora"


def test_a_snapshot_may_not_link_out_of_its_repository(
    hub: Path, load: Load, edit: Callable[[str, str], None], tmp_path: Path
) -> None:
    snapshot = publish(hub, "acme/fox-lora", write_adapter)
    weights = snapshot / "adapter_model.safetensors"
    shutil.copy(weights, tmp_path / "stolen.safetensors")
    weights.unlink()
    weights.symlink_to(tmp_path / "stolen.safetensors")
    edit("    adapter: ./adapters/fox\n", HUB)
    with pytest.raises(CatalogError, match=r"it leads to .*stolen\.safetensors, outside"):
        load()


def test_an_adapter_that_is_not_in_the_cache(
    hub: Path, load: Load, edit: Callable[[str, str], None]
) -> None:
    edit("    adapter: ./adapters/fox\n", HUB)
    with pytest.raises(CatalogError) as refused:
        load()
    (problem,) = refused.value.problems
    assert problem.path == "experts.fox.adapter"
    assert problem.message == (
        "acme/fox-lora at v1 is not in the local hub cache and the hub cannot be reached"
    )
    assert (
        problem.remedy
        == "Connect, or fetch it before with `hf download acme/fox-lora --revision v1`."
    )


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (GatedRepoError, "is gated on the hub. Accept its terms there"),
        (
            RepositoryNotFoundError,
            "there is no acme/fox-lora on the hub, or it is private. Correct",
        ),
        (RevisionNotFoundError, "acme/fox-lora has no revision v1 on the hub. Name one of its"),
        (HfHubHTTPError, "cannot be fetched from the hub: told so. Try again"),
    ],
)
def test_what_the_hub_refuses_is_told_in_words(
    kind: type[HfHubHTTPError], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: object, **__: object) -> str:
        response = httpx.Response(404, request=httpx.Request("GET", "http://hub.invalid"))
        raise kind("told so", response=response)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("composer.adapters.hub.snapshot_download", download)
    with pytest.raises(CatalogError) as refused:
        fetch_adapter("acme/fox-lora", "v1")
    assert says in str(refused.value)


def test_no_network_error_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise hub_module._HTTP_ERROR("no route")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("composer.adapters.hub.snapshot_download", download)
    with pytest.raises(CatalogError, match="cannot be fetched from the hub: no route"):
        fetch_adapter("acme/fox-lora", "v1")


def test_a_hub_that_does_not_answer_is_asked_once_and_quickly(
    hub: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By the hub's own client, whose retries would take half a minute for each name."""
    asked: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"

        def hang_up() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    asked.append(connection)
                    connection.close()

        threading.Thread(target=hang_up, daemon=True).start()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(hub_module, "_HUB", hub_module._Hub())
        for ask in (
            lambda: fetch_adapter("acme/fox-lora", "v1"),
            lambda: fetch_adapter("acme/fox-lora", COMMIT),
            lambda: fetch_base_model(BASE_NAME, None, ()),
        ):
            with pytest.raises(CatalogError, match="the hub cannot be reached"):
                ask()
        listener.shutdown(socket.SHUT_RDWR)
    assert len(asked) == 1
    assert "Retrying" not in caplog.text


def test_a_hub_that_answers_is_asked_for_what_is_not_in_the_cache(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local: list[object] = []

    def download(*_: object, **arguments: object) -> str:
        local.append(arguments["local_files_only"])
        return str(hub)

    monkeypatch.setattr("composer.adapters.hub.snapshot_download", download)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_module._Hub, "_ask", staticmethod(lambda: True))
    monkeypatch.setattr(hub_module, "_HUB", hub_module._Hub())
    fetch_adapter("acme/fox-lora", "v1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fetch_adapter("acme/fox-lora", "v1")
    assert local == [False, True]


def test_only_safe_files_are_asked_for(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def download(name: str, **arguments: object) -> str:
        asked.append(arguments["allow_patterns"])
        return str(hub)

    monkeypatch.setattr("composer.adapters.hub.snapshot_download", download)
    fetch_adapter("acme/fox-lora", "main")
    assert asked == [["adapter_config.json", "adapter_model.safetensors", "README.md"]]


def test_a_base_on_the_hub_is_compared_by_its_cached_snapshot(
    hub: Path, load: Load, edit: Callable[[str, str], None]
) -> None:
    publish(hub, BASE_NAME, write_base)
    edit("model: ./bases/tiny", f"model: {BASE_NAME}\n    revision: v1")
    catalog = load().catalog
    assert catalog.servers["local"].settings.model == BASE_NAME
    assert catalog.experts["fox"].context_window == 512
    base = fetch_base_model(BASE_NAME, "v1", ())
    assert base.is_named("somebody/tiny-llama")
    assert "model.layers.1.self_attn.v_proj" in base.shapes


def test_a_base_that_cannot_be_looked_at(
    hub: Path, load: Load, edit: Callable[[str, str], None]
) -> None:
    edit("model: ./bases/tiny", f"model: {BASE_NAME}")
    with pytest.raises(CatalogError) as refused:
        load()
    assert [f"{problem.path}: {problem.message}" for problem in refused.value.problems] == [
        f"servers.local.model: {BASE_NAME} is not in the local hub cache and the hub cannot be "
        "reached"
    ]
