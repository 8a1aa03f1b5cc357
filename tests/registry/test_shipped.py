"""The registries that come with the project load with the real routers, strategies and engines."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from composer.adapters.base_model import BaseModelInfo, describe_base_model
from composer.build import families
from composer.registry import load_catalog, servers
from tests.registry.world import LAYERS, VOCABULARY, WIDTH, adapter_config, write_adapter

ROOT = Path(__file__).parents[2]
GPU = ROOT / "examples" / "gpu" / "experts.yaml"


def test_the_default_registry() -> None:
    catalog = load_catalog(ROOT / "experts.yaml", families(), version=1).catalog
    skilled = [expert for expert in catalog.experts.values() if expert.adapter is not None]
    assert len([expert for expert in skilled if expert.server == "tiny-large"]) >= 8
    assert all(expert.prompt and len(expert.examples) >= 40 for expert in skilled)
    assert catalog.default_policy in catalog.policies


@pytest.fixture
def small_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every base on the hub looks like the small world's, under its own name."""

    def fetch(name: str, revision: str | None, names: tuple[str, ...]) -> BaseModelInfo:
        assert revision is not None
        assert len(revision) == 40
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
        for layer in range(LAYERS):
            for module in ("q_proj", "v_proj"):
                shapes[f"model.layers.{layer}.self_attn.{module}.weight"] = (WIDTH, WIDTH)
        config = {"max_position_embeddings": 131_072}
        return describe_base_model(config, shapes, names=(name, *names), stamp=name)

    monkeypatch.setattr(servers, "_fetch_base_model", fetch)


@pytest.mark.usefixtures("small_hub")
def test_the_gpu_example_as_it_comes() -> None:
    catalog = load_catalog(GPU, families(), version=1).catalog
    assert list(catalog.experts) == ["qwen", "llama"]
    assert {server.engine for server in catalog.servers.values()} == {"vllm"}
    assert {expert.context_window for expert in catalog.experts.values()} == {8192}
    assert all("tools" in expert.abilities for expert in catalog.experts.values())


@pytest.mark.usefixtures("small_hub")
def test_the_gpu_example_has_one_of_its_models_loaded_at_a_time() -> None:
    catalog = load_catalog(GPU, families(), version=1).catalog
    placements = [server.placement for server in catalog.servers.values()]
    assert [placement.device for placement in placements if placement] == ["gpu", "gpu"]
    needed = sum(placement.memory_gb for placement in placements if placement)
    assert needed > catalog.devices["gpu"].memory_gb
    for server in catalog.servers.values():
        assert server.settings.launch.python.startswith("/")


@pytest.mark.usefixtures("small_hub")
def test_the_gpu_example_with_adapters(tmp_path: Path) -> None:
    shutil.copytree(GPU.parent, tmp_path / "gpu")
    for server, base in (
        ("qwen-7b", "Qwen/Qwen2.5-7B-Instruct"),
        ("llama-8b", "/models/llama-3.1-8b-instruct"),
    ):
        config = adapter_config(base_model_name_or_path=base)
        write_adapter(tmp_path / "gpu" / "adapters" / server / "sql", config)
    catalog = load_catalog(tmp_path / "gpu" / "experts.yaml", families(), version=1).catalog
    assert list(catalog.experts) == ["qwen", "llama", "qwen-sql", "llama-sql"]
    assert catalog.policies["vote"].experts == tuple(catalog.experts)
    assert catalog.experts["qwen-sql"].adapter is not None
    assert np.isclose(catalog.experts["qwen-sql"].adapter.alpha, 4)
