"""A real vLLM server (its CPU build) for tests: where it is, and how to start one.

The interpreter is COMPOSER_VLLM_PYTHON, else that of `.venv-vllm`, which `make vllm` makes. Tests
that need it are marked `@requires_vllm` and skipped where there is none. Starting takes half a
minute and 2 GB: share a server between tests, and never run more than two.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from composer.engines.launch import Launch
from composer.engines.processes import ManagedProcess

ROOT = Path(__file__).resolve().parent.parent
LARGE = ROOT / "examples" / "tiny" / "bases" / "large"
SMALL = ROOT / "examples" / "tiny" / "bases" / "small"

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "OMP_NUM_THREADS": "1",
}

ARGS: dict[str, Any] = {
    "dtype": "bfloat16",
    "enforce_eager": True,
    "max_model_len": 512,
    "enable_lora": True,
    "max_loras": 2,
    "max_cpu_loras": 4,
    "max_lora_rank": 8,
}


def find_python() -> Path | None:
    """The interpreter of vLLM's environment; None where there is none."""
    named = os.environ.get("COMPOSER_VLLM_PYTHON")
    if named:
        return Path(named)
    made = ROOT / ".venv-vllm"
    # Only a finished one: pip may be at work in it.
    return made / "bin" / "python" if (made / ".ready").exists() else None


PYTHON = find_python()

_skip = pytest.mark.skipif(
    PYTHON is None,
    reason="needs a real vLLM: `make vllm` installs one; COMPOSER_VLLM_PYTHON names another",
)


def requires_vllm(test: Any) -> Any:
    """Marks a test, class or module (`pytestmark = vllm_marks`) as one with a real vLLM."""
    return pytest.mark.vllm(_skip(test))


vllm_marks = [pytest.mark.vllm, _skip]


def python() -> str:
    assert PYTHON is not None, "the test lacks @requires_vllm"
    return str(PYTHON)


def plugin_environment(folder: Path) -> dict[str, str]:
    """What shows composer's plugin, as it is in this checkout, to a vLLM that it is not installed
    for: a folder for PYTHONPATH with the package and the entry point that an installation has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = folder / f"composer-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (folder / "composer").symlink_to(ROOT / "composer")
    told = f"Metadata-Version: 2.1\nName: composer\nVersion: {project['version']}\n"
    (info / "METADATA").write_text(told)
    group = "vllm.general_plugins"
    points = [f"{name} = {at}" for name, at in project["entry-points"][group].items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *points, ""]))
    return {"PYTHONPATH": str(folder)}


@dataclass(frozen=True, slots=True)
class VllmServer:
    """A running one. `url` is its root, without /v1."""

    url: str
    log: Path
    process: ManagedProcess


@asynccontextmanager
async def vllm_server(
    model: Path = LARGE,
    *,
    log: Path,
    args: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
    **launch: Any,
) -> AsyncIterator[VllmServer]:
    """Starts `model` on a port of its own; `args` replaces `ARGS`, `env` adds to `ENVIRONMENT`."""
    settings = Launch.model_validate(
        {
            "python": python(),
            "args": ARGS if args is None else args,
            "env": ENVIRONMENT | dict(env or {}),
            "log": log,
            "start_timeout_s": 300,
            **launch,
        }
    )

    def command(port: int) -> list[str]:
        return [
            *(python(), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
            *("--host", "127.0.0.1", "--port", str(port)),
            *settings.flags(),
        ]

    async def ready() -> bool:
        try:
            url = f"http://127.0.0.1:{process.port}/health"
            return (await client.get(url)).status_code == 200
        except httpx.TransportError:
            return False

    async def restarted() -> None:
        pass

    process = ManagedProcess(model.name, settings, command, {}, ready, restarted)
    async with httpx.AsyncClient(trust_env=False, timeout=5) as client:
        try:
            await process.start()
            yield VllmServer(f"http://127.0.0.1:{process.port}", log, process)
        finally:
            await process.close()
