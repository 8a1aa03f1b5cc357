"""A yardstick as plain values, so that an artefact carries what it is to be held against: the best
single expert and the rates of experts where it was trained. Knows no router."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from composer.routing.artefact import ArtefactError, Manifest
from router_training.baselines import CategoryBest
from router_training.scorecard import Yardstick

PLACE = "yardstick"


def yardstick_values(yardstick: Yardstick) -> dict[str, Any]:
    category = yardstick.category
    return {
        "best": yardstick.experts[yardstick.best],
        "rates": yardstick.rates.tolist(),
        "categories": [list(key) for key in category.row_of],
        "category_rates": category.quality.tolist(),
    }


def yardstick_of(manifest: Manifest, experts: Sequence[str]) -> Yardstick:
    """That of a manifest which training wrote, with its experts in another order; one that joined
    has its expected mean quality everywhere. Raises ArtefactError where it has none."""
    values = manifest.metrics.get(PLACE)
    own = list(manifest.known)
    late = np.array([stamp.quality for stamp in manifest.joined])
    try:
        if not isinstance(values, Mapping):
            raise TypeError("there is none")
        columns = [own.index(expert) for expert in experts]
        rates = np.concatenate([np.asarray(values["rates"], np.float64), late])[columns]
        rows = {(str(b), str(c)): row for row, (b, c) in enumerate(values["categories"])}
        trained = np.asarray(values["category_rates"], np.float64)
        quality = np.hstack([trained, np.tile(late, (len(trained), 1))])[:, columns]
        best = list(experts).index(values["best"])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ArtefactError(
            f"the manifest's {PLACE} cannot be read ({error}); train the artefact again"
        ) from error
    return Yardstick(tuple(experts), best, rates, CategoryBest(rows, quality, rates))
