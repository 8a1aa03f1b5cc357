"""What a way of merging adapters is: members and weights in, one set of factors out. Knows none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict

from composer.adapters.factors import Factors, Modules
from composer.types import Tier, empty


class MergeSettings(BaseModel):
    """Base of every method's settings: frozen, and a name that there is not is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True, slots=True)
class Weights:
    """How much of each member: `all` (M,), but where `modules` has a module's own (M,)."""

    all: tuple[float, ...]
    modules: Mapping[str, tuple[float, ...]] = field(default_factory=empty)

    def of(self, module: str) -> tuple[float, ...]:
        return self.modules.get(module, self.all)

    def check(self, members: int) -> None:
        """Raises ValueError where there is not one weight for each member, in every module."""
        for where, own in (("", self.all), *((f" in {m}", w) for m, w in self.modules.items())):
            if len(own) != members:
                raise ValueError(
                    f"{len(own)} weights for {members} adapters{where}; give one for each"
                )


@dataclass(frozen=True, slots=True, eq=False)
class Merged:
    """`report` says what the method gave up, by name. `energy`: the smallest share of a module's
    squared norm, or of one member's part of it, that a cut of the method's own kept."""

    modules: Modules
    report: Mapping[str, Any] = field(default_factory=empty)
    energy: float = 1.0


class Method(Protocol):
    """`whole`: a member of weight 0 counts too, so that a query's adapter is made of all members,
    whatever their weights are for it."""

    name: ClassVar[str]
    tier: ClassVar[Tier]
    paper: ClassVar[str]
    settings: ClassVar[type[MergeSettings]]
    whole: ClassVar[bool]

    @staticmethod
    def merge(members: Sequence[Modules], weights: Weights, settings: Any) -> Merged:
        """The members, at least one, were trained on one base; a module may be missing in some.
        Deterministic. Raises ValueError ("what is wrong; the remedy") for what the method cannot
        merge."""
        ...


def aligned(
    members: Sequence[Modules], weights: Weights
) -> Mapping[str, list[tuple[float, Factors]]]:
    """Module → the members that have it, with their weights: none of weight 0. Raises ValueError
    where two members disagree on a layer's size, or the weights' number is not the members'."""
    weights.check(len(members))
    out: dict[str, list[tuple[float, Factors]]] = {}
    for module in sorted({module for member in members for module in member}):
        present = [
            (weight, member[module])
            for weight, member in zip(weights.of(module), members, strict=True)
            if module in member and weight != 0
        ]
        if len({factors.shape for _, factors in present}) > 1:
            sizes = " and ".join(str(factors.shape) for _, factors in present)
            raise ValueError(
                f"{module} is {sizes} in different adapters; merge adapters of one base model"
            )
        if present:
            out[module] = present
    if not out:
        raise ValueError("every weight is 0; give at least one adapter a weight")
    return out
