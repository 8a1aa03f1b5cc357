"""Named pools of experts, from a file beside the data. Knows no outcome."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import orjson
from pydantic import TypeAdapter, ValidationError

from router_training.cells import listed
from router_training.errors import DataError
from router_training.tables import name_of

BESIDE = "pools.json"

_POOLS = TypeAdapter(dict[str, dict[str, list[str]]])


def read_pools(path: Path) -> Mapping[str, Mapping[str, list[str]]]:
    """Table → pool → experts. Raises DataError."""
    try:
        return _POOLS.validate_python(orjson.loads(path.read_bytes()))
    except FileNotFoundError as error:
        raise DataError.of(
            str(path), "there is no such file", "Write it, or name the experts."
        ) from error
    except (OSError, orjson.JSONDecodeError, ValidationError) as error:
        first = str(error).splitlines()[0]
        raise DataError.of(
            str(path),
            f"not a list of pools ({first})",
            'Write it so: {"TABLE": {"POOL": ["EXPERT", …]}}.',
        ) from error


def pool_of(data: Path, pool: str) -> list[str]:
    """The experts of a pool of the table `data`, as pools.json beside it says. Raises DataError."""
    path = data.parent / BESIDE
    pools = read_pools(path).get(name_of(data), {})
    if pool not in pools:
        raise DataError.of(
            str(path),
            f"there is no pool {pool!r} of {name_of(data)}",
            f"There are: {listed(list(pools)) or 'none'}.",
        )
    return pools[pool]
