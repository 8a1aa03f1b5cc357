"""Weights of a composition learnt from a few questions: LoraHub's search, LoRA Soups' softmax. The
loss is the base model's, with the exact sum of the adapters. Knows no screen."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import yaml  # type: ignore[import-untyped]
from torch import Tensor, nn

from composer.adapters.gates.build import Members
from composer.adapters.gates.hooks import Installed, Weigh
from composer.adapters.gates.stacked import GatedLayer
from composer.adapters.gates.untrained import fixed
from composer.adapters.merging import search
from composer.durable import replace_file
from router_training.errors import TrainingError
from router_training.gates.base import Base
from router_training.gates.batches import IGNORED, Batch, encoded, padded
from router_training.gates.loop import Steps, answer_loss, fit
from router_training.gates.questions import Question
from router_training.progress import Progress, silent

Way = Literal["lorahub", "soups"]

LEAST_STEPS = 100
"""Of soups, unless `epochs` says how many: the paper's one epoch is of thousands of questions, and
the few steps that few questions make leave the weights at equal shares."""


@dataclass(frozen=True, slots=True)
class Learnt:
    """`weights` (M,) of the members, which `modules` (module → (M,)) replaces where it has one.
    Losses are means over the answers' tokens of all questions: of the base alone, of equal shares,
    and of what was learnt."""

    way: Way
    weights: tuple[float, ...]
    loss_base: float
    loss_even: float
    loss: float
    modules: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


def learn(
    way: Way,
    base: Base,
    members: Members,
    questions: Sequence[Question],
    *,
    evaluations: int = 100,
    learning_rate: float = 0.02,
    epochs: int | None = None,
    tokens: int = 1500,
    seed: int = 0,
    progress: Progress = silent,
) -> Learnt:
    """`lorahub`: one weight for each member, by gradient-free search (`merging/search.py`).
    `soups`: softmax over each layer's own α, by gradients through the exact sum (LoRA Soups,
    arXiv 2410.13025, section 3). `epochs` None: as many as make LEAST_STEPS. `tokens` of a batch.
    Raises TrainingError."""
    if len(members) < 2 or not questions:
        raise TrainingError("weights are learnt of two adapters or more, on at least one question")
    batches = _batches(base, questions, tokens)
    try:
        layers = fixed(members).layers
        installed = Installed(base.model, layers, None)
    except ValueError as error:
        raise TrainingError(str(error)) from error
    with installed:
        count = len(members)

        def loss(weights: Mapping[str, Tensor] | Tensor) -> float:
            installed.weigh = _weigher(weights)
            with torch.no_grad():
                return _mean_loss(base.model, batches)

        none, even = torch.zeros(count), torch.full((count,), 1 / count)
        before = (loss(none), loss(even))
        if way == "lorahub":
            asked = 0

            def tried(weights: search.Weights) -> float:
                nonlocal asked
                asked += 1
                progress("evaluations", asked, evaluations)
                return loss(torch.tensor(weights, dtype=torch.float32))

            found = search.search(tried, count, evaluations=evaluations)
            return Learnt(way, _rounded(found.weights.tolist()), *before, found.loss)
        absent = {
            module: torch.tensor([rank == 0 for rank in layer.stacked.ranks])
            for module, layer in layers.items()
        }
        alpha = {module: nn.Parameter(torch.zeros(count)) for module in layers}

        def shares() -> dict[str, Tensor]:
            return {
                module: own.masked_fill(absent[module], -torch.inf).softmax(0)
                for module, own in alpha.items()
            }

        def training_loss(batch: Batch) -> Tensor:
            installed.weigh = _weigher(shares())
            return answer_loss(base.model, batch)

        rounds = math.ceil(LEAST_STEPS / len(batches)) if epochs is None else epochs
        steps = len(batches) * rounds
        how = Steps(steps=steps, learning_rate=learning_rate, tokens=tokens)
        stream = base.stream(questions, tokens, seed)
        fit(list(alpha.values()), training_loss, stream, how, progress)
        with torch.no_grad():
            own = shares()
            after = loss(own)
    modules = {module: _rounded(weights.tolist()) for module, weights in own.items()}
    mean = np.mean([list(weights) for weights in modules.values()], axis=0)
    return Learnt(way, _rounded(mean.tolist()), *before, after, modules)


def write_recipe(file: Path, folders: Sequence[Path], learnt: Learnt) -> None:
    """What `composition:` in experts.yaml and `composer compose --recipe` take, with the members'
    folders as they lie from the file. Whole or not at all."""
    start = file.resolve().parent
    names = [_from(start, folder) for folder in folders]
    recipe = {
        "members": dict(zip(names, learnt.weights, strict=True)),
        "method": "cat",
        **({"modules": {m: list(w) for m, w in learnt.modules.items()}} if learnt.modules else {}),
    }
    told = f"# {learnt.way}: loss {learnt.loss:.4f}; equal shares {learnt.loss_even:.4f}, "
    told += f"the base alone {learnt.loss_base:.4f}\n"
    text = told + yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None, width=100)
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, [text.encode()])


def _from(start: Path, folder: Path) -> str:
    path = os.path.relpath(folder.resolve(), start)
    return path if path.startswith(".") else f"./{path}"


def _weigher(weights: Mapping[str, Tensor] | Tensor) -> Weigh:
    def weigh(module: str, layer: GatedLayer, x: Tensor) -> Tensor:
        own = weights if isinstance(weights, Tensor) else weights[module]
        return own.to(x.device).expand(*x.shape[:-1], len(own))

    return weigh


def _batches(base: Base, questions: Sequence[Question], tokens: int) -> list[Batch]:
    """All questions once, the short ones first."""
    rows = sorted(encoded(base.tokenizer, questions, base.longest), key=lambda row: len(row[0]))
    cuts = [0]
    for i, (ids, _) in enumerate(rows):
        if i > cuts[-1] and (i + 1 - cuts[-1]) * len(ids) > tokens:
            cuts.append(i)
    bounds = pairwise([*cuts, len(rows)])
    return [padded(rows, range(a, b), base.pad) for a, b in bounds]


def _mean_loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Over all answers' tokens alike."""
    counts = [int((batch.labels[:, 1:] != IGNORED).sum()) for batch in batches]
    total = sum(
        float(answer_loss(model, batch)) * n for batch, n in zip(batches, counts, strict=True)
    )
    return total / sum(counts)


def _rounded(weights: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(weight, 6) + 0.0 for weight in weights)  # 0, not -0
