"""Gated adapters on vLLM: registers model classes that mix adapters inside the model. Installed
into vLLM's own environment; imports vLLM when called, and of composer nothing but its adapters."""

from __future__ import annotations

import re

OLDEST, NEWEST = (0, 32), (0, 32)
"""The minor versions of vLLM that this was tested with, both included. It leans on what vLLM does
not promise to keep: linear methods, secondary weights, the map of model configs."""


def register() -> None:
    """vLLM's entry point, called in each of its processes, several times maybe. Imports no model.
    Of a vLLM that is not supported, a gated model is refused when it is looked up, and no other."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from composer.adapters.gates.vllm_folder import PREFIX, SUFFIXES

    known = [name for name in ModelRegistry.get_supported_archs() if name.endswith(SUFFIXES)]
    for name in known:
        if name.startswith(PREFIX):
            continue
        gated = PREFIX + name
        ModelRegistry.register_model(gated, f"composer.vllm_plugin.model:{attribute_of(name)}")
        if (
            name in MODELS_CONFIG_MAP
        ):  # what it prepares for the architecture, it would not for ours
            MODELS_CONFIG_MAP[gated] = MODELS_CONFIG_MAP[name]


def attribute_of(architecture: str) -> str:
    """What `model` calls the class. Has vLLM's version in it, for vLLM keeps what it learns of a
    class on disk, by this name and our file's content: another version may know it otherwise."""
    return f"{architecture}@{vllm_version()}"


def vllm_version() -> str:
    from vllm.version import __version__

    return str(__version__)


def check_version(version: str) -> None:
    """Raises RuntimeError. A development build is let through: it has no number."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or version.startswith("0.0"):
        return
    minor = (int(numbers[1]), int(numbers[2]))
    if not OLDEST <= minor <= NEWEST:
        oldest, newest = (".".join(map(str, bound)) for bound in (OLDEST, NEWEST))
        raise RuntimeError(
            f"composer's gates were tested with vLLM {oldest} to {newest}, and this is {version}; "
            "install one of those, or the composer that was made for this vLLM"
        )
