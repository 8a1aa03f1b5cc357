"""What a kind of gate is: members and questions in, a gate out. Knows none."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict, JsonValue
from torch import nn

from composer.adapters.factors import Lora
from composer.adapters.gates.build import Members
from composer.adapters.gates.files import Gate
from composer.adapters.gates.selection import Selection
from composer.routing.views import Encode
from composer.types import Tier, empty
from router_training.errors import TrainingError
from router_training.gates.batches import Batch, batches, encoded
from router_training.gates.loop import Steps
from router_training.gates.questions import Question, Questions
from router_training.progress import Progress, silent


class GateSettings(BaseModel):
    """Base of every kind's settings: frozen, and a name that there is not is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @property
    def embeds(self) -> bool:
        """Whether making the gate needs the project's embedder."""
        return False


@dataclass(frozen=True, slots=True, eq=False)
class Base:
    """The base model with its tokenizer, frozen, on the device that it is trained on. Only forward
    and backward passes go through it; hooks are taken off again."""

    model: nn.Module
    tokenizer: Any
    longest: int | None = None

    @property
    def pad(self) -> int:
        """The token that fills rows up; any will do where the tokenizer has none."""
        pad = self.tokenizer.pad_token_id
        return 0 if pad is None else int(pad)

    def stream(self, questions: Sequence[Question], tokens: int, seed: int) -> Iterator[Batch]:
        rows = encoded(self.tokenizer, questions, self.longest)
        return batches(rows, tokens, seed, self.pad)


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """What is at hand. `base`, `questions` and `encode` (the project's embedder) may be missing: a
    kind asks for what it needs. `general`: the adapter that is subtracted from all. `instructions`:
    what members that join are for, in words, where a gate reads it."""

    members: Members
    base: Base | None = None
    questions: Questions | None = None
    general: Lora | None = None
    encode: Encode | None = None
    embedder: str = ""
    embedder_digest: str = ""
    seed: int = 0
    progress: Progress = silent
    instructions: Mapping[str, str] = field(default_factory=empty)

    def needed(self, kind: str) -> tuple[Base, Questions]:
        """Raises TrainingError where one is missing."""
        if self.questions is None:
            raise TrainingError(f"a gate of kind {kind!r} is trained; name questions with --data")
        if self.base is None:
            raise TrainingError(f"a gate of kind {kind!r} is trained; name the model with --base")
        return self.base, self.questions

    def report(self, **told: JsonValue) -> Mapping[str, JsonValue]:
        """What gate.json keeps of a training."""
        data = {} if self.questions is None else {"data": self.questions.digest}
        return {"seed": self.seed, **data, **told}


class GateKind(Protocol):
    """One way to find a gate's vectors, with the settings that make it a paper's."""

    name: ClassVar[str]
    tier: ClassVar[Tier]
    paper: ClassVar[str]
    settings: ClassVar[type[GateSettings]]
    trained: ClassVar[bool]

    @staticmethod
    def make(bench: Bench, settings: Any) -> Gate:
        """Over all members of the bench. The same bench and settings give the same gate. Raises
        TrainingError, or ValueError ("what is wrong; the remedy")."""
        ...

    @staticmethod
    def join(gate: Gate, name: str, bench: Bench) -> Gate:
        """`gate` with the bench's member `name` added, by that member's own training alone; what
        the others have stays bit for bit. Raises as `make`."""
        ...


def selection_of(settings: Selection) -> Selection:
    """The part of a kind's settings that every engine reads."""
    return Selection.model_validate(settings.model_dump(include=set(Selection.model_fields)))


def check_switch(selection: Selection, outs: int) -> None:
    """Raises TrainingError where tokens of `outs` rows could never be uncertain enough."""
    switch = selection.tsallis
    if switch is not None and switch.above >= switch.highest(outs):
        raise TrainingError(
            f"tsallis: no entropy of {outs} shares is above {switch.above:g}; set `above` below "
            f"{switch.highest(outs):.3g}"
        )


def check_learns(selection: Selection, outs: int) -> None:
    """Whether the loss of a selection from `outs` rows moves them. Raises TrainingError."""
    check_switch(selection, outs)
    if selection.top_k == 1 and selection.tsallis is None and outs > 1:
        raise TrainingError(
            "top_k 1: the one kept has the weight 1 whatever its row says, so nothing is learnt; "
            "set top_k to 2 or more, or `tsallis`"
        )


class TrainedSettings(Steps, Selection, GateSettings):
    """How a gate is trained, and how it selects."""


def chosen(modules: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The modules in which a pattern (a regular expression) is found. Raises TrainingError where
    one is in none."""
    for pattern in patterns:
        if not any(re.search(pattern, module) for module in modules):
            raise TrainingError(
                f"no module of the members has {pattern!r} in it; theirs are like {modules[0]}"
            )
    return [m for m in modules if any(re.search(p, m) for p in patterns)]
