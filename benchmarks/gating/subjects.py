"""The miniature experts as members of gates, and the questions that they are judged and trained on.
Knows no way of mixing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gating.answering import Asked
from composer.adapters.factors import Factors, Lora, Modules, read_lora
from composer.adapters.gates.build import Members
from composer.routing.views import Encode
from examples.tiny import experts
from examples.tiny.segments import NAMES
from examples.tiny.tasks import SKILLS, CompositeItem, Item, composite_pairs, sample_composites
from router_training.gates.base import Base
from router_training.gates.loading import base_in
from router_training.gates.questions import Question, Questions

PLACE = {name: i for i, name in enumerate(NAMES)}


@dataclass(frozen=True, slots=True)
class Size:
    """Questions of each skill and of each pair of skills; rows of training data; steps of a gate
    and of a member, tokens of their batches; examples of a task and tries of LoraHub's search.
    """

    held_in: int
    composite: int
    single_rows: int
    composite_rows: int
    steps: int
    member_steps: int
    tokens: int
    member_tokens: int
    shots: int = 5
    searched: int = 60


@dataclass(frozen=True, slots=True, eq=False)
class Subjects:
    base: Base
    members: Members

    @property
    def mean(self) -> Modules:
        """What all members have in common: their mean ΔW, exactly, by concatenation."""
        loras = list(self.members.values())
        out = {}
        for module in loras[0].modules:
            own = [lora.modules[module] for lora in loras]
            a = torch.cat([f.a.float() for f in own])
            b = torch.cat([f.b.float() * (f.scale / len(own)) for f in own], dim=1)
            out[module] = Factors(a, b)
        return out

    @property
    def general(self) -> Lora:
        return Lora(self.mean, next(iter(self.members.values())).base, "mean")


def load() -> Subjects:
    """The base that carries its instructions, and its ten experts."""
    members = {name: read_lora(experts.expert_folder("instructed", name)) for name in NAMES}
    return Subjects(base_in(experts.base_folder("instructed")), members)


def held_in(size: Size, seed: int) -> list[Asked]:
    items = [item for skill in SKILLS.values() for item in skill.sample("test", size.held_in, seed)]
    return [_asked(item) for item in items]


def composites(size: Size, seed: int) -> list[Asked]:
    """Of pairs of skills that nothing was trained on."""
    pairs = composite_pairs("unseen")
    return [_asked(x) for x in sample_composites("test", size.composite * len(pairs), seed, pairs)]


def single_questions(size: Size, seed: int) -> Questions:
    rows = [
        Question(item.prompt, item.answer, name)
        for name, skill in SKILLS.items()
        for item in skill.sample("train", size.single_rows, seed)
    ]
    return Questions("single", tuple(rows))


def all_questions(size: Size, seed: int) -> Questions:
    """Of single skills, and of pairs that are not judged."""
    pairs = composite_pairs("seen")
    mixed = sample_composites("train", size.composite_rows, seed, pairs)
    both = [Question(item.prompt, item.answer) for item in mixed]
    return Questions("all", (*single_questions(size, seed).rows, *both))


def few_of(skills: tuple[int, ...], n: int, seed: int) -> list[Question]:
    """`n` questions of one task, a skill or a pair of them, of training inputs."""
    names = [NAMES[place] for place in skills]
    items: Sequence[Item | CompositeItem]
    if len(names) == 1:
        items = SKILLS[names[0]].sample("train", n, seed)
    else:
        items = sample_composites("train", n, seed, ((names[0], names[1]),))
    return [Question(item.prompt, item.answer) for item in items]


def cosines(encode: Encode, asked: list[Asked], own: Questions) -> tuple[Tensor, Tensor]:
    """(n, E) each question's cosine to its nearest of each member's examples, and to their mean."""
    rows = {name: _encoded(encode, [q.prompt for q in own.of(name)]) for name in NAMES}
    asked_rows = _encoded(encode, [a.prompt for a in asked])
    nearest = [(asked_rows @ rows[name].T).max(1) for name in NAMES]
    means = [rows[name].mean(0) for name in NAMES]
    central = [asked_rows @ (mean / np.linalg.norm(mean)) for mean in means]
    return tuple(torch.from_numpy(np.stack(x, 1)).float() for x in (nearest, central))  # type: ignore[return-value]


def _encoded(encode: Encode, texts: list[str]) -> Any:
    return np.asarray(encode(texts), np.float32)


def _asked(item: Item | CompositeItem) -> Asked:
    parts = item.parts if isinstance(item, CompositeItem) else (item,)
    return Asked(item.prompt, item.answer, tuple(PLACE[part.skill] for part in parts))
