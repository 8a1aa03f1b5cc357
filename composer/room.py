"""Room on engines: adapters loaded in place of compositions that nobody uses. Knows no request.

What the registry names comes before what was composed for a query, which can be loaded again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from composer.engines.base import Engine
from composer.errors import ComposerError, EngineFull
from composer.generations import Generation, adapters_on
from composer.types import Adapter, Catalog

log = logging.getLogger(__name__)

Users = Callable[[], Mapping[str, int]]
"""How many use each composition now, by its digest, the longest unused first."""


async def squeezed_in(
    server: str,
    engine: Engine,
    adapters: Collection[Adapter],
    generations: Sequence[Generation],
    users: Users,
) -> None:
    """Loaded; where there is no room, as many compositions as are too much make it. `generations`
    are all that name something on this server, one that is being built among them. Raises
    EngineError, EngineFull where even that gave no room; then nobody had to go."""
    while True:
        try:
            return await engine.prepare(adapters)
        except EngineFull as full:
            idle, _ = spare(server, engine, adapters, generations, users)
            if len(idle) < full.over:
                raise
            here = [g for g in generations if g.engines.get(server) is engine]
            for generation in here:
                for digest in idle[: full.over]:
                    generation.mixed.get(server, {}).pop(digest, None)
            await _retained(server, engine, here)


def spare(
    server: str,
    engine: Engine,
    wanted: Collection[Adapter],
    generations: Sequence[Generation],
    users: Users,
) -> tuple[list[str], int]:
    """Digests of the compositions on this engine that could go, the longest unused first, and how
    many more could if they were not in use."""
    here = [g for g in generations if g.engines.get(server) is engine]
    loaded = {digest for generation in here for digest in generation.mixed.get(server, {})}
    loaded -= {a.digest for a in (*wanted, *named_by(g.catalog for g in here))}
    now = users()
    busy = {digest for digest in loaded if now.get(digest)}
    return [digest for digest in now if digest in loaded - busy], len(busy)


def named_by(catalogs: Iterable[Catalog]) -> list[Adapter]:
    """The adapters of their experts."""
    experts = (expert for catalog in catalogs for expert in catalog.experts.values())
    return [expert.adapter for expert in experts if expert.adapter is not None]


async def retained(server: str, generations: Sequence[Generation]) -> None:
    """The server's engines forget what none of these generations names."""
    engines = {g.engines[server] for g in generations if server in g.engines}
    for engine in engines:
        here = [g for g in generations if g.engines.get(server) is engine]
        await _retained(server, engine, here)


async def _retained(server: str, engine: Engine, users: Sequence[Generation]) -> None:
    try:
        await engine.retain(adapters_on(server, users))
    except ComposerError:  # what it keeps too long is its own loss
        log.exception("server %r could not forget compositions", server)
