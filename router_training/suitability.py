"""How near what experts say of themselves comes to a task's examples. Knows no outcome."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from composer.routing.views import Encode
from composer.types import FloatArray


def nearness(
    claims: Sequence[Sequence[str]], examples: Sequence[str], encode: Encode
) -> FloatArray:
    """(E,) the mean over the examples of the cosine with the nearest of an expert's texts."""
    task = encode(list(examples))  # (n, d)
    return np.array([(task @ encode(list(own)).T).max(axis=1).mean() for own in claims], np.float32)
