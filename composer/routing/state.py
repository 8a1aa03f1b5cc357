"""What a fitted part of a router is kept as, and how parts nest in one another. Knows no file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class State:
    """Arrays, and plain values for JSON."""

    arrays: Mapping[str, npt.NDArray[Any]]
    values: Mapping[str, Any]


def packed(parts: Mapping[str, State]) -> State:
    """Several states as one: arrays are named `part/array`, values stand under the part's name."""
    return State(
        {f"{part}/{name}": a for part, state in parts.items() for name, a in state.arrays.items()},
        {part: dict(state.values) for part, state in parts.items()},
    )


def part_of(state: State, part: str) -> State:
    """One of the states that `packed` joined."""
    start = f"{part}/"
    arrays = {n.removeprefix(start): a for n, a in state.arrays.items() if n.startswith(start)}
    return State(arrays, state.values[part])


def joined_lines(lines: tuple[str, ...]) -> npt.NDArray[np.uint8]:
    """Strings without line breaks as one array, for those too many for JSON."""
    return np.frombuffer("\n".join(lines).encode(), np.uint8)


def split_lines(array: npt.NDArray[np.uint8]) -> tuple[str, ...]:
    """The inverse of `joined_lines`, for at least one string."""
    return tuple(array.tobytes().decode().split("\n"))
