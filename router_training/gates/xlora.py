"""X-LoRA: a first pass of the base alone tells a small network, which tells every layer of the
second pass how much of which member."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, relu

from composer.adapters.gates.build import Kind, assembled, stacks
from composer.adapters.gates.files import Gate
from composer.adapters.gates.hooks import Installed
from composer.adapters.gates.projection import Projection
from composer.adapters.gates.stacked import GatedLayer
from composer.types import Tier
from router_training.errors import TrainingError
from router_training.gates.base import (
    Bench,
    GateSettings,
    TrainedSettings,
    check_learns,
    selection_of,
)
from router_training.gates.batches import Batch
from router_training.gates.loop import answer_loss, fit


class XloraSettings(TrainedSettings):
    """`hidden`: widths of the network's inner layers. `groups`: what shares weights: all modules of
    the model, those of a decoder layer (the paper's), or each for itself."""

    hidden: tuple[int, ...] = (128,)
    groups: Literal["model", "layer", "module"] = "layer"


class Xlora:
    """The last layer of the network is cut by groups into the rows and biases of the gates."""

    name: ClassVar[str] = "xlora"
    tier: ClassVar[Tier] = "experimental"
    paper: ClassVar[str] = "arXiv 2402.07148"
    settings: ClassVar[type[GateSettings]] = XloraSettings
    trained: ClassVar[bool] = True

    @staticmethod
    def make(bench: Bench, settings: XloraSettings) -> Gate:
        base, questions = bench.needed("xlora")
        selection = selection_of(settings)
        whole = stacks(bench.members)
        group = grouped(list(whole), settings.groups)
        width = base.model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
        outs = len(bench.members) + selection.null
        check_learns(selection, outs)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(bench.seed)
            inner = [nn.Linear(a, b) for a, b in pairwise((width, *settings.hidden))]
            features = settings.hidden[-1] if settings.hidden else width
            last = {name: nn.Linear(features, outs) for name in dict.fromkeys(group.values())}
        absent = {
            m: torch.tensor([r == 0 for r in s.ranks] + [False] * selection.null)
            for m, s in whole.items()
        }
        layers = {
            m: GatedLayer(
                s.to(s.a.device, torch.float32), Projection(last[group[m]].weight), selection
            )
            for m, s in whole.items()
        }
        read = Features(inner)

        def weigh(module: str, layer: GatedLayer, x: Tensor) -> Tensor:
            logits = last[group[module]](read.features)
            return selection.weights(logits.masked_fill(absent[module], -torch.inf))

        with Installed(base.model, layers, None) as installed:

            def loss_of(batch: Batch) -> Tensor:
                installed.weigh = None
                read.begin(base.model, batch.ids)
                installed.weigh = weigh
                return answer_loss(base.model, batch)

            told = fit(
                [p for layer in (*inner, *last.values()) for p in layer.parameters()],
                loss_of,
                base.stream(questions.rows, settings.tokens, bench.seed),
                settings,
                bench.progress,
                "classifier",
            )
        projections = {
            m: Projection.of(last[g].weight.detach().clone(), bias=last[g].bias.detach().clone())
            for m, g in group.items()
        }
        kind = Kind(
            "xlora",
            "none",
            selection,
            paper=Xlora.paper,
            passes=2,
            settings={"training": settings.model_dump(mode="json")},
            report=bench.report(**told, questions=len(questions.rows)),
        )
        return assembled(bench.members, projections, kind, tensors_of(inner))

    @staticmethod
    def join(gate: Gate, name: str, bench: Bench) -> Gate:
        raise TrainingError(
            "X-LoRA's network weighs its members against each other, so one more means training it "
            "again; `arrow` and `phatgoose` take members singly"
        )


class Features:
    """What the network makes of the base's last hidden state, for every token of a batch."""

    def __init__(self, inner: Sequence[nn.Linear]) -> None:
        self._inner = inner
        self.features = torch.zeros(0)

    def begin(self, model: nn.Module, ids: Tensor) -> None:
        """`model` is the base alone; no gradient goes into it."""
        out = last_hidden(model, ids)
        for layer in self._inner:
            out = relu(linear(out, layer.weight, layer.bias))
        self.features = out


@torch.no_grad()
def last_hidden(model: nn.Module, ids: Tensor) -> Tensor:
    """(rows, columns) → (rows, columns, d_model) in float32, after the final norm."""
    decoder: Any = model.get_decoder()  # type: ignore[operator]
    hidden: Tensor = decoder(input_ids=ids).last_hidden_state
    return hidden.float()


def tensors_of(inner: Sequence[nn.Linear]) -> Mapping[str, Tensor]:
    """As the engines read them: `features.0.weight`, `features.0.bias` …"""
    out = {}
    for number, layer in enumerate(inner):
        out[f"features.{number}.weight"] = layer.weight.detach()
        out[f"features.{number}.bias"] = layer.bias.detach()
    return out


def grouped(modules: Sequence[str], groups: str) -> dict[str, str]:
    """Module → its group: the first number in its name is the decoder layer's."""
    if groups == "model":
        return dict.fromkeys(modules, "")
    if groups == "module":
        return {module: module for module in modules}
    found = {}
    for module in modules:
        number = re.search(r"(?:^|\.)(\d+)\.", module)
        found[module] = module if number is None else number[1]
    return found
