"""Whether a vLLM of ours can serve a model that has a gate inside: asked of its environment before
it starts, since vLLM itself would say after a minute that it knows no such architecture. Knows
nothing of gates but the mark that they leave in a model's config.json."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from composer.adapters.base_model import GATE_BLOCK
from composer.engines.keys import inherited
from composer.engines.launch import Launch
from composer.errors import EngineMisconfigured

log = logging.getLogger(__name__)

ASK_S = 60.0
"""An interpreter on a busy machine, or a cold network disk, takes seconds to start."""

_GROUP = "vllm.general_plugins"
_PLUGIN = "composer.vllm_plugin:register"
_QUESTION = f"""
import os
from importlib.metadata import entry_points
loaded = os.environ.get("VLLM_PLUGINS")  # names, with commas; where it is not set, all are loaded
print(*(p.value for p in entry_points(group={_GROUP!r})
        if loaded is None or p.name in loaded.split(",")))
"""


def has_gate(model: str | None) -> bool:
    """Whether `model` is a folder here whose config.json tells of a gate. A name on the hub, or a
    folder that cannot be read, is vLLM's own to judge."""
    if model is None:
        return False
    with suppress(OSError, ValueError):
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
        return isinstance(config, dict) and config.get(GATE_BLOCK) is not None
    return False


async def demand_plugin(server: str, launch: Launch, environment: Mapping[str, str]) -> None:
    """Raises EngineMisconfigured where the interpreter that vLLM is to run in has not our plugin.
    One that cannot be run, or says nothing, is left to the start itself, which tells of it."""
    python = launch.python or sys.executable
    try:
        asked = await asyncio.create_subprocess_exec(
            python,
            "-c",
            _QUESTION,
            env={**inherited(), **environment, **launch.env},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
    except OSError:
        return
    try:
        async with asyncio.timeout(ASK_S):
            said, _ = await asked.communicate()
    except BaseException as error:  # the caller's end as well: nothing is left running
        with suppress(ProcessLookupError):
            asked.kill()
        await asked.wait()
        if isinstance(error, TimeoutError):
            log.warning("server %s: %s did not say in %.0f s what is in it", server, python, ASK_S)
            return
        raise
    if asked.returncode == 0 and _PLUGIN not in said.decode().split():
        raise EngineMisconfigured(
            f"server {server!r} is to serve a model with a gate inside, and {python} has not "
            "composer's plugin for that, or is not to load it (VLLM_PLUGINS); install it there, "
            "`python -m pip install --no-deps` with the folder of composer's source, and leave "
            "VLLM_PLUGINS unset or name `composer_gates` there"
        )
