"""Which families a table is for, and the settings to try on it. Knows no family by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import BaseModel

from composer.routing.families import FAMILIES
from composer.routing.family import Family, Kind
from composer.routing.outcomes import Outcomes

WHY: Mapping[Kind, str] = {
    "intents": "each question is one expert's alone, and it learns what many have in common",
    "outcomes": "it is made for tables of intents, where each question is one expert's alone",
}
"""Why a family that does not say this kind of table is left out of it."""


def suits(family: type[Family]) -> frozenset[Kind]:
    """The kinds of table that a family is for: outcomes, if it says nothing."""
    own: frozenset[Kind] = getattr(family, "suits", frozenset({"outcomes"}))
    return own


def grid_of(family: type[Family], outcomes: Outcomes) -> Sequence[BaseModel]:
    """The settings to choose from: for tables of intents the family's own, where it has such."""
    own = getattr(family, "grid_of_intents", None)
    if own is not None and outcomes.of_intents:
        grid: Sequence[BaseModel] = own(outcomes)
        return grid
    return family.grid()


def suited(outcomes: Outcomes, families: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Of these families those for this kind of table, and why each other is left out. A family that
    there is not is left in, for others to refuse."""
    kind: Kind = "intents" if outcomes.of_intents else "outcomes"
    kept, left = [], {}
    for name in families:
        if name in FAMILIES and kind not in suits(FAMILIES[name]):
            left[name] = WHY[kind]
        else:
            kept.append(name)
    return kept, left
