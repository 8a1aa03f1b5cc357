"""A mix as it can be made: experts of one server, weights rounded to steps. Makes nothing; knows no
engine and no request."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from composer.adapters.recipe import Member, Recipe
from composer.types import Adapter, Catalog, Expert, Mix, empty

Key = tuple[
    str,
    str,
    tuple[tuple[str, float], ...],
    tuple[tuple[str, tuple[float, ...]], ...],
    int | None,
]
"""Server; method and settings; digest and weight of each member, in the order of the digests; the
weights of single modules; the server's most rank. What is equal has one key."""


def key_of(server: str, recipe: Recipe) -> Key:
    members = tuple((str(member.digest), member.weight) for member in recipe.members)
    how = f"{recipe.method} {json.dumps(dict(recipe.settings), sort_keys=True)}"
    return server, how, members, tuple(sorted(recipe.modules.items())), recipe.max_rank


def members_of(key: Key) -> set[str]:
    """The digests of its members."""
    return {digest for digest, _ in key[2]}


def quantised(weights: Sequence[float], steps: int) -> list[int]:
    """Whole numbers of 1 / `steps` that add up to `steps`, each less than one step from its share:
    the largest remainders are rounded up. Weights are not negative, and one is positive."""
    share = np.asarray(weights, np.float64)
    share = share / share.sum() * steps
    whole = np.floor(share + 1e-9)
    for i in np.argsort(-(share - whole), kind="stable")[: steps - int(whole.sum())]:
        whole[i] += 1
    return [int(one) for one in whole]


@dataclass(frozen=True, slots=True)
class Part:
    """What an expert has of a blend. `share`, of 1, is its weight, on average where modules have
    weights of their own; `steps` are those of every module, but where `modules` has a module's."""

    expert: Expert
    share: float
    steps: int
    modules: Mapping[str, int] = field(default_factory=empty)


@dataclass(frozen=True, slots=True)
class Blend:
    """`parts` are those with a share in the `mix`, in its order, or all where they count as well;
    `heaviest` has most weight in it, and says on which server; `like`, how it reads and draws.
    `left_out` could not be mixed with it."""

    mix: Mix
    heaviest: Expert
    like: Expert
    parts: tuple[Part, ...]
    base: float
    left_out: tuple[str, ...]

    @property
    def members(self) -> list[tuple[Adapter, Part]]:
        """In the order of their digests. A part without an adapter is a share of the base model,
        which adds nothing."""
        found = [(part.expert.adapter, part) for part in self.parts]
        members = [(adapter, part) for adapter, part in found if adapter is not None]
        return sorted(members, key=lambda member: member[0].digest)

    @property
    def alone(self) -> Expert | None:
        """The one who answers, where nothing is to be composed."""
        spoken = self.spoken
        if not any(part.expert.adapter for part in spoken):
            return spoken[0].expert if spoken else self._base()
        return spoken[0].expert if len(spoken) == 1 and self.base == 0 else None

    def _base(self) -> Expert:
        return replace(self.heaviest, id="1*base", adapter=None, prompt=self.like.prompt)

    @property
    def spoken(self) -> list[Part]:
        """Those with a share."""
        return [part for part in self.parts if part.share > 0]

    def recipe(self, max_rank: int | None) -> Recipe:
        members = self.members
        modules = {name: None for _, part in members for name in part.modules}
        return Recipe(
            tuple(
                Member(part.expert.id, adapter.path, part.steps / self.mix.steps, adapter.digest)
                for adapter, part in members
            ),
            self.mix.method,
            self.mix.settings,
            modules={
                name: tuple(part.modules[name] / self.mix.steps for _, part in members)
                for name in modules
            },
            max_rank=max_rank,
        )

    def expert(self, adapter: Adapter) -> Expert:
        """It can what all of its members can."""
        members = [part.expert for part in self.parts]
        return replace(
            self.heaviest,
            id="+".join(f"{part.share:g}*{part.expert.id}" for part in self.spoken),
            adapter=adapter,
            prompt=self.like.prompt,
            sampling=self.like.sampling,
            context_window=min(expert.context_window for expert in members),
            abilities=frozenset.intersection(*(expert.abilities for expert in members)),
        )


def with_whole(mix: Mix, others: Sequence[str]) -> Mix:
    """The mix, of which the `others` are members of weight 0."""
    there = {id_ for id_, _ in mix.shares}
    more = [id_ for id_ in others if id_ not in there]
    nothing = (0.0,) * len(more)
    return replace(
        mix,
        shares=(*mix.shares, *((id_, 0.0) for id_ in more)),
        modules={m: (*own[:-1], *nothing, own[-1]) for m, own in mix.modules.items()},
    )


def blended(mix: Mix, catalog: Catalog) -> Blend:
    """Experts of the server of the one with most weight, with those steps that are theirs, none
    with none; left out are those of other servers, and gates, whose weights are each token's own,
    beside those whom the mix has left out already."""
    asked = [(catalog.experts[id_], weight) for id_, weight in mix.shares]
    heaviest = max(asked, key=lambda one: one[1])[0]
    columns = [
        column
        for column, (expert, _) in enumerate(asked)
        if (expert is heaviest if _gated(heaviest) else _beside(expert, heaviest))
    ]
    experts = [asked[column][0] for column in columns]
    if mix.modules:
        parts, base = _by_module(experts, columns, mix)
    else:
        *whole, rest = quantised([*(asked[c][1] for c in columns), mix.base], mix.steps)
        base = rest / mix.steps
        parts = [
            Part(expert, own / mix.steps, own) for expert, own in zip(experts, whole, strict=True)
        ]
    stay = {expert.id for expert in experts}
    away = [expert.id for expert, weight in asked if weight > 0 and expert.id not in stay]
    kept = tuple(part for part in parts if part.share > 0 or (mix.whole and part.expert.adapter))
    like = heaviest if mix.gate is None or not mix.weighed else catalog.experts[mix.gate]
    return Blend(mix, heaviest, like, kept, base, (*mix.left_out, *away))


def _by_module(
    experts: Sequence[Expert], columns: Sequence[int], mix: Mix
) -> tuple[list[Part], float]:
    """A module that the mix does not name has no adapter."""
    rows = {}
    for module, weights in mix.modules.items():
        own = [*(weights[column] for column in columns), weights[-1]]
        rows[module] = quantised(own if any(own) else [*own[:-1], 1.0], mix.steps)
    means = [
        round(sum(column) / len(rows) / mix.steps, 6) for column in zip(*rows.values(), strict=True)
    ]
    parts = [
        Part(expert, share, 0, {module: row[place] for module, row in rows.items()})
        for place, (expert, share) in enumerate(zip(experts, means[:-1], strict=True))
    ]
    return parts, means[-1]


def _beside(expert: Expert, heaviest: Expert) -> bool:
    return expert.server == heaviest.server and not _gated(expert)


def _gated(expert: Expert) -> bool:
    return expert.adapter is not None and expert.adapter.gate is not None
