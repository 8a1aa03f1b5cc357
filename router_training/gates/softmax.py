"""Gates trained as they are served: softmax over the members' logits, by the loss of the answers.
MixLoRA, AdaMoE, MoLA and DynMoLE are settings of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from composer.adapters.gates.build import Kind, assembled, stacks
from composer.adapters.gates.files import Gate
from composer.adapters.gates.hooks import Installed
from composer.adapters.gates.prior import ROWS
from composer.adapters.gates.projection import Projection
from composer.adapters.gates.selection import Selection
from composer.adapters.gates.stacked import GatedLayer
from composer.types import Tier
from router_training.errors import TrainingError
from router_training.gates.base import (
    Bench,
    GateSettings,
    TrainedSettings,
    check_learns,
    chosen,
    selection_of,
)
from router_training.gates.batches import Batch
from router_training.gates.loop import answer_loss, fit
from router_training.gates.phatgoose import instructed, nearness, prior_settings


class SoftmaxSettings(TrainedSettings):
    """`balance` weighs the loss E·Σ f·p (MixLoRA, arXiv 2404.15159, section 3.3); `modules` are
    those gated, `selections` those that select in a way of their own (MoLA, arXiv 2402.08562:
    more experts in higher layers), both by regular expressions."""

    balance: float = Field(0.0, ge=0)
    modules: tuple[str, ...] = Field((".",), min_length=1)
    selections: Mapping[str, Selection] = Field(default_factory=dict)
    bias: bool = True
    gamma: float = Field(
        0.0, ge=0, description="Of GLIDER's prior, with which the gate is then trained; 0: none."
    )

    @property
    def embeds(self) -> bool:
        return self.gamma > 0


class Softmax:
    """One row a member and module, x·v + c, trained on all questions, whosever they are."""

    name: ClassVar[str] = "softmax"
    tier: ClassVar[Tier] = "supported"
    paper: ClassVar[str] = "arXiv 2404.15159"
    settings: ClassVar[type[GateSettings]] = SoftmaxSettings
    trained: ClassVar[bool] = True

    @staticmethod
    def make(bench: Bench, settings: SoftmaxSettings) -> Gate:
        base, questions = bench.needed("softmax")
        common = selection_of(settings)
        whole = stacks(bench.members)
        modules = chosen(list(whole), settings.modules)
        selections = _selections(modules, settings.selections, common)
        generator = torch.Generator().manual_seed(bench.seed)
        outs = len(bench.members) + common.null
        for module in modules:
            check_learns(selections.get(module, common), outs)
        rows, biases, layers = {}, {}, {}
        for module in modules:
            stacked = whole[module]
            width = stacked.a.shape[1]
            start = torch.randn(outs, width, generator=generator) * 0.1 / width**0.5
            rows[module] = nn.Parameter(start)
            biases[module] = nn.Parameter(torch.zeros(outs), requires_grad=settings.bias)
            absent = torch.tensor([r == 0 for r in stacked.ranks] + [False] * common.null)
            layers[module] = (
                stacked.to(stacked.a.device, torch.float32),
                absent,
                selections.get(module, common),
            )
        tensors: dict[str, Tensor] = {}
        prior = None
        if settings.gamma:
            tensors[ROWS] = instructed(bench, list(bench.members), {})
            near = settings.gamma * nearness(bench, questions.rows, tensors[ROWS])
            prior = torch.nn.functional.pad(near, (0, int(common.null)))
        routed = Routed(rows, biases, layers, prior, balanced=settings.balance > 0)
        parameters = [p for p in (*rows.values(), *biases.values()) if p.requires_grad]

        def loss_of(batch: Batch) -> Tensor:
            routed.begin(batch)
            loss = answer_loss(base.model, batch)
            return loss + settings.balance * routed.imbalance() if settings.balance else loss

        served = {m: routed.layer(m) for m in modules}
        with Installed(base.model, served, routed):
            told = fit(
                parameters,
                loss_of,
                base.stream(questions.rows, settings.tokens, bench.seed),
                settings,
                bench.progress,
                "gate",
            )
        kind = Kind(
            "softmax",
            "none",
            common,
            paper=Softmax.paper,
            selections=selections,
            per_request=prior is not None,
            settings={
                "training": settings.model_dump(mode="json"),
                **(prior_settings(bench, settings.gamma) if settings.gamma else {}),
            },
            report=bench.report(**told, questions=len(questions.rows)),
        )
        projections = {
            m: Projection.of(rows[m].detach(), bias=biases[m].detach() if settings.bias else None)
            for m in modules
        }
        return assembled(bench.members, projections, kind, tensors)

    @staticmethod
    def join(gate: Gate, name: str, bench: Bench) -> Gate:
        raise TrainingError(
            "a softmax gate weighs its members against each other, so one more means training it "
            "again; `arrow` and `phatgoose` take members singly"
        )


class Routed:
    """Weights of the rows as they are being trained; keeps what the balance loss needs."""

    def __init__(
        self,
        rows: Mapping[str, nn.Parameter],
        biases: Mapping[str, nn.Parameter],
        layers: Mapping[str, tuple[Any, Tensor, Selection]],
        prior: Tensor | None = None,
        *,
        balanced: bool = True,
    ) -> None:
        """`prior` (n, E) is added to the logits of each of the n questions. `imbalance` is at hand
        where it is `balanced`."""
        self._rows, self._biases, self._layers = rows, biases, layers
        self._prior, self._here = prior, torch.zeros(())
        self._real = torch.zeros(0, dtype=torch.bool)
        self._balanced = balanced
        self._balance: list[Tensor] = []

    def layer(self, module: str) -> GatedLayer:
        stacked, _, selection = self._layers[module]
        return GatedLayer(stacked, Projection(self._rows[module]), selection)

    def begin(self, batch: Batch) -> None:
        self._real, self._balance = batch.real, []
        if self._prior is not None:
            self._here = self._prior[batch.places][:, None]

    def __call__(self, module: str, layer: GatedLayer, x: Tensor) -> Tensor:
        _, absent, selection = self._layers[module]
        logits = x.float() @ self._rows[module].T + self._biases[module]
        logits = (logits + self._here).masked_fill(absent, -torch.inf)
        weights = selection.weights(logits)
        if self._balanced:
            self._balance.append(imbalance(logits, weights, selection, self._real))
        return weights

    def imbalance(self) -> Tensor:
        """The mean over modules."""
        return torch.stack(self._balance).mean()


def imbalance(logits: Tensor, weights: Tensor, selection: Selection, real: Tensor) -> Tensor:
    """E·Σ f_i p_i over all real tokens of the batch together, not of each sequence: f the members'
    shares of the places given, p their mean probability. 1 where all are used alike."""
    p = torch.softmax(logits / selection.temperature, dim=-1)[real][..., : weights.shape[-1]]
    kept = (weights[real] > 0).float()
    f = kept.mean(0) / kept.sum(-1).mean().clamp(min=1e-9)
    return weights.shape[-1] * (f.detach() * p.mean(0)).sum()


def _selections(
    modules: list[str], own: Mapping[str, Selection], common: Selection
) -> dict[str, Selection]:
    """Raises TrainingError where one disagrees about the null expert, a row of every gate."""
    found: dict[str, Selection] = {}
    for pattern, selection in own.items():
        if selection.null != common.null:
            raise TrainingError(
                f"selections: {pattern!r} and the gate disagree about `null`; set it alike"
            )
        found |= dict.fromkeys(chosen(modules, [pattern]), selection)
    return found
