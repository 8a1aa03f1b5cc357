"""The `keys:` block: callers' keys, and whom each excludes. Knows no request."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

from composer.registry.blocks import Block, Place, block_named, unknown_name, validate
from composer.registry.context import Context
from composer.registry.specs import KeySpec
from composer.types import ApiKey


def make_keys(
    context: Context, entries: Mapping[str, Any], experts: Sequence[str]
) -> dict[str, ApiKey]:
    """Those keys that are right, by name; the problems of the others go to the context. `experts`
    are the ids that there are. A variable that is not set is a warning: nobody has that key."""
    keys: dict[str, ApiKey] = {}
    for id_, data in entries.items():
        place = Place(context.file, ("keys", id_))
        block, problems = block_named(place, id_, data)
        context.problems += problems
        if block is None:
            continue
        spec, problems = validate(KeySpec, block)
        context.problems += problems
        if spec is None:
            continue
        for number, expert in enumerate(spec.exclude):
            if expert in experts:
                continue
            if expert in context.left_out:
                context.warn_left_out(block.at(("exclude", number)), expert, "nobody can ask it")
            elif not context.experts_missing:
                message, remedy = unknown_name("expert", expert, experts)
                context.problems.append(block.problem(("exclude", number), message, remedy))
        digest = _digest(context, block, spec.key_env, list(keys.values()))
        keys[id_] = ApiKey(id_, spec.key_env, digest, frozenset(spec.exclude), spec.admin)
    return keys


def _digest(
    context: Context, block: Block, variable: str, others: Sequence[ApiKey]
) -> bytes | None:
    secret = os.environ.get(variable, "").strip()
    if not secret:
        message = f"the environment variable {variable!r} is not set"
        remedy = "Set it to the caller's key before the service starts, or nobody can use it."
        context.warnings.append(block.problem(("key_env",), message, remedy))
        return None
    digest = hashlib.sha256(secret.encode()).digest()
    if same := [key.id for key in others if key.digest == digest]:
        message = f"it is the key of {same[0]!r} too, and that one's exclusions would hold"
        context.problems.append(block.problem(("key_env",), message, "Give each its own key."))
    return digest
