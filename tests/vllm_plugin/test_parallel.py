"""Tensor parallelism, over vLLM's own layers and two gloo ranks."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.vllm import ENVIRONMENT, plugin_environment, python, requires_vllm


@requires_vllm
def test_two_processes_that_share_a_model_compute_what_one_does(tmp_path: Path) -> None:
    script = Path(__file__).with_name("two_ranks.py")
    done = subprocess.run(
        [python(), str(script), str(tmp_path / "work")],
        env=os.environ | ENVIRONMENT | plugin_environment(tmp_path / "plugin"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "equal" in done.stdout
