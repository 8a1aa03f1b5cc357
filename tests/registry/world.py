"""A small registry on disk: one base model, two adapters with cards, fake families. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from pydantic import BaseModel, ConfigDict, Field
from safetensors.numpy import save_file

from composer.errors import CatalogError
from composer.registry import EngineFamily, Families, RouterFamily, StrategyFamily
from composer.types import Expert, Placement, Policy

WIDTH, VOCABULARY, LAYERS, RANK = 8, 16, 2, 2
BASE_NAME = "acme/tiny-llama"

REGISTRY = """\
version: 1
servers:
  local:
    engine: embedded
    model: ./bases/tiny
  far:
    engine: remote
    url: http://127.0.0.1:9
experts:
  fox:
    server: local
    adapter: ./adapters/fox
  general:
    server: far
    description: anything else
    context_window: 8192
    abilities: [tools, json]
    cost: {input_per_1m: 0.5, output_per_1m: 1.5}
adapters_from:
  - path: ./scanned/*
    server: local
policies:
  auto:
    router: {name: neighbours, top: 3}
    strategy: {name: single}
    experts: ["*"]
    default_expert: general
    threshold: 0.4
  twice:
    router: {name: centroid}
    strategy: {name: vote}
    experts: [fox, owl]
    k: 2
"""

CARD = """\
---
base_model: acme/tiny-llama
tags: [lora]
composer:
  description: writes like a {name}
  skills: [{name} writing]
  examples:
    - write this like a {name}
---
# {name}
"""

DEVICES = """\
devices:
  gpu: {memory_gb: 24}
  spare: {memory_gb: 8.5}
"""

PLACED = """\
    launch: {python: ./venv/bin/python, log: logs/far.log}
    placement: {device: gpu, memory_gb: 16, start_s: 40, sleep_level: 1}
"""
"""What a server of the engine `remote` may say besides."""

FULL = (
    REGISTRY.replace("servers:\n", DEVICES + "servers:\n", 1)
    .replace("    url: http://127.0.0.1:9\n", "    url: http://127.0.0.1:9\n" + PLACED)
    .replace("    k: 2\n", "    k: 2\n    max_wait_s: 30\n    parameters: [top_k]\n")
    .replace("    server: local\npol", "    server: local\n    server_path: /mnt/owls\npol")
)
"""The same registry with one of everything that has to do with devices and remote servers."""

RABBIT = {"id": "rabbit", "server": "local", "adapter": "./adapters/fox", "description": "rabbits"}
"""An expert as it is added at run time."""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class NeighboursSettings(Strict):
    top: int = Field(5, ge=1, description="Rows that count for an expert.")
    pooling: Literal["max", "mean"] = "max"


class CentroidSettings(Strict):
    pass


class AskingSettings(Strict):
    expert: str


def refuse_rabbits(policy: Policy, experts: Sequence[Expert]) -> None:
    if "rabbit" in {expert.id for expert in experts}:
        raise ValueError("'rabbit' is not known; train again")


class WholeSettings(Strict):
    of: list[str]


def need_all(policy: Policy, experts: Sequence[Expert]) -> None:
    settings = policy.router.settings
    if policy.quality is not None and {expert.id for expert in experts} != set(settings.of):
        raise ValueError("the aim needs all of them; train again")


class EmbeddedSettings(Strict):
    model: str = Field(description="Folder of the base model, or its hub name.")
    revision: str | None = None
    model_name: str | None = None
    max_lora_rank: int | None = None
    queue: int = Field(64, ge=0, description="Calls that may wait.")


class LaunchSettings(Strict):
    python: str = Field("python3", description="The interpreter.")
    log: str | None = None


class RemoteSettings(Strict):
    url: str = Field(description="Where the server listens.")
    launch: LaunchSettings | None = Field(None, description="How it is started; None: it is not.")


def check_remote(settings: RemoteSettings, placement: Placement | None) -> None:
    if placement is not None and settings.launch is None:
        raise ValueError("this server is somebody else's to stop; add `launch`, or remove it")
    if settings.launch is not None and settings.launch.log == "/dev/tty":
        raise ValueError("the log cannot be the terminal; name a file")


FAMILIES = Families(
    routers={
        "neighbours": RouterFamily(NeighboursSettings),
        "centroid": RouterFamily(CentroidSettings),
    },
    strategies={
        "single": StrategyFamily(CentroidSettings),
        "vote": StrategyFamily(CentroidSettings),
    },
    engines={
        "embedded": EngineFamily(EmbeddedSettings, frozenset({"logprobs"})),
        "remote": EngineFamily(
            RemoteSettings,
            frozenset({"tools", "json", "logprobs"}),
            model_field=None,
            path_fields=("launch.log",),
            program_fields=("launch.python",),
            parameters=frozenset({"top_k", "cache_salt"}),
            check=check_remote,
        ),
    },
)

DEMANDING = Families(
    routers={
        **FAMILIES.routers,
        "asking": RouterFamily(AskingSettings, asks=lambda settings: settings.expert),
        "picky": RouterFamily(CentroidSettings, check=refuse_rabbits),
        "whole": RouterFamily(WholeSettings, check=need_all),
    },
    strategies=FAMILIES.strategies,
    engines=FAMILIES.engines,
)
"""The same with routers that do not take everybody, or ask somebody."""


def said(error: pytest.ExceptionInfo[CatalogError]) -> list[str]:
    return [f"{problem.path}: {problem.message}" for problem in error.value.problems]


def write_world(folder: Path) -> Path:
    """Writes everything; returns the registry file."""
    write_base(folder / "bases" / "tiny")
    write_adapter(folder / "adapters" / "fox")
    write_adapter(folder / "scanned" / "owl", seed=1)
    file = folder / "experts.yaml"
    file.write_text(REGISTRY)
    return file


def write_base(folder: Path, *, name: str = BASE_NAME, width: int = WIDTH) -> None:
    folder.mkdir(parents=True)
    config = {"_name_or_path": name, "max_position_embeddings": 512, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {"model.embed_tokens.weight": np.zeros((VOCABULARY, width), np.float32)}
    for layer in range(LAYERS):
        for module in ("q_proj", "v_proj"):
            key = f"model.layers.{layer}.self_attn.{module}.weight"
            tensors[key] = np.zeros((width, width), np.float32)
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = np.ones(width, np.float32)
    save_file(tensors, folder / "model.safetensors")


def adapter_config(**changes: Any) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": BASE_NAME,
        "r": RANK,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        "lora_dropout": 0.0,
        "modules_to_save": None,
        **changes,
    }


def adapter_tensors(*, rank: int = RANK, width: int = WIDTH, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(LAYERS):
        for module in ("q_proj", "v_proj"):
            key = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{key}.lora_A.weight"] = rng.normal(size=(rank, width)).astype(np.float32)
            tensors[f"{key}.lora_B.weight"] = rng.normal(size=(width, rank)).astype(np.float32)
    return tensors


def write_adapter(
    folder: Path,
    config: dict[str, Any] | None = None,
    tensors: dict[str, Any] | None = None,
    *,
    card: bool = True,
    seed: int = 0,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = config if config is not None else adapter_config()
    tensors = tensors if tensors is not None else adapter_tensors(seed=seed)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    if card:
        (folder / "README.md").write_text(CARD.format(name=folder.name))
