"""The weights of a mix by a gate: averaged over the prompt's tokens, as its model reads them. Knows
no strategy, no engine and no way of making a gate."""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from contextlib import aclosing
from dataclasses import replace

from composer.errors import ContextTooLong, EngineError, Overloaded
from composer.types import Catalog, Chunk, Expert, Gated, Mix

log = logging.getLogger(__name__)

ROUNDING = 1e-5
"""Less than this is no null expert's weight, but what rounding left of 1."""

Weigh = Callable[[Expert], AsyncGenerator[Chunk, None]]
"""A call of an expert for its gate's weights alone (`Call.weigh`)."""


async def weighed(mix: Mix, catalog: Catalog, excluded: Collection[str], weigh: Weigh) -> Mix:
    """The mix with its gate's weights: those of its experts who are members, and what a null expert
    is given as the base's share; who is none is left out. The weights it came with stand where the
    gate may not be asked, knows none of its experts or is not to be had; of the last, `unweighed`
    says why."""
    assert mix.gate is not None
    expert = None if mix.gate in excluded else catalog.experts.get(mix.gate)
    gate = None if expert is None or expert.adapter is None else expert.adapter.gate
    columns = {} if gate is None else _columns(mix, catalog, gate)
    if expert is None or not columns:
        return mix
    try:
        means = await _means(expert, weigh)
    except (EngineError, Overloaded, ContextTooLong) as error:
        log.warning("the router's weights stand, gate %r is not to be had: %s", expert.id, error)
        return replace(mix, unweighed=str(error))
    modules = {module: _shares(own, list(columns.values())) for module, own in means.items()}
    *all_, base = (
        math.fsum(column) / len(modules) for column in zip(*modules.values(), strict=True)
    )
    if not any(all_):
        return mix
    return replace(
        mix,
        shares=tuple(zip(columns, all_, strict=True)),
        base=base,
        modules=modules if mix.by_module else {},
        weighed=True,
        left_out=tuple(id_ for id_, _ in mix.shares if id_ not in columns),
    )


async def _means(expert: Expert, weigh: Weigh) -> Mapping[str, tuple[float, ...]]:
    """Raises as the call does, and EngineError where that brought no weights."""
    means = None
    async with aclosing(weigh(expert)) as chunks:
        async for chunk in chunks:
            means = chunk.weights or means
    if means is None:
        raise EngineError(f"server {expert.server!r} told no weights of the gate {expert.id!r}")
    return means


def _columns(mix: Mix, catalog: Catalog, gate: Gated) -> Mapping[str, int]:
    """Expert → its column of the gate's weights. Adapters are told by their digests; of two experts
    with one adapter, the first has it."""
    found: dict[int, str] = {}
    for id_, _ in mix.shares:
        adapter = catalog.experts[id_].adapter
        if adapter is not None and adapter.digest in gate.digests:
            found.setdefault(gate.digests.index(adapter.digest), id_)
    return {id_: column for column, id_ in found.items()}


def _shares(weights: tuple[float, ...], columns: list[int]) -> tuple[float, ...]:
    """Of the members in these columns, and last of the base: what all members leave of 1, and all
    of it where none of these has any."""
    own = [weights[column] for column in columns]
    left = 1 - math.fsum(weights)
    return (*own, left if left > ROUNDING else 0.0) if any(own) else (*own, 1.0)
