"""Questions to judge on that a router was trained on: counted, told, and if wanted left out. Knows
no router: only the queries it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from composer.routing.outcomes import Outcomes
from composer.routing.trained import TrainedQueries
from router_training.errors import TrainingError


@dataclass(frozen=True, slots=True)
class Overlap:
    """`trained` of the `questions` to judge on were trained on; `left_out` is whether they are
    judged no more. `trained` is None where the router does not say what it was trained on."""

    trained: int | None
    questions: int
    left_out: bool = False

    @property
    def sentence(self) -> str | None:
        """Without a full stop; None where there is nothing to tell."""
        if self.trained is None:
            return "which of the judged questions were trained on is not known"
        if not self.trained:
            return None
        share = f"{self.trained} of {self.questions} judged questions"
        told = f"{share} ({100 * self.trained / self.questions:.1f} %) were trained on (equal but "
        end = "they are left out"
        if not self.left_out:
            some = self.trained < self.questions
            remedy = "`--without-trained` leaves those out" if some else "judge on others"
            end = f"the figures over-state; {remedy}"
        return f"{told}for case, space and marks): {end}"

    def as_json(self) -> dict[str, int | bool | None]:
        return {"questions": self.trained, "of": self.questions, "left_out": self.left_out}


def parted(
    outcomes: Outcomes, trained: Sequence[TrainedQueries | None], *, without: bool
) -> tuple[Outcomes, list[Overlap]]:
    """The questions to judge on, and for each router how many of them it was trained on; with
    `without` those that any was trained on are left out. Raises TrainingError where that leaves
    nothing."""
    held = [None if one is None else one.hold(outcomes.text) for one in trained]
    overlaps = [
        Overlap(None if own is None else int(own.sum()), len(outcomes), without) for own in held
    ]
    some = np.zeros(len(outcomes), np.bool_)
    for own in held:
        if own is not None:
            some |= own
    if not without or not some.any():
        return outcomes, overlaps
    if some.all():
        raise TrainingError(
            "all questions to judge on were trained on; name others, or judge on these without "
            "--without-trained"
        )
    return outcomes.rows(~some), overlaps
