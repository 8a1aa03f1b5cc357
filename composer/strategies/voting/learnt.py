"""A trained head as a rule of counting, and the file it is kept in. Knows experts by the names they
had in training, and fits nothing.

    {"format": 1, "experts": […], "extractor": "choice", "follow": …, "curves": {"2": […]}, …}

`router-training votes` writes it. A number read back is the same to the last bit.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from composer.strategies.voting.counting import Keys, groups_of
from composer.strategies.voting.head import DOUBTS, STATE, Float64, Groups, Head


class Stop(BaseModel):
    """A bound on the expected gain, the mean number of calls it led to, and how often the answer
    was right then: cross-fitted, on the questions the head was fitted on."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    calls: float
    bound: float
    accuracy: float


class HeadFile(BaseModel):
    """Everything of a head. `curves` has, by how many are asked at once to begin with, stops in
    the order of their calls; `source` and `metrics` tell what it was made from and reached."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format: Literal[1] = 1
    experts: tuple[str, ...] = Field(min_length=2)
    extractor: str
    pattern: str | None = None
    follow: float
    best: float
    agreement: tuple[float, ...] = Field(min_length=1)
    none: tuple[float, ...] = Field(min_length=DOUBTS, max_length=DOUBTS)
    gain: tuple[tuple[float, ...], ...]
    curves: Mapping[int, tuple[Stop, ...]]
    source: Mapping[str, Any] = {}
    metrics: Mapping[str, Any] = {}

    @model_validator(mode="after")
    def _whole(self) -> HeadFile:
        if [len(row) for row in self.gain] != [STATE + 1] * len(self.agreement):
            raise ValueError(f"`gain` has not {len(self.agreement)} rows of {STATE + 1} numbers")
        return self

    @classmethod
    def load(cls, path: Path) -> HeadFile:
        """Raises ValueError ("what is wrong; the remedy")."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError as error:
            raise ValueError(
                f"there is no head at {path}; make one with `router-training votes --out …`"
            ) from error
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error}); see that it can be") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(step) for step in first["loc"]) or "the file"
            raise ValueError(
                f"{path} is no head of a vote ({where}: {first['msg']}); make it again with "
                "`router-training votes`"
            ) from error

    @classmethod
    def of(cls, head: Head, **rest: Any) -> HeadFile:
        return cls(
            follow=head.follow,
            best=head.best,
            agreement=tuple(head.agreement.tolist()),
            none=tuple(head.none.tolist()),
            gain=tuple(tuple(row) for row in head.gain.tolist()),
            **rest,
        )

    @property
    def head(self) -> Head:
        arrays = (np.asarray(part, np.float64) for part in (self.agreement, self.none, self.gain))
        return Head(self.follow, self.best, *arrays)

    def text(self) -> str:
        return json.dumps(self.model_dump(mode="json"), ensure_ascii=False, indent=1) + "\n"

    def check(
        self,
        experts: Sequence[str],
        names: Mapping[str, str],
        extractor: str,
        pattern: str | None,
    ) -> None:
        """Raises ValueError ("what is wrong; the remedy") where it was fitted for others."""
        unknown = [e for e in experts if names.get(e, e) not in self.experts]
        if unknown:
            raise ValueError(
                f"the head was not fitted for {unknown[0]!r}; fit it again with this expert's "
                "outcomes, leave the expert out of the policy, or give its name there in `names`"
            )
        if (extractor, pattern) != (self.extractor, self.pattern):
            written = f"`extractor: {self.extractor}`"
            if self.pattern is not None:
                written += f" and `pattern: {self.pattern!r}`"
            raise ValueError(
                f"the head was fitted on answers compared otherwise; write {written}, or fit it "
                "again"
            )

    def check_most(self, k: int) -> None:
        """Raises ValueError ("what is wrong; the remedy") where fewer are asked at most than on the
        questions whose mean number of calls `curves` tells."""
        most = len(self.agreement) + 1
        if k < most:
            raise ValueError(
                f"`mean_calls` was measured with up to {most} experts asked, and here at most {k} "
                f"are; set the policy's `k` to {most} over as many experts, fit the head again "
                f"with `--most {k}`, or give a `bound` in place of `mean_calls`"
            )

    def bound_for(self, first: int, calls: float) -> float:
        """The bound that leads to so many calls on average, between those tried; `first` beyond
        the head's number of calls asks them all. Raises ValueError where no bound does."""
        if first >= len(self.agreement) + 1:
            return 0.0
        stops = self.curves.get(first, ())
        if not stops or calls < stops[0].calls - 0.05:
            least = f"{stops[0].calls:.2f}" if stops else "unknown"
            raise ValueError(
                f"{calls:g} calls on average cannot be had with the first {first} asked at once "
                f"(the least is {least}); raise `mean_calls`, or lower `first`"
            )
        calls_of, bounds = ([getattr(s, key) for s in stops] for key in ("calls", "bound"))
        return float(np.interp(calls, calls_of, bounds))


class HeadRule:
    """The head over the experts of one plan: `log_odds` (k,) best first. Nobody more is asked once
    the expected gain is below `bound`. A call that was cut short is no abstention: whoever was not
    heard counts as not asked. Only the best expert's place stays, since it has a weight of its own.
    """

    def __init__(self, head: Head, log_odds: Float64, bound: float) -> None:
        self._head = head
        self._log_odds = log_odds
        self._bound = bound
        self._worth = head.worth(log_odds[None])[0]

    def winner(self, keys: Keys) -> int:
        if not any(key is not None for key in keys.values()):
            return min(keys)
        return _places(keys)[int(self._head.scores(self._groups(keys))[0].argmax())]

    def settled(self, keys: Keys, open_ranks: Collection[int]) -> bool:
        worth = self._worth[None, list(open_ranks)]
        return bool(self._head.settled(self._groups(keys), worth)[0])

    def enough(self, keys: Keys, ahead: Sequence[int]) -> str | None:
        groups = self._groups(keys)
        k = groups.place.shape[1]
        if k >= self._head.most:
            return "all_asked"
        gain = self._head.expected_gain(groups, self._log_odds[[ahead[0]]])
        return "little_to_gain" if gain[0] < self._bound else None

    def probability(self, keys: Keys) -> float | None:
        p, _ = self._head.posterior(self._groups(keys))
        return float(p.max())

    def _groups(self, keys: Keys) -> Groups:
        numbers = {key: number for number, key in enumerate(groups_of(keys))}
        places = _places(keys)
        answers = [-1 if (key := keys.get(rank)) is None else numbers[key] for rank in places]
        return Groups.of(np.array([answers]), self._log_odds[None, places])


def _places(keys: Keys) -> list[int]:
    """The ranks that the head reads, best first."""
    return sorted({0, *keys})
