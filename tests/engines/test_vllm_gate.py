"""A model with a gate inside is served only where vLLM's environment has our plugin."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from composer.engines.launch import Launch
from composer.engines.vllm import VllmEngine
from composer.engines.vllm_gate import demand_plugin, has_gate
from composer.engines.vllm_launch import VllmSettings
from composer.errors import EngineMisconfigured
from tests.engines.test_vllm import call, text_of
from tests.vllm import plugin_environment

BARE = sys._base_executable
"""An interpreter without the packages of our own environment."""


@pytest.fixture
def elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory without the metadata of our package, which `python -c` would see."""
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))


def model(folder: Path, **config: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_gate_is_seen_in_the_folder_of_a_model(tmp_path: Path) -> None:
    assert has_gate(str(model(tmp_path / "gated", gated_adapter={"kind": "arrow"})))
    assert not has_gate(str(model(tmp_path / "plain", architectures=["LlamaForCausalLM"])))
    assert not has_gate("org/name-on-the-hub")
    assert not has_gate(None)


async def test_an_environment_without_the_plugin_is_named_with_the_remedy(
    tmp_path: Path, elsewhere: None
) -> None:
    with pytest.raises(EngineMisconfigured, match=r"has not composer's plugin .* pip install"):
        await demand_plugin("big", Launch(python=BARE), {})
    env = plugin_environment(tmp_path)
    await demand_plugin("big", Launch(python=BARE, env=env), {})
    await demand_plugin("big", Launch(python=BARE, env=env), {"VLLM_PLUGINS": "a,composer_gates"})
    with pytest.raises(EngineMisconfigured, match="VLLM_PLUGINS"):
        await demand_plugin("big", Launch(python=BARE, env=env), {"VLLM_PLUGINS": "another"})


async def test_an_interpreter_that_cannot_be_run_is_left_to_the_start(tmp_path: Path) -> None:
    await demand_plugin("big", Launch(python=str(tmp_path / "nowhere")), {})


async def test_calls_are_told_before_a_server_is_started_in_vain(
    tmp_path: Path, elsewhere: None
) -> None:
    settings = VllmSettings(
        launch=Launch(python=BARE, log=tmp_path / "server.log"),
        model=str(model(tmp_path / "gated", gated_adapter={"kind": "arrow"})),
    )
    engine = VllmEngine("big", settings)
    try:
        await engine.start()
        with pytest.raises(EngineMisconfigured, match="composer's plugin"):
            await text_of(engine, call())
        assert (await engine.health()).state == "failed"
        assert not (tmp_path / "server.log").exists()
    finally:
        await engine.close()
