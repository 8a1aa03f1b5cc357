"""The `servers:` block: each entry as a Server, with what can be read of its base model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from pydantic import BaseModel

from composer.adapters.base_model import BaseModelInfo, read_base_model
from composer.adapters.hub import fetch_base_model, is_hub_name
from composer.errors import CatalogError
from composer.registry.blocks import Block, Place, block_named, unknown_name, validate
from composer.registry.context import Context
from composer.registry.devices import make_placement
from composer.registry.families import SERVER_KEYS, EngineFamily
from composer.types import Device, Gated, Placement, Server


@dataclass(frozen=True, slots=True)
class KnownServer:
    """A server, its engine's family, and its base model (None where that cannot be read).

    `max_rank` and `context_window` (tokens) are the limits it sets to its experts, where known;
    `written` are its settings as the file has them, with paths not yet resolved.
    """

    server: Server
    family: EngineFamily
    base: BaseModelInfo | None
    max_rank: int | None
    context_window: int | None
    written: Mapping[str, Any]


_fetch_base_model = lru_cache(maxsize=64)(fetch_base_model)
"""A base on the hub is looked at once: the engine that serves it does not follow it either."""


def make_servers(
    context: Context,
    entries: Mapping[str, Any],
    devices: Mapping[str, Device],
    named: Collection[str],
) -> dict[str, KnownServer]:
    """Those servers that are right, by id; the problems of the others go to the context. `named`
    are the devices of the file, those included that are wrong themselves."""
    servers = {}
    for id_, data in entries.items():
        place = Place(context.file, ("servers", id_))
        block, problems = block_named(place, id_, data)
        context.problems += problems
        if block is None:
            continue
        placement, placed = make_placement(context, block, devices, named)
        server = _make_server(context, id_, block, placement, placed)
        if server is not None:
            servers[id_] = server
    return servers


def _make_server(
    context: Context, id_: str, block: Block, placement: Placement | None, placed: bool
) -> KnownServer | None:
    known = list(context.families.engines)
    engine = block.data.get("engine")
    if engine is None:
        choice = ", ".join(f"`{name}`" for name in known)
        context.problems.append(
            block.problem(("engine",), "it is missing", f"Add one of {choice}.")
        )
        return None
    family = context.families.engines.get(engine) if isinstance(engine, str) else None
    if family is None:
        context.problems.append(block.problem(("engine",), *unknown_name("engine", engine, known)))
        return None

    data = {key: value for key, value in block.data.items() if key not in SERVER_KEYS}
    as_written = _locate(context, data, family)
    settings, problems = validate(family.settings, replace(block, data=data), beside=SERVER_KEYS)
    context.problems += problems
    if settings is None:
        return None
    if placed:
        _check_fit(context, block, family, settings, placement)
    _look_around(context, block, family, settings)
    dump = settings.model_dump(mode="json")
    for path, value in as_written.items():
        _put(dump, path, value)
    field = family.model_field
    written = block.data.get(field) if field is not None else None
    base = _read_base(context, block, field, written, settings)
    gate = _gate_inside(context, block, family, base)
    windows = (getattr(settings, "context_window", None), base.context_window if base else None)
    return KnownServer(
        server=Server(
            id=id_, engine=str(engine), settings=settings, placement=placement, gate=gate
        ),
        family=family,
        base=base,
        max_rank=getattr(settings, "max_lora_rank", None),
        context_window=min((tokens for tokens in windows if tokens is not None), default=None),
        written=dump,
    )


def _check_fit(
    context: Context,
    block: Block,
    family: EngineFamily,
    settings: BaseModel,
    placement: Placement | None,
) -> None:
    try:
        family.check(settings, placement)
    except ValueError as error:
        message, _, remedy = str(error).partition("; ")
        path = () if placement is None else ("placement",)
        context.problems.append(block.problem(path, message, f"{remedy[:1].upper()}{remedy[1:]}."))


def _look_around(context: Context, block: Block, family: EngineFamily, settings: BaseModel) -> None:
    """Warns of what the server needs and this machine, as it is now, lacks. No problem of the
    file: it may be checked on one machine and served on another."""
    dump = settings.model_dump(mode="json")
    for dotted in family.program_fields:
        path = tuple(dotted.split("."))
        program = _get(dump, path)
        if isinstance(program, str) and shutil.which(program) is None:
            message = f"there is no program {program} on this machine"
            remedy = "Install it there, or correct the path."
            context.warnings.append(block.problem(path, message, remedy))
    variable = getattr(settings, "api_key_env", None)
    if isinstance(variable, str) and not os.environ.get(variable):
        message = f"the environment variable {variable!r} is not set"
        remedy = "Set it to the server's API key before the service starts, or its calls fail."
        context.warnings.append(block.problem(("api_key_env",), message, remedy))


def _locate(
    context: Context, data: dict[str, Any], family: EngineFamily
) -> dict[tuple[str, ...], Any]:
    """Makes the paths among the settings start at the registry's folder; returns those that it
    changed as they were written. A program's path is not resolved: a virtual environment's
    python is a link, and what it is depends on where the link lies."""

    def start(written: Any, *, may_be_bare: bool) -> Any:
        if isinstance(written, list):
            return [start(one, may_be_bare=may_be_bare) for one in written]
        if not isinstance(written, str) or not written:
            return written
        if may_be_bare and "/" not in written and not written.startswith("~"):
            return written
        return os.path.abspath(context.located(written))

    as_written: dict[tuple[str, ...], Any] = {}
    for dotted in (*family.path_fields, *family.program_fields):
        path = tuple(dotted.split("."))
        written = _get(data, path)
        started = start(written, may_be_bare=dotted in family.program_fields)
        if started != written:
            as_written[path] = written
            _put(data, path, started)
    field = family.model_field
    written = data.get(field) if field is not None else None
    if field is not None and isinstance(written, str):
        as_written[(field,)] = written
        if _is_path(context, written):
            data[field] = str(context.located(written).resolve())
    return as_written


def _get(data: Mapping[str, Any], path: Sequence[str]) -> Any:
    at: Any = data
    for step in path:
        at = at.get(step) if isinstance(at, Mapping) else None
    return at


def _put(data: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Sets what is there, in copies: what is below `data` may be somebody else's."""
    *steps, last = path
    for step in steps:
        data[step] = dict(data[step])
        data = data[step]
    data[last] = value


def _read_base(
    context: Context, block: Block, field: str | None, written: object, settings: BaseModel
) -> BaseModelInfo | None:
    if field is None or not isinstance(written, str):
        return None
    own_name = getattr(settings, "model_name", None)
    names = (own_name,) if isinstance(own_name, str) and own_name else ()
    try:
        if _is_path(context, written):
            folder = context.located(written)
            context.look(folder)
            return read_base_model(folder, (*names, written))
        if is_hub_name(written):
            return _fetch_base_model(written, getattr(settings, "revision", None), names)
    except CatalogError as error:
        for problem in error.problems:
            where = f"{problem.file}: " if problem.file else ""
            context.problems.append(
                block.problem((field,), f"{where}{problem.message}", problem.remedy)
            )
        return None
    context.problems.append(
        block.problem(
            (field,),
            f"{written!r} is neither a folder nor a name on the hub",
            "Write ./folder, or org/name.",
        )
    )
    return None


def _gate_inside(
    context: Context, block: Block, family: EngineFamily, base: BaseModelInfo | None
) -> Gated | None:
    field = family.model_field
    if field is None or base is None or base.gate is None:
        return None
    if "gate" in family.adapter_features:  # it would read the weights and pass over the gate
        message = "this model has a gate inside, which is for vLLM"
        remedy = "Name the base's folder, and the gate's as the `gate` of an expert."
        context.problems.append(block.problem((field,), message, remedy))
        return None
    from composer.adapters.gates.vllm_folder import gate_inside  # has torch, which few servers need

    try:
        return gate_inside(base.gate)
    except ValueError as error:
        message, _, remedy = str(error).partition("; ")
        context.problems.append(block.problem((field,), message, f"{remedy.capitalize()}."))
        return None


def _is_path(context: Context, written: str) -> bool:
    """A folder that is there, or what could be nothing else; `org/name` that is no folder is a
    name on the hub."""
    if written.startswith((".", "/", "~")) or os.path.isdir(context.located(written)):
        return True
    return "/" in written and not is_hub_name(written)
