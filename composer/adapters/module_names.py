"""What the names of a decoder's modules say: the layer, and the place in it. Loads nothing."""

from __future__ import annotations

import re
from typing import NamedTuple

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")

_PLACE = re.compile(
    r"(?:[^.\d][^.]*\.){2,}(?P<layer>\d+)\.(?P<inner>(?:[^.\d][^.]*\.)*)(?P<last>[^.\d][^.]*)"
)


class Place(NamedTuple):
    """`inner` is what stands between the layer's number and the last name, with its dots."""

    layer: int
    inner: str
    last: str


def layer_of(module: str) -> int | None:
    """The first number in the name, which is the layer's; None for a module of no layer."""
    found = _LAYER.search(module)
    return None if found is None else int(found[1])


def place_of(module: str) -> Place | None:
    """As peft finds a layer (`layers_to_transform`), where its number is the only one: those of
    experts are others. None where peft would not, or might find another."""
    found = _PLACE.fullmatch(module)
    return None if found is None else Place(int(found["layer"]), found["inner"], found["last"])
