"""The plugin inside vLLM, without a server: tensor parallelism over two gloo ranks, and other
architectures than the tiny experts'."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.vllm import ENVIRONMENT, plugin_environment, python, vllm_marks

pytestmark = vllm_marks


def run(script: str, tmp_path: Path, *args: str) -> None:
    """A script beside this file by vLLM's interpreter; it says "equal" where all is well."""
    (tmp_path / "work").mkdir()
    done = subprocess.run(
        [python(), str(Path(__file__).with_name(script)), *args],
        env=os.environ | ENVIRONMENT | plugin_environment(tmp_path / "plugin"),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "equal" in done.stdout


def test_two_processes_that_share_a_model_compute_what_one_does(tmp_path: Path) -> None:
    run("two_ranks.py", tmp_path, str(tmp_path / "work"))


def test_what_would_serve_the_base_alone_is_refused(tmp_path: Path) -> None:
    run("refusals.py", tmp_path, str(tmp_path / "work"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture",
    ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"],
)
def test_an_architecture_answers_as_in_transformers(architecture: str, tmp_path: Path) -> None:
    run("architectures.py", tmp_path, architecture, str(tmp_path / "work"))


@pytest.mark.slow
def test_an_ordinary_lora_adds_to_the_gate(tmp_path: Path) -> None:
    run("architectures.py", tmp_path, "LlamaForCausalLM", str(tmp_path / "work"), "lora")
