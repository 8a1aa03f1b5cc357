"""Values that both what is served and what is asked are made of. Knows neither."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]

BoolArray = npt.NDArray[np.bool_]

Tier = Literal["supported", "experimental"]

Ability = Literal["tools", "json", "vision", "logprobs"]
"""What a request may need of an expert beyond text: function calls, `response_format`,
images, token log-probabilities."""

Priority = Literal["interactive", "batch"]
"""Interactive calls go before batch calls wherever both wait."""


GroupBy = Literal["all", "layers"]
"""Over which modules the weights of a gate are averaged when they are told: all, or ranges of
layers with attention and the rest apart."""


def empty() -> Mapping[str, Any]:
    """A read-only empty mapping, for defaults."""
    return MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one or more calls."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
        )
