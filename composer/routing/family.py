"""What a family of trained routers is: features in, one expected quality per expert out.

A family is numbers only. What makes a router of it is the same for all: views of the query
(`views.py`), calibration, the cost of an answer, the folder they are kept in (`artefact.py`), and
`learned.py`, which serves any of them. Adding a family is its file and a line in
`families/__init__.py`, over which the tests are parametrised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from composer.routing.outcomes import Outcomes
from composer.routing.state import State as State
from composer.routing.views import Features, View
from composer.types import FloatArray, Tier


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


def decided(quality: FloatArray, known: npt.NDArray[np.bool_]) -> npt.NDArray[np.intp]:
    """(n, E) predictions → (n,) the best expert of those with a known outcome."""
    return np.asarray(np.where(known, quality, -np.inf).argmax(axis=1), np.intp)
