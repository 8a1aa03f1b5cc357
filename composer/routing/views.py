"""Several ways to look at a query, as features: embedding, question without options, words, format.
Knows no outcome: nothing here is fitted on labels."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix

from composer.types import FloatArray

View = Literal["embedding", "stem", "words", "format"]
"""`embedding` (n, d): the query's unit vector. `stem` (n, d): that of the question without its
answer options. `words` (n, v): TF-IDF of words and pairs of words, sparse. `format` (n, f): lengths,
shares of digits, signs of code and of mathematics, standardised."""

Features = Mapping[View, Any]
"""View → (n, …) float32 array, or CSR matrix for `words`. A subset of the views that were fitted."""

Encode = Callable[[Sequence[str]], FloatArray]
"""(n,) texts → (n, d) unit rows."""


def rows_of(features: Features, chosen: npt.NDArray[Any]) -> Features:
    """Some of the queries, by number or mask."""
    return {view: values[chosen] for view, values in features.items()}
