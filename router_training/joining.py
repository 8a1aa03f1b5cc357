"""Another expert for an artefact that is trained, without training it again. Knows no file format
and no command; the numbers are `composer/routing/joining.py`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from composer.routing.joining import MAX_OUTCOMES
from composer.routing.model import LearnedModel
from composer.routing.outcomes import Outcomes
from composer.routing.views import Encode
from router_training.errors import TrainingError


def join(
    model: LearnedModel,
    expert: str,
    encode: Encode,
    *,
    claims: Sequence[str] = (),
    outcomes: Outcomes | None = None,
) -> LearnedModel:
    """With `expert`, by the texts that say what it is for and by its known outcomes: of others'
    nothing is read. On questions that the artefact was trained on the others' scores are a little
    too sure; new ones tell more. Raises TrainingError for nothing to go by or too many outcomes,
    ArtefactError for an expert that the artefact was trained on."""
    texts: tuple[str, ...] = ()
    outcome, cost = None, None
    if outcomes is not None:
        own = outcomes.of([expert])
        own = own.rows(own.known[:, 0])
        texts, outcome = own.text, own.quality[:, 0]
        if own.priced:
            cost = float(np.mean(own.cost, dtype=np.float64))
    if not texts and not claims:
        raise TrainingError(
            f"nothing is said of {expert!r} and no outcome of it is known; give examples, a "
            "description or outcomes"
        )
    if len(texts) > MAX_OUTCOMES:
        raise TrainingError(
            f"{len(texts)} outcomes of {expert!r} are known, and joining takes {MAX_OUTCOMES}; "
            "train the artefact again with them, or give fewer"
        )
    return model.joined(expert, claims, encode, texts=texts, outcome=outcome, cost=cost)
