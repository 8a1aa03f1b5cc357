"""Several experts' adapters as one expert, made when a request asks for it. Knows no router, no
strategy and no concrete engine.

What stock vLLM cannot do (several adapters on one token) it can be given: their exact weighted sum
as one adapter. Queries that are alike share one, since weights are rounded (blending.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, NamedTuple

from composer.adapters.recipe import Recipe
from composer.adapters.shelf import Shelf
from composer.blending import Blend, Key, blended, key_of, members_of
from composer.errors import CatalogError, EngineError, EngineFull, Overloaded
from composer.generations import Generation, adapters_on
from composer.room import named_by, retained, spare, squeezed_in
from composer.types import Adapter, Expert, Mix, empty

log = logging.getLogger(__name__)


AGAIN_S = 5.0
"""When to try again where only compositions that are answering now stand in the way."""


class Mixed(NamedTuple):
    """Who is called, and what is told of how it came about."""

    expert: Expert
    details: Mapping[str, Any]


Mixing = Callable[[str | Mix, Generation], AbstractAsyncContextManager[Mixed]]
"""Whom to call for an expert's id or a mix, kept ready until the context ends."""


@asynccontextmanager
async def alone(asked: str | Mix, generation: Generation) -> AsyncIterator[Mixed]:
    """Where nothing can be composed: of a mix, the one with most weight."""
    id_ = asked if isinstance(asked, str) else max(asked.shares, key=lambda share: share[1])[0]
    yield Mixed(generation.catalog.experts[id_], empty())


@dataclass(slots=True)
class _Made:
    adapter: Adapter
    bytes: int
    users: int = 0


class Mixer:
    """Compositions by server, members and rounded weights; built once, loaded by the engine's own
    way for adapters, kept within a budget. Used from one event loop."""

    def __init__(
        self,
        shelf: Shelf,
        *,
        most: int,
        named: Shelf | None = None,
        seen_at: str | None = None,
        crowded: Callable[[], None] = lambda: None,
    ) -> None:
        """`most` are kept ready at once; `named` has the compositions that the registry names,
        which are kept while it does, and beyond that within a budget; `seen_at` is the first
        shelf's folder as servers in other containers see it. `crowded` is told when `trim` has
        something to do; `live`, to be set by whoever owns generations, says which there are."""
        self._shelf = shelf
        self._most = most
        self.named = named
        self._seen_at = seen_at
        self.crowded = crowded
        self.live: Callable[[], Sequence[Generation]] = tuple
        self._coming: Sequence[Generation] = ()
        self._made: dict[Key, _Made] = {}  # the longest unused first
        self._changing = asyncio.Lock()
        self.built = 0
        self.reused = 0
        self.failed = 0

    @asynccontextmanager
    async def expert(self, asked: str | Mix, generation: Generation) -> AsyncIterator[Mixed]:
        """Whom to call for it, ready on its server; kept there until the context ends. Where no
        composition can be made, the one with most weight is called alone, and `details` say why.
        An expert's id stands for itself."""
        catalog = generation.catalog
        if isinstance(asked, str):
            yield Mixed(catalog.experts[asked], empty())
            return
        began = perf_counter()
        blend = blended(asked, catalog)
        told: dict[str, Any] = {"members": {part.expert.id: part.share for part in blend.spoken}}
        if asked.gate is not None:
            told["weights"] = asked.gate if asked.weighed else "router"
        if asked.unweighed:
            told["unweighed"] = asked.unweighed
        if asked.method != "cat":
            told["method"] = asked.method
        if blend.base > 0:
            told["base"] = blend.base
        if blend.left_out:
            told["left_out"] = list(blend.left_out)
        if (one := blend.alone) is not None:
            yield Mixed(one, {"composition": told})
            return
        heaviest = blend.heaviest
        limit = getattr(catalog.servers[heaviest.server].settings, "max_lora_rank", None)
        try:
            made, built = await self._ready(blend, limit, generation)
        except (CatalogError, EngineError, OSError) as error:
            self.failed += 1
            log.warning("%r answers alone, composing failed: %s", heaviest.id, error)
            yield Mixed(heaviest, {"composition": {**told, "failed": str(error)}})
            return
        told |= {"built": built, "rank": made.adapter.rank}
        if made.adapter.composed is not None and made.adapter.composed.energy < 1:
            told["energy"] = round(made.adapter.composed.energy, 4)
        told["ms"] = round((perf_counter() - began) * 1000, 3)
        try:
            yield Mixed(blend.expert(made.adapter), {"composition": told})
        finally:
            self._leave(made)

    async def prepare(self, coming: Generation, live: Sequence[Generation]) -> None:
        """Loads the adapters of a generation that is being built, on its engines. Where one is
        full, compositions that nobody uses make room: what the registry names comes first. Raises
        EngineError, and Overloaded where those in use now would have to go. Whoever builds tells
        `dropped` where that fails, here or later."""
        self._coming = [coming]
        for server, engine in coming.engines.items():
            adapters = adapters_on(server, [coming])
            try:
                await engine.prepare(adapters)
            except EngineFull:
                async with self._changing:
                    here = [*live, coming]
                    try:
                        await squeezed_in(server, engine, adapters, here, self._users)
                    except EngineFull as full:
                        idle, busy = spare(server, engine, adapters, here, self._users)
                        if len(idle) + busy < full.over:
                            raise
                        raise Overloaded(
                            f"{full}, and {busy} of them were composed for requests that are "
                            "being answered; try again when these have ended",
                            retry_after=AGAIN_S,
                        ) from full

    def dropped(self) -> None:
        """The generation that was being built will not be served: its adapters may go."""
        self._coming = ()

    def _users(self) -> Mapping[str, int]:
        users: Counter[str] = Counter()
        for made in self._made.values():
            users[made.adapter.digest] += made.users
        return users

    async def _ready(
        self, blend: Blend, limit: int | None, generation: Generation
    ) -> tuple[_Made, bool]:
        """The composition, with one more user, loaded on its server; and whether it was built."""
        recipe = blend.recipe(limit)
        key = key_of(blend.heaviest.server, recipe)
        here = generation.mixed.setdefault(key[0], {})
        built = False
        known = self._made.get(key)
        if known is not None and known.adapter.digest in here:
            made = known
            made.users += 1
        else:
            # A task of its own: who else waits for it must not lose it to a caller that goes.
            making = asyncio.create_task(self._make(key, blend, recipe, generation))
            try:
                made, built = await asyncio.shield(making)
            except asyncio.CancelledError:
                making.add_done_callback(self._unasked)
                raise
        self._made[key] = self._made.pop(key)  # used last
        self.reused += not built
        return made, built

    def _unasked(self, making: asyncio.Task[tuple[_Made, bool]]) -> None:
        """Its caller went while it was made."""
        if not making.cancelled() and making.exception() is None:
            self._leave(making.result()[0])

    def _leave(self, made: _Made) -> None:
        made.users -= 1
        if self._unwanted(None):
            self.crowded()

    async def _make(
        self, key: Key, blend: Blend, recipe: Recipe, generation: Generation
    ) -> tuple[_Made, bool]:
        """The composition, with one more user, and whether it was built."""
        async with self._changing:
            known, built = self._made.get(key), False
            if known is None:
                made, built = await asyncio.to_thread(self._build, blend, recipe)
            else:
                made = known
            named, digest = generation.mixed.setdefault(key[0], {}), made.adapter.digest
            if known is None or digest not in named:  # else made while this waited for the lock
                before = named.get(digest)
                # Named before it is loaded: a reload that forgets what nobody names then keeps it.
                named[digest] = made.adapter
                try:
                    engine = generation.engines[key[0]]
                    here = [generation, *self.live(), *self._coming]
                    await squeezed_in(key[0], engine, [made.adapter], here, self._users)
                except BaseException:
                    if before is None:
                        del named[digest]
                    else:  # another key's, of the same adapter
                        named[digest] = before
                    self._let_go([] if key in self._made else [made])
                    raise
            self._made[key] = made
            made.users += 1  # before anybody may trim: what is in use stays
        self.built += built
        if built or self._unwanted(None):
            self.crowded()
        return made, built

    def _let_go(self, gone: Collection[_Made]) -> None:
        """Other processes may drop their folders, but for those that another server's keys name."""
        kept = {made.adapter.path for made in self._made.values()}
        for made in gone:
            if made.adapter.path not in kept:
                self._shelf.let_go(made.adapter.path)

    def _build(self, blend: Blend, recipe: Recipe) -> tuple[_Made, bool]:
        """Blocks."""
        made = self._shelf.make(recipe)
        targets = {target for adapter, _ in blend.members for target in adapter.target_modules}
        shares = zip(made.composed.members, blend.members, strict=True)
        adapter = Adapter(
            path=made.folder,
            digest=made.adapter,
            rank=made.rank,
            alpha=float(made.rank),
            target_modules=tuple(sorted(targets)),
            server_path=f"{self._seen_at}/{made.folder.name}" if self._seen_at else None,
            composed=replace(
                made.composed,
                members=tuple(replace(one, weight=part.share) for one, (_, part) in shares),
            ),
        )
        size = sum(file.stat().st_size for file in made.folder.iterdir())
        return _Made(adapter, size), made.built

    def _unwanted(self, known: Collection[str] | None) -> list[Key]:
        """Those that nobody uses now and that have a member beside the `known` digests (None:
        whatever there is), or are the longest unused of too many."""
        unused = [key for key, made in self._made.items() if made.users == 0]
        gone = [] if known is None else [k for k in unused if not members_of(k) <= set(known)]
        count = len(self._made) - len(gone)
        size = sum(made.bytes for key, made in self._made.items() if key not in gone)
        for key in unused:
            if count <= self._most and size <= self._shelf.budget:
                break
            if key not in gone:
                gone.append(key)
                count, size = count - 1, size - self._made[key].bytes
        return gone

    async def trim(self, live: Sequence[Generation]) -> None:
        """Lets go of what is too much, and of what was composed of an adapter that is served no
        more. To be called while no generation is being built: what it loads, nobody names yet."""
        known = {adapter.digest for adapter in named_by(g.catalog for g in live)}
        async with self._changing:
            self._coming = ()
            gone = {key: self._made.pop(key) for key in self._unwanted(known)}
            for (server, *_), made in gone.items():
                for generation in live:
                    generation.mixed.get(server, {}).pop(made.adapter.digest, None)
            for server in {key[0] for key in gone}:
                await retained(server, live)
            self._let_go(gone.values())
            await asyncio.to_thread(self._shelf.trim, known)
            if self.named is not None:
                paths = {adapter.path for adapter in named_by(g.catalog for g in live)}
                await asyncio.to_thread(self.named.keep, paths)

    def totals(self) -> Mapping[str, tuple[str, Callable[[], int]]]:
        """What is counted, by name: in words, and how it is read."""
        return {
            "compositions_built": ("Adapters composed for requests.", lambda: self.built),
            "compositions_reused": (
                "Requests answered by an adapter that was composed before.",
                lambda: self.reused,
            ),
            "compositions_failed": (
                "Requests answered by one expert, because no adapter could be composed.",
                lambda: self.failed,
            ),
        }

    def close(self) -> None:
        self._shelf.close()
        if self.named is not None:
            self.named.close()
