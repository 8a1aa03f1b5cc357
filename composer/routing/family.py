"""What a family of trained routers is: features in, one expected quality per expert out.

A family is numbers only. What makes a router of it is the same for all: views of the query
(`views.py`), calibration, the cost of an answer, the folder they are kept in (`artefact.py`), and
`learned.py`, which serves any of them. Adding a family is its file and a line in
`families/__init__.py`, over which the tests are parametrised.

Three things more a family may have. `suits`, a set of `Kind`: what it is for, if not tables of
outcomes alone. `grid_of_intents(outcomes)`: its grid for tables of intents. And, if it also sees
whether a question is anybody's, `predict_with_signs`: as `predict`, and (n, J) signs or None.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, Self, runtime_checkable

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from composer.routing.outcomes import Outcomes
from composer.routing.state import State as State
from composer.routing.views import Features, View
from composer.types import FloatArray, Tier

Kind = Literal["outcomes", "intents"]
"""A table's: any outcomes, or those where experts are intents (`Outcomes.of_intents`)."""


class Family(Protocol):
    """Fitted once, then only read: `predict` is safe from many threads."""

    name: ClassVar[str]
    tier: ClassVar[Tier]
    paper: ClassVar[str]
    settings: ClassVar[type[BaseModel]]

    @classmethod
    def grid(cls) -> Sequence[BaseModel]:
        """The settings that training chooses from by cross-validation, the default first."""
        ...

    @classmethod
    def views(cls, settings: Any) -> frozenset[View]:
        """The views of a query that it reads."""
        ...

    @classmethod
    def fit(cls, features: Features, outcomes: Outcomes, settings: Any, seed: int) -> Self:
        """Missing outcomes (NaN) are left out. Raises ValueError ("what is wrong; the remedy")
        for data that it cannot be fitted on."""
        ...

    def predict(self, features: Features) -> FloatArray:
        """(n, E) expected quality, finite, in the order of the outcomes' experts. Calibrated by
        others: here only their order and distances matter."""
        ...

    def state(self) -> State: ...

    @classmethod
    def restore(cls, state: State, settings: Any) -> Self:
        """The inverse of `state`: predicts the same to the last bit."""
        ...


@runtime_checkable
class BySkills(Protocol):
    """A family that reads profiles at the skills a query asks for, which it can also be told."""

    names: tuple[str, ...]

    @staticmethod
    def named(names: Sequence[str]) -> bool:
        """Whether the skills have names that mean something."""
        ...

    def weights(self, features: Features) -> FloatArray:
        """(n, K) how much each query asks for each skill, as the family infers it."""
        ...

    def weights_of(self, skills: Sequence[int]) -> FloatArray:
        """(1, K) of a query that asks for these."""
        ...

    def predict_skills(self, weight: FloatArray) -> FloatArray:
        """(n, K) weights → (n, E) expected quality, as `predict`."""
        ...

    def chances(self, weight: FloatArray) -> FloatArray:
        """(n, K) weights → (n, E) the probability of each expert, where one is to be drawn."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Predicted:
    """`quality` (n, E) as `predict` says; `signs` (n, J) of whether a question is anybody's (see
    `scope.py`), None from a family that has none."""

    quality: FloatArray
    signs: FloatArray | None


def predicted(family: Family, features: Features) -> Predicted:
    """All that a family says of these questions."""
    together: Any = getattr(family, "predict_with_signs", None)
    if together is None:
        return Predicted(family.predict(features), None)
    return Predicted(*together(features))


def decided(quality: FloatArray, known: npt.NDArray[np.bool_]) -> npt.NDArray[np.intp]:
    """(n, E) predictions → (n,) the best expert of those with a known outcome."""
    return np.asarray(np.where(known, quality, -np.inf).argmax(axis=1), np.intp)
