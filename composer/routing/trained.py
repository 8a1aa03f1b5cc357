"""Which queries an artefact was trained on, told by digests alone: enough to say that a question it
is judged on is no new one. Knows no router and no file."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from composer.routing.state import State
from composer.types import BoolArray

_NEITHER = re.compile(r"[\W_]+")


def normalised(question: str) -> str:
    """Letters and digits alone, in one case: what two copies of a question have in common. A text
    without any keeps its signs."""
    return _NEITHER.sub("", question.casefold()) or " ".join(question.split())


def digests_of(texts: Sequence[str]) -> npt.NDArray[np.uint64]:
    """(n,) 64 bits of SHA-256 of each text, `normalised`. Among 10,000 trained queries a new one is
    taken for one of them once in 10^15."""
    found = [
        hashlib.sha256(normalised(text).encode("utf-8", "surrogatepass")).digest() for text in texts
    ]
    return np.frombuffer(b"".join(one[:8] for one in found), "<u8").astype(np.uint64)


@dataclass(frozen=True, slots=True, eq=False)
class TrainedQueries:
    """`digests` (m,) sorted, each once: 8 bytes a query."""

    digests: npt.NDArray[np.uint64]

    @classmethod
    def of(cls, texts: Sequence[str]) -> TrainedQueries:
        return cls(np.unique(digests_of(texts)))

    def also(self, texts: Sequence[str]) -> TrainedQueries:
        """These and others."""
        return TrainedQueries(np.union1d(self.digests, digests_of(texts)))

    def hold(self, texts: Sequence[str]) -> BoolArray:
        """(n,) which of these texts are among them."""
        return np.asarray(np.isin(digests_of(texts), self.digests), np.bool_)

    def state(self) -> State:
        return State({"digests": self.digests}, {})

    @classmethod
    def restore(cls, state: State) -> TrainedQueries:
        return cls(np.asarray(state.arrays["digests"], np.uint64))
