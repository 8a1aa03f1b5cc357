"""PHATGOOSE: each member learns, alone and on its own questions, which inputs are its own. GLIDER
adds how near a request is to a member's instruction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field, JsonValue
from torch import Tensor, nn

from composer.adapters.factors import Lora
from composer.adapters.gates.build import Kind, assembled, joined, stacks
from composer.adapters.gates.files import Gate
from composer.adapters.gates.hooks import Installed
from composer.adapters.gates.prior import ROWS
from composer.adapters.gates.projection import Projection
from composer.adapters.gates.selection import Selection
from composer.adapters.gates.stacked import GatedLayer, Stacked
from composer.types import Tier
from router_training.errors import TrainingError
from router_training.gates.base import (
    Base,
    Bench,
    GateSettings,
    TrainedSettings,
    check_switch,
    selection_of,
)
from router_training.gates.batches import encoded, padded
from router_training.gates.loop import Steps, answer_loss, fit
from router_training.gates.questions import Question, Questions


class PhatgooseSettings(TrainedSettings):
    steps: int = Field(100, ge=1, description="Of each member.")
    top_k: int | None = Field(2, ge=1)


class GliderSettings(PhatgooseSettings):
    """`gammas` are tried on a part of the questions that no vector was trained on."""

    gammas: tuple[float, ...] = Field((0.0, 1.0, 3.0, 10.0, 30.0), min_length=1)
    instructions: Mapping[str, str] = Field(
        default_factory=dict, description="Member → what it is for; default: its questions' mean."
    )
    kept_apart: float = Field(0.1, gt=0, lt=1, description="Share of the questions for γ.")

    @property
    def embeds(self) -> bool:
        return True


class Phatgoose:
    """One sigmoid-gated vector a module, from zero, with the adapter frozen; served standardised,
    as logits."""

    name: ClassVar[str] = "phatgoose"
    tier: ClassVar[Tier] = "supported"
    paper: ClassVar[str] = "arXiv 2402.05859"
    settings: ClassVar[type[GateSettings]] = PhatgooseSettings
    trained: ClassVar[bool] = True

    @staticmethod
    def make(bench: Bench, settings: PhatgooseSettings) -> Gate:
        base, questions = bench.needed("phatgoose")
        if settings.null:
            raise TrainingError(
                "members learn each alone, so nobody learns a null expert's row; use kind softmax"
            )
        check_switch(selection_of(settings), len(bench.members))
        questions.check_experts(list(bench.members))
        own = {name: questions.of(name) for name in bench.members}
        vectors: dict[str, Mapping[str, Tensor]] = {}
        told: dict[str, JsonValue] = {}
        for name, lora in bench.members.items():
            vectors[name], told[name] = trained(bench, base, name, lora, own[name], settings)
        kind = Kind(
            "phatgoose",
            "standardised",
            selection_of(settings),
            paper=Phatgoose.paper,
            settings={"steps": _steps(settings).model_dump(mode="json")},
            report=bench.report(members=told),
        )
        return assembled(bench.members, _projections(bench, vectors), kind)

    @staticmethod
    def join(gate: Gate, name: str, bench: Bench) -> Gate:
        base, questions = bench.needed("phatgoose")
        _check_instructions(gate, bench)
        how = Steps.model_validate(gate.manifest.settings["steps"])
        own = questions.of(name)
        lora = bench.members[name]
        vectors, told = trained(bench, base, name, lora, own, how)
        rows = {m: Projection.of(v[None], "standardised").rows[0] for m, v in vectors.items()}
        tensors = {}
        if ROWS in gate.tensors:
            tensors[ROWS] = _instruction(bench, name, own, bench.instructions)
        return _told(joined(gate, name, lora, rows, tensors), name, told)


class Glider:
    """PHATGOOSE's logits + γ·cos(request, instruction), one γ for all."""

    name: ClassVar[str] = "glider"
    tier: ClassVar[Tier] = "experimental"
    paper: ClassVar[str] = "arXiv 2410.07172"
    settings: ClassVar[type[GateSettings]] = GliderSettings
    trained: ClassVar[bool] = True

    @staticmethod
    def make(bench: Bench, settings: GliderSettings) -> Gate:
        base, questions = bench.needed("glider")
        rng = np.random.default_rng(bench.seed)
        order = rng.permutation(len(questions.rows))
        apart = max(1, round(settings.kept_apart * len(order)))
        judged = [questions.rows[i] for i in order[:apart]]
        learnt = tuple(questions.rows[i] for i in sorted(order[apart:]))
        rest = replace(bench, questions=Questions(questions.source, learnt))
        return with_instructions(
            Phatgoose.make(rest, _phatgoose(settings)), rest, base, judged, settings
        )

    @staticmethod
    def join(gate: Gate, name: str, bench: Bench) -> Gate:
        return Phatgoose.join(gate, name, bench)


def _check_instructions(gate: Gate, bench: Bench) -> None:
    """Before anything is trained. Raises TrainingError where the members that join would be told
    from the others by another embedder, or by words that nobody reads."""
    if ROWS not in gate.tensors:
        if bench.instructions:
            raise TrainingError(
                f"a gate of kind {gate.manifest.kind!r} reads no instructions; leave them out"
            )
        return
    settings = gate.manifest.settings
    if settings.get("embedder_digest", "") != bench.embedder_digest:
        raise TrainingError(
            f"the gate's instructions were embedded by {settings.get('embedder')!r} "
            f"({settings.get('embedder_digest')}), not by {bench.embedder!r} "
            f"({bench.embedder_digest}); set COMPOSER_EMBEDDER to the gate's"
        )
    if strangers := sorted(set(bench.instructions) - set(bench.members)):
        raise TrainingError(
            f"an instruction is for {strangers[0]!r}, who does not join; name one of "
            f"{', '.join(bench.members)}"
        )


def with_instructions(
    gate: Gate, bench: Bench, base: Base, judged: Sequence[Question], settings: GliderSettings
) -> Gate:
    """A PHATGOOSE gate made GLIDER's: of `settings.gammas` the one of least loss on `judged`, which
    no vector of it was trained on. Raises TrainingError without an embedder."""
    rows = instructed(bench, gate.members, settings.instructions)
    near = nearness(bench, judged, rows)
    losses = {g: _loss_at(base, gate, judged, near * g) for g in settings.gammas}
    gamma = min(losses, key=lambda g: (losses[g], g))
    told = {
        "kind": "glider",
        "paper": Glider.paper,
        "per_request": True,
        "settings": {**gate.manifest.settings, **prior_settings(bench, gamma)},
        "report": {**gate.manifest.report, "gammas": {str(g): loss for g, loss in losses.items()}},
    }
    return Gate(gate.manifest.model_copy(update=told), gate.layers, {ROWS: rows})


def trained(
    bench: Bench, base: Base, name: str, lora: Lora, own: Sequence[Question], how: Steps
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Module → v (d_in,) of one member, and what its training told. W h + σ(v·h)·s·B A h (Muqeeth
    et al., arXiv 2402.05859, section 3.1)."""
    stacked = stacks({name: lora})
    vectors = {m: nn.Parameter(torch.zeros(s.a.shape[1])) for m, s in stacked.items()}
    layers = {
        m: GatedLayer(s.to(s.a.device, torch.float32), Projection(v[None]), Selection())
        for (m, s), v in zip(stacked.items(), vectors.values(), strict=True)
    }

    def weigh(module: str, layer: GatedLayer, x: Tensor) -> Tensor:
        return torch.sigmoid(x.float() @ vectors[module])[..., None]

    stream = base.stream(own, how.tokens, bench.seed)
    with Installed(base.model, layers, weigh):
        told = fit(
            list(vectors.values()),
            lambda batch: answer_loss(base.model, batch),
            stream,
            how,
            bench.progress,
            name,
        )
    return {m: v.detach().clone() for m, v in vectors.items()}, {**told, "questions": len(own)}


def _projections(
    bench: Bench, vectors: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Projection]:
    """Each row is made of its own vector alone, so that who joins later leaves the others' bits."""
    widths: dict[str, Stacked] = stacks(bench.members)
    out = {}
    for module, stacked in widths.items():
        zero = torch.zeros(stacked.a.shape[1])
        rows = [
            Projection.of(vectors[name].get(module, zero)[None], "standardised").rows
            for name in bench.members
        ]
        out[module] = Projection(torch.cat(rows), "standardised")
    return out


def instructed(bench: Bench, members: Sequence[str], told: Mapping[str, str]) -> Tensor:
    """(E, dim) unit rows: the embedding of a member's instruction, else the mean of its questions'.
    Raises TrainingError without questions or embedder."""
    if bench.questions is None:
        raise TrainingError("the members' questions are needed; name them with --data")
    return torch.stack(
        [_instruction(bench, name, bench.questions.of(name), told) for name in members]
    )


def prior_settings(bench: Bench, gamma: float) -> dict[str, Any]:
    """What an engine must know to compute the prior of a request."""
    return {
        "gamma": gamma,
        "embedder": bench.embedder,
        "embedder_digest": bench.embedder_digest,
    }


def nearness(bench: Bench, asked: Sequence[Question], rows: Tensor) -> Tensor:
    """(n, E) cosines of the questions' prompts to the members' instructions."""
    return torch.from_numpy(_encoded(bench, [q.prompt for q in asked])) @ rows.T


def _instruction(
    bench: Bench, name: str, own: Sequence[Question], told: Mapping[str, str]
) -> Tensor:
    texts = [told[name]] if name in told else [q.prompt for q in own[:1000]]
    mean = _encoded(bench, texts).mean(axis=0)
    return torch.from_numpy(mean / max(float(np.linalg.norm(mean)), 1e-12)).float()


def _encoded(bench: Bench, texts: Sequence[str]) -> Any:
    if bench.encode is None:
        raise TrainingError("GLIDER needs the embedder; set COMPOSER_EMBEDDER to one")
    return np.asarray(bench.encode(list(texts)), np.float32)


@torch.no_grad()
def _loss_at(base: Base, gate: Gate, judged: Sequence[Question], prior: Tensor) -> float:
    rows = encoded(base.tokenizer, judged, base.longest)
    total, count = 0.0, 0
    for start in range(0, len(rows), 32):
        batch = padded(rows, range(start, min(start + 32, len(rows))), base.pad)
        here = prior[batch.places][:, None]

        def weigh(module: str, layer: GatedLayer, x: Tensor, here: Tensor = here) -> Tensor:
            return layer.weights(x, here)

        with Installed(base.model, gate.layers, weigh):
            total += float(answer_loss(base.model, batch)) * len(here)
        count += len(here)
    return total / count


def _told(gate: Gate, name: str, told: Mapping[str, Any]) -> Gate:
    report = dict(gate.manifest.report)
    members = report.get("members")
    report["members"] = {**(members if isinstance(members, dict) else {}), name: dict(told)}
    return Gate(gate.manifest.model_copy(update={"report": report}), gate.layers, gate.tensors)


def _steps(settings: Steps) -> Steps:
    return Steps.model_validate(settings.model_dump(include=set(Steps.model_fields)))


def _phatgoose(settings: GliderSettings) -> PhatgooseSettings:
    fields = set(PhatgooseSettings.model_fields)
    return PhatgooseSettings.model_validate(settings.model_dump(include=fields))
