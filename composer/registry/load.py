"""experts.yaml and the runtime experts → one frozen Catalog, or every problem at once.

Boot and reload are this one function. It reads files, cards and adapters, composes adapters, and
asks the hub for what is named there; it builds no router and starts no engine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from composer.adapters.cache import FileCache
from composer.adapters.shelf import Shelf
from composer.errors import CatalogError, Problem
from composer.registry.blocks import Place, block_at, unknown_name, validate
from composer.registry.context import Context
from composer.registry.devices import make_devices
from composer.registry.experts import prepare
from composer.registry.families import Families
from composer.registry.gather import gather
from composer.registry.keys import make_keys
from composer.registry.policies import make_policies
from composer.registry.servers import KnownServer, make_servers
from composer.registry.specs import FileSpec
from composer.registry.stamps import Stamp, Stamps, stamp
from composer.source import Document, parse_yaml
from composer.types import ApiKey, Catalog, Component, Device, Expert, Policy

_CACHE = FileCache()
"""Shared by all loads of a process: its keys are the files' own stamps, so it holds no state
that another load could notice."""


_OTHER_KEYS = {"version", "devices", "servers", "policies", "keys", "default_policy"}
"""Top-level keys that are wrong without any expert being lost by it."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A catalog, and the files and folders whose change would change it, each with its stamp
    from before it was read. `skipped` are run-time experts that were left out, by id, and why;
    `warnings` what is right as written and will not work on this machine as it is."""

    catalog: Catalog
    watched: Stamps
    skipped: Mapping[str, tuple[Problem, ...]] = field(default_factory=dict)
    warnings: tuple[Problem, ...] = ()


class RegistryError(CatalogError):
    """The registry is wrong. `watched` are the files and folders that were looked at, each with
    its stamp from before it was read, so that mending any of them can be noticed."""

    def __init__(
        self,
        problems: Sequence[Problem],
        watched: Stamps,
        of_runtime: Mapping[str, Sequence[Problem]] | None = None,
    ) -> None:
        super().__init__(problems)
        self.watched = watched
        self._of_runtime = of_runtime or {}

    def about(self, id_: object) -> tuple[Problem, ...]:
        """Those of the problems that this run-time expert has or makes, its card's included;
        `id_` as its spec has it, whatever that is. Empty: the rest of the registry is wrong."""
        return tuple(self._of_runtime.get(id_ if isinstance(id_, str) else "", ()))


def load_catalog(
    path: Path,
    families: Families,
    *,
    roots: Sequence[Path] = (),
    runtime: Sequence[Mapping[str, Any]] = (),
    version: int,
    may_skip: Collection[str] = (),
    cache: FileCache | None = None,
    compositions: Path | Shelf | None = None,
) -> Loaded:
    """The catalog that the file and the runtime experts make together.

    `roots` are the folders that adapters, cards and examples may lie in; none: the file's own.
    `runtime` are experts in the form of experts.yaml, each with its `id` beside the rest; their
    relative paths start at the file's folder. Those in `may_skip` (ids) are left out, as if they
    had never been added, where their own specs are wrong; what the file says of one of them is a
    warning then. `compositions` is the folder that composed adapters are kept in; none: one beside
    the file; a Shelf holds them for whoever serves from them, also where the load then fails.
    Blocks, for the network too where a hub name is not in the cache.

    Raises RegistryError (a CatalogError) with every problem found.
    """
    watched: dict[Path, Stamp] = {path: stamp(path)}
    try:
        document = _read(path)
        file, problems = _shell(document)
    except CatalogError as error:
        raise RegistryError(error.problems, watched) from error
    skipped: dict[str, tuple[Problem, ...]] = {}
    with ExitStack() as here:
        if isinstance(compositions, Shelf):
            shelf = compositions
        else:  # held while it is read, and no longer: nobody serves from it
            shelf = Shelf(compositions or path.parent / ".compositions", 0)
            here.callback(shelf.close)
        while True:
            context = Context(
                file=document,
                folder=path.parent,
                families=families,
                roots=tuple(root.resolve() for root in roots) or (path.resolve().parent,),
                cache=cache if cache is not None else _CACHE,
                compositions=shelf,
                problems=list(problems),
                watched=watched,
                experts_missing=bool({problem.path for problem in problems} - _OTHER_KEYS),
                left_out=frozenset(skipped),
            )
            catalog = _make_catalog(context, file, runtime, version)
            bad = context.of_runtime.keys() & set(may_skip)
            if not bad:
                break
            # Once more without them, rather than patching what they had a part in. It is rare, each
            # round has fewer, and what was read is in the cache.
            skipped |= {id_: tuple(context.of_runtime[id_]) for id_ in bad}
            runtime = [spec for spec in runtime if _id(spec) not in bad]
    if catalog is None:
        found = [*context.problems, *(p for some in context.of_runtime.values() for p in some)]
        raise RegistryError(_in_order(found), watched, context.of_runtime)
    warnings = tuple(_in_order(context.warnings))
    return Loaded(catalog, MappingProxyType(watched), MappingProxyType(skipped), warnings)


def _id(spec: Mapping[str, Any]) -> str | None:
    id_ = spec.get("id")
    return id_ if isinstance(id_, str) else None


def _make_catalog(
    context: Context, file: _Shell, runtime: Sequence[Mapping[str, Any]], version: int
) -> Catalog | None:
    """None where there are problems; the context has them."""
    devices = make_devices(context, file.devices)
    servers = make_servers(context, file.servers, devices, file.devices)
    names = file.servers.keys()
    entries = gather(context, file.experts, file.adapters_from, runtime, names)
    prepared = prepare(context, entries, servers, names)
    policies = make_policies(context, file.policies, prepared)
    keys = make_keys(context, file.keys, [entry.id for entry in entries])
    _check_whole(context, file, [entry.id for entry in entries])
    if context.problems or context.of_runtime:
        return None
    experts = {result.entry.id: result.expert for result in prepared if result.expert is not None}
    return Catalog(
        version=version,
        digest=_digest(devices, servers, experts, policies, keys, file.default_policy),
        servers=MappingProxyType({id_: known.server for id_, known in servers.items()}),
        experts=MappingProxyType(experts),
        policies=MappingProxyType(policies),
        default_policy=file.default_policy,
        devices=MappingProxyType(devices),
        keys=MappingProxyType(keys),
    )


def _read(path: Path) -> Document:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        message, remedy = "there is no such file", "Write it; README.md shows how."
        raise CatalogError([Problem(str(path), "", message, remedy)]) from error
    except (OSError, UnicodeError) as error:
        message, remedy = f"it cannot be read: {error}", "Save it as UTF-8 text."
        raise CatalogError([Problem(str(path), "", message, remedy)]) from error
    return parse_yaml(text, str(path))


@dataclass(frozen=True, slots=True)
class _Shell:
    """The file's top level, its blocks not yet looked into."""

    devices: Mapping[str, Any]
    servers: Mapping[str, Any]
    experts: Mapping[str, Any]
    adapters_from: object
    policies: Mapping[str, Any]
    keys: Mapping[str, Any]
    default_policy: str


def _shell(document: Document) -> tuple[_Shell, list[Problem]]:
    """Blocks of the wrong kind are told and then taken as empty, so that the others are looked
    at too. Raises CatalogError where nothing can be."""
    if document.data is None:
        remedy = "Write `version`, `servers`, `experts` and `policies`; README.md shows how."
        raise CatalogError([document.problem((), "the file is empty", remedy)])
    block, problems = block_at(Place(document, ()), document.data)
    if block is None:
        raise CatalogError(problems)
    _, problems = validate(FileSpec, block)

    def mapping(key: str) -> Mapping[str, Any]:
        value = block.data.get(key)
        return value if isinstance(value, dict) else {}

    default = block.data.get("default_policy", FileSpec.model_fields["default_policy"].default)
    return _Shell(
        devices=mapping("devices"),
        servers=mapping("servers"),
        experts=mapping("experts"),
        adapters_from=block.data.get("adapters_from"),
        policies=mapping("policies"),
        keys=mapping("keys"),
        default_policy=default if isinstance(default, str) else "",
    ), problems


def _check_whole(context: Context, file: _Shell, experts: Sequence[str]) -> None:
    place = Place(context.file, ())
    if not file.servers and "servers" in context.file.data:
        remedy = "Add a server, such as `local: {engine: …}`."
        context.problems.append((place / "servers").problem("there is no server", remedy))
    if not experts and "experts" not in context.file.data:
        remedy = "Add one under `experts:`, or a folder of them under `adapters_from:`."
        context.problems.append(place.problem("there is no expert", remedy))
    elif not experts:
        remedy = "Add one, or a folder of them under `adapters_from:`."
        context.problems.append((place / "experts").problem("there is no expert", remedy))
    if file.default_policy not in file.policies and "policies" in context.file.data:
        known = list(file.policies)
        message, remedy = unknown_name("policy", file.default_policy, known)
        if "default_policy" in context.file.data:
            context.problems.append((place / "default_policy").problem(message, remedy))
            return
        message = f"there is no policy {file.default_policy!r}, for requests that name none"
        remedy = f"Call one of them `{file.default_policy}`, or name one as `default_policy`."
        context.problems.append((place / "policies").problem(message, remedy))


def _in_order(problems: Sequence[Problem]) -> list[Problem]:
    """By file in the order met, then by line: as one would mend them."""
    files = {file: i for i, file in enumerate(dict.fromkeys(p.file for p in problems))}
    return sorted(dict.fromkeys(problems), key=lambda p: (files[p.file], p.line or 0))


def _digest(
    devices: Mapping[str, Device],
    servers: Mapping[str, KnownServer],
    experts: Mapping[str, Expert],
    policies: Mapping[str, Policy],
    keys: Mapping[str, ApiKey],
    default_policy: str,
) -> str:
    """`sha256:…` over what is served, equal on every machine for equal content: adapters count
    by their digest, servers by their settings as written, paths as servers see them likewise; a
    caller's key counts by whom it excludes and whether it is an admin's. A base model counts by its
    name, so replacing its weights in place needs a restart."""
    content = {
        "devices": {id_: device.memory_gb for id_, device in devices.items()},
        "servers": {
            id_: {
                "engine": known.server.engine,
                "settings": known.written,
                "placement": asdict(placed) if (placed := known.server.placement) else None,
            }
            for id_, known in servers.items()
        },
        "experts": {id_: _expert_content(expert) for id_, expert in experts.items()},
        "policies": {id_: _policy_content(policy) for id_, policy in policies.items()},
        "keys": {id_: [sorted(key.exclude), key.admin] for id_, key in keys.items()},
        "default_policy": default_policy,
    }
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _expert_content(expert: Expert) -> dict[str, Any]:
    return {
        "server": expert.server,
        "description": expert.description,
        "skills": expert.skills,
        "examples": expert.examples,
        "adapter": expert.adapter.digest if expert.adapter else None,
        "server_path": expert.adapter.server_path if expert.adapter else None,
        "prompt": expert.prompt.model_dump(mode="json") if expert.prompt else None,
        "sampling": asdict(expert.sampling),
        "context_window": expert.context_window,
        "chars_per_token": expert.chars_per_token,
        "abilities": sorted(expert.abilities),
        "parameters": sorted(expert.parameters),
        "cost": [cost.input_per_1m, cost.output_per_1m] if (cost := expert.cost) else None,
        "source": expert.source,
    }


def _policy_content(policy: Policy) -> dict[str, Any]:
    return {
        "router": _component_content(policy.router),
        "strategy": _component_content(policy.strategy),
        "experts": sorted(policy.experts),
        "default_expert": policy.default_expert,
        "threshold": policy.threshold,
        "cost_weight": policy.cost_weight,
        "k": policy.k,
        "max_wait_s": policy.max_wait_s,
        "parameters": sorted(policy.parameters),
        "tolerance": policy.tolerance,
        "quality": policy.quality,
        "max_cost": policy.max_cost,
        "min_quality": policy.min_quality,
        "top_p": policy.top_p,
        "null_expert": policy.null_expert,
        "null_margin": policy.null_margin,
        "unsure": asdict(policy.unsure) if policy.unsure else None,
        "stay": policy.stay,
    }


def _component_content(component: Component) -> dict[str, Any]:
    return {
        "name": component.name,
        "settings": component.settings.model_dump(mode="json"),
        "digest": component.digest,
    }
