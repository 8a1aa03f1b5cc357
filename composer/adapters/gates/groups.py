"""Which modules' gates are averaged when a person asks who spoke. Knows modules by name alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from composer.adapters.module_names import layer_of
from composer.types import GroupBy

RANGES = 4
"""Most ranges of layers: a picture of more says less."""


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """`of`: module → column of `names`; `sizes` are the modules of each. A module of no layer
    (lm_head) is in none."""

    names: tuple[str, ...]
    of: Mapping[str, int]
    sizes: tuple[int, ...]


@lru_cache(maxsize=64)
def grouped(modules: frozenset[str], by: GroupBy) -> Groups:
    """`all`: one group of all modules in a layer. `layers`: the layers in up to four ranges,
    attention and the rest (`mlp`) apart; without those that would be empty."""
    layers = {module: layer for module in modules if (layer := layer_of(module)) is not None}
    if by == "all":
        labels = dict.fromkeys(layers, "all")
    else:
        ranges = _ranges(layers.values())
        labels = {
            module: f"{ranges[layer]}, {'attention' if 'attn' in module else 'mlp'}"
            for module, layer in layers.items()
        }
    ordered = sorted(labels, key=lambda module: (layers[module], "attn" not in module, module))
    names = tuple(dict.fromkeys(labels[module] for module in ordered))
    of = {module: names.index(label) for module, label in labels.items()}
    sizes = tuple(list(of.values()).count(column) for column in range(len(names)))
    return Groups(names, of, sizes)


def _ranges(layers: Iterable[int]) -> dict[int, str]:
    """Layer → its range in words. The ranges are of the gated layers, equally many in each."""
    ordered = sorted(set(layers))
    count = min(RANGES, len(ordered))
    cuts = [round(number * len(ordered) / count) for number in range(count + 1)]
    words = {}
    for start, end in pairwise(cuts):
        part = ordered[start:end]
        words.update(
            dict.fromkeys(
                part, f"layers {part[0]}-{part[-1]}" if len(part) > 1 else f"layer {part[0]}"
            )
        )
    return words
