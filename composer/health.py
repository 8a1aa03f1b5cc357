"""What /health shows of a service. Decides and changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from composer.generations import Generation


@dataclass(slots=True)
class ReloadState:
    """How the last change of the registry ended."""

    at: datetime | None = None
    ok: bool = True
    problems: tuple[str, ...] = ()


async def health_of(
    generation: Generation | None,
    *,
    version: int,
    reload: ReloadState,
    left_out: Mapping[str, str],
    rest: Mapping[str, Any],
) -> dict[str, Any]:
    """`status` is ok, starting, or degraded: the last reload failed, a runtime expert was left out
    at boot, a server has failed, or the database is away; a server that is off or on its way is as
    it should be. `rest` are the other rooms' own figures, `recorder` among them."""
    engines = generation.engines if generation else {}
    healths = await asyncio.gather(*(engine.health() for engine in engines.values()))
    servers = dict(zip(engines, healths, strict=True))
    fine = (
        reload.ok
        and not left_out
        and all(server.ok for server in servers.values())
        and rest["recorder"]["database_up"]
    )
    return {
        "status": "starting" if generation is None else "ok" if fine else "degraded",
        "catalog": {
            "version": version,
            "digest": generation.catalog.digest if generation else None,
            "experts": len(generation.catalog.experts) if generation else 0,
            "left_out": dict(left_out),
            "reload": {
                "at": reload.at.isoformat() if reload.at else None,
                "ok": reload.ok,
                "problems": list(reload.problems),
            },
        },
        "servers": {
            id_: {"state": s.state, **({"reason": s.reason} if s.reason is not None else {})}
            for id_, s in servers.items()
        },
        **rest,
    }
