"""Experts from experts.yaml, from scanned folders and from run time: gathered, validated, verified.

All three become blocks first and then take the same path.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from composer.adapters.files import CARD, CONFIG
from composer.adapters.hub import adapter_root, fetch_adapter, is_hub_name
from composer.errors import CatalogError, Problem
from composer.registry.blocks import ID_REMEDY, Block, Place, block_at, unknown_name, validate
from composer.registry.cards import read_card, read_examples, scan
from composer.registry.context import Context
from composer.registry.servers import KnownServer
from composer.registry.source import Document
from composer.registry.specs import ID, AdaptersFrom, CardSpec, ExpertSpec
from composer.types import Ability, Adapter, Cost, Expert

RUNTIME = "runtime"
"""Where problems of experts added at run time are said to stand, in place of a file."""

_THREADS = min(4, os.cpu_count() or 1)

_FREE: frozenset[Ability] = frozenset({"logprobs"})
"""Abilities that come with the engine, whatever the model: an expert has them without saying so."""


@dataclass(frozen=True, slots=True)
class Entry:
    """An expert as written, before anything it names was looked at. `folder` is that of its
    adapter where it was found by scanning."""

    id: str
    block: Block
    source: Literal["file", "runtime"]
    folder: Path | None = None


@dataclass(slots=True)
class Prepared:
    """What became of an entry. `expert` is None where anything was wrong."""

    entry: Entry
    expert: Expert | None = None
    spec: ExpertSpec | None = None
    problems: list[Problem] = field(default_factory=list)
    watched: set[Path] = field(default_factory=set)


# --- gathering -------------------------------------------------------------------------


def gather(
    context: Context,
    experts: Mapping[str, Any],
    adapters_from: object,
    runtime: Sequence[Mapping[str, Any]],
    servers: Iterable[str],
) -> list[Entry]:
    """Every expert that is named, in the order of the file, the scanned folders, run time.
    An id named twice is a problem, and counts once."""
    told = len(context.problems)
    entries = [
        *_from_file(context, experts),
        *_from_folders(context, adapters_from, list(servers)),
        *_from_runtime(context, runtime),
    ]
    context.experts_missing |= len(context.problems) > told
    by_id: dict[str, Entry] = {}
    for entry in entries:
        first = by_id.get(entry.id)
        if re.fullmatch(ID, entry.id) is None:
            problem = entry.block.problem((), f"{entry.id!r} cannot be an id", ID_REMEDY)
            context.problems.append(problem)
            context.experts_missing = True
        elif first is None:
            by_id[entry.id] = entry
        else:
            context.problems.append(_twice(entry, first))
    return list(by_id.values())


def _twice(entry: Entry, first: Entry) -> Problem:
    home = first.block.home
    line = home.document.line(home.path)
    where = home.document.file if line is None else f"{home.document.file}:{line}"
    if entry.source == first.source == "runtime":
        return entry.block.problem((), f"expert {entry.id!r} is added twice", "Choose another id.")
    if entry.source == "runtime":
        return entry.block.problem(
            (),
            f"expert {entry.id!r} stands in {where} too",
            "Remove one of the two: an id is either in the file or added at run time.",
        )
    return entry.block.problem(
        (),
        f"expert {entry.id!r} is defined already, at {where}",
        "Rename one of the two; for scanned folders, by `id_prefix`.",
    )


def _from_file(context: Context, experts: Mapping[str, Any]) -> list[Entry]:
    entries = []
    for id_, data in experts.items():
        block, problems = block_at(Place(context.file, ("experts", id_)), data)
        context.problems += problems
        if block is not None:
            entries.append(Entry(id_, block, "file"))
    return entries


def _from_runtime(context: Context, runtime: Sequence[Mapping[str, Any]]) -> list[Entry]:
    specs: dict[str, Any] = {}
    entries = []
    document = Document(RUNTIME, {"experts": specs})
    for spec in runtime:
        id_ = spec.get("id")
        if not isinstance(id_, str):
            context.problems.append(
                Place(document, ("experts",)).problem(
                    "an expert has no `id`" if id_ is None else f"the id {id_!r} is no text",
                    f"Add `id`. {ID_REMEDY}",
                )
            )
            continue
        data = {key: value for key, value in spec.items() if key != "id"}
        specs.setdefault(id_, data)
        entries.append(Entry(id_, Block(data, Place(document, ("experts", id_)), {}), "runtime"))
    return entries


def _from_folders(context: Context, written: object, servers: Sequence[str]) -> list[Entry]:
    place = Place(context.file, ("adapters_from",))
    if isinstance(written, str):
        return _scanned(context, place, written, servers)
    if not isinstance(written, list):
        if written is not None:
            remedy = "Write `adapters_from: ./adapters/*`, or a list of {path: …, server: …}."
            context.problems.append(place.problem("it should be a pattern or a list", remedy))
        return []
    return [
        entry
        for number, item in enumerate(written)
        for entry in _scanned(context, place / number, item, servers)
    ]


def _scanned(context: Context, place: Place, item: object, servers: Sequence[str]) -> list[Entry]:
    path_place, server_place = place / "path", place / "server"
    if isinstance(item, str):
        if len(servers) != 1:
            remedy = "Write {path: …, server: …}."
            message = f"it does not say on which of {len(servers)} servers its adapters run"
            context.problems.append(place.problem(message, remedy))
            return []
        item = {"path": item, "server": servers[0]}
        path_place = server_place = place
    block, problems = block_at(place, item)
    context.problems += problems
    if block is None:
        return []
    spec, problems = validate(AdaptersFrom, block)
    context.problems += problems
    if spec is None:
        return []
    try:
        folders, searched = scan(context.folder, context.expanded(spec.path))
    except (OSError, RuntimeError, ValueError) as error:
        context.problems.append(
            path_place.problem(f"this pattern cannot be searched: {error}", "Correct it.")
        )
        return []
    context.watched |= searched
    if not folders:
        message = f"no folder matches {spec.path}"
        remedy = "Correct the pattern; it is relative to the folder of this file."
        context.problems.append(path_place.problem(message, remedy))
    return [
        Entry(
            spec.id_prefix + folder.name,
            Block(
                {"server": spec.server, "adapter": str(folder)},
                home=path_place,
                places={"server": server_place, "adapter": path_place},
            ),
            "file",
            folder,
        )
        for folder in folders
    ]


# --- validating and verifying ------------------------------------------------------------


def prepare(
    context: Context,
    entries: Sequence[Entry],
    servers: Mapping[str, KnownServer],
    broken: Collection[str] | None,
) -> list[Prepared]:
    """Cards read, fields validated, adapters verified; in the order of `entries`. Reading and
    hashing run in threads, which numpy and hashlib let run side by side. `broken` are servers
    whose problems are told already; None: all that are not in `servers`."""
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="registry") as pool:
        results = list(pool.map(lambda entry: _prepare(context, entry, servers, broken), entries))
    for result in results:
        context.problems += result.problems
        context.watched |= result.watched
    return results


def _prepare(
    context: Context,
    entry: Entry,
    servers: Mapping[str, KnownServer],
    broken: Collection[str] | None,
) -> Prepared:
    result = Prepared(entry)
    block = entry.block
    try:
        folder, roots = _adapter_folder(context, entry, result)
    except CatalogError as error:
        result.problems += _retold(block, error)
        return result
    try:
        if folder is not None:
            block = _with_card(entry, folder, roots, result)
    except CatalogError as error:
        result.problems += error.problems
        return result
    except (OSError, RuntimeError, ValueError) as error:  # a path that no file system takes
        result.problems.append(
            block.problem(("adapter",), f"this path cannot be used: {error}", "Correct it.")
        )
        return result

    spec, problems = validate(ExpertSpec, block)
    result.problems += problems
    examples = _examples(context, block, result)
    server = _server(block, servers, broken, result)
    if spec is None:
        return result
    if spec.digest is not None and folder is None:
        message = "it pins an adapter, but the expert has none"
        problem = block.problem(("digest",), message, "Remove it, or add the `adapter`.")
        result.problems.append(problem)
    adapter = None
    if folder is not None and server is not None:
        adapter = _verified(context, block, folder, roots, server, spec.digest, result)
    if server is None:
        return result
    abilities = _abilities(block, spec, server, result)
    window = _window(block, spec, server, result)
    if not result.problems:
        result.spec = spec
        result.expert = Expert(
            id=entry.id,
            server=spec.server,
            description=spec.description,
            skills=spec.skills,
            examples=spec.examples + examples,
            adapter=adapter,
            prompt=spec.prompt,
            context_window=window,
            chars_per_token=spec.chars_per_token,
            abilities=abilities,
            cost=_cost(spec),
            source=entry.source,
        )
    return result


def _adapter_folder(
    context: Context, entry: Entry, result: Prepared
) -> tuple[Path | None, tuple[Path, ...]]:
    """The adapter's folder and the roots it may lie in. None where there is no adapter, or one
    written in a way that validation refuses."""
    written = entry.block.data.get("adapter")
    if isinstance(written, str) and written:
        folder = entry.folder or context.located(written)
        result.watched.add(folder)
        return folder, context.roots
    if isinstance(written, Mapping):
        name, revision = written.get("hub"), written.get("revision")
        if isinstance(name, str) and isinstance(revision, str) and is_hub_name(name) and revision:
            folder = fetch_adapter(name, revision)
            return folder, (adapter_root(folder),)
    return None, context.roots


def _with_card(entry: Entry, folder: Path, roots: Sequence[Path], result: Prepared) -> Block:
    """The block with what it does not say itself taken from the adapter's card."""
    block = entry.block
    card = read_card(folder, roots)
    inner = card.data.get("composer") if card is not None and card.data is not None else None
    if card is None or inner is None:
        if entry.folder is not None and (folder / CONFIG).exists():
            result.problems.append(
                block.problem(
                    (),
                    f"{folder / CARD} has no `composer:` block",
                    "Describe the expert there, or name it under `experts:` instead.",
                )
            )
        return block
    place = Place(card, ("composer",))
    if not isinstance(inner, Mapping):
        result.problems += block_at(place, inner)[1]
        return block
    known = list(CardSpec.model_fields)
    for key in inner.keys() - set(known):
        _, remedy = unknown_name("key", key, known)
        result.problems.append((place / key).problem("unknown key", remedy))
    added = {key: inner[key] for key in inner if key in known and key not in block.data}
    return replace(
        block,
        data={**added, **block.data},
        places={**{key: place / key for key in added}, **block.places},
    )


def _examples(context: Context, block: Block, result: Prepared) -> tuple[str, ...]:
    written = block.data.get("examples_from")
    if not isinstance(written, str) or not written:
        return ()
    place = block.at(("examples_from",))
    start = context.folder if place.document.lines is None else Path(place.document.file).parent
    file = context.located(written, start)
    result.watched.add(file)
    try:
        return read_examples(file, context.roots)
    except CatalogError as error:
        result.problems += [_retell(place, problem) for problem in error.problems]
    except (OSError, RuntimeError, ValueError) as error:
        result.problems.append(place.problem(f"it cannot be read: {error}", "Correct the path."))
    return ()


def _server(
    block: Block,
    servers: Mapping[str, KnownServer],
    broken: Collection[str] | None,
    result: Prepared,
) -> KnownServer | None:
    name = block.data.get("server")
    if isinstance(name, str) and name in servers:
        return servers[name]
    if not isinstance(name, str) or broken is None or name in broken:
        return None
    result.problems.append(block.problem(("server",), *unknown_name("server", name, list(servers))))
    return None


def _verified(
    context: Context,
    block: Block,
    folder: Path,
    roots: Sequence[Path],
    server: KnownServer,
    digest: str | None,
    result: Prepared,
) -> Adapter | None:
    if not server.family.takes_adapters:
        message = f"the engine {server.server.engine!r} takes no adapters"
        remedy = "Name a server of another engine, or remove the adapter."
        result.problems.append(block.problem(("adapter",), message, remedy))
        return None
    try:
        return context.cache.verify(
            folder,
            server.base,
            roots=roots,
            max_rank=server.max_rank,
            features=server.family.adapter_features,
            digest=digest,
        )
    except CatalogError as error:
        result.problems += _retold(block, error)
    except OSError as error:  # changed while it was read
        result.problems.append(
            block.problem(("adapter",), f"{folder} cannot be read: {error}", "Try again.")
        )
    return None


def _abilities(
    block: Block, spec: ExpertSpec, server: KnownServer, result: Prepared
) -> frozenset[Ability]:
    honours = server.family.honours
    if spec.abilities is None:
        return honours & _FREE
    for ability in sorted(spec.abilities - honours):
        can = ", ".join(sorted(honours)) or "none"
        message = f"the engine {server.server.engine!r} cannot give {ability!r}"
        remedy = f"Remove it; this engine's abilities: {can}."
        result.problems.append(block.problem(("abilities",), message, remedy))
    return spec.abilities


def _window(block: Block, spec: ExpertSpec, server: KnownServer, result: Prepared) -> int:
    limit = server.context_window
    if spec.context_window is None:
        if limit is None and server.base is None and _reads_base(server):
            return 1  # why the base cannot be read is told at the server
        if limit is None:
            message = "it is missing, and the server's model does not tell it"
            remedy = "Add `context_window`, in tokens."
            result.problems.append(block.problem(("context_window",), message, remedy))
        return limit or 1
    if limit is not None and spec.context_window > limit:
        message = f"{spec.context_window} tokens exceed the server's {limit}"
        remedy = f"Write {limit} or less."
        result.problems.append(block.problem(("context_window",), message, remedy))
    return spec.context_window


def _cost(spec: ExpertSpec) -> Cost | None:
    return Cost(spec.cost.input_per_1m, spec.cost.output_per_1m) if spec.cost else None


def _reads_base(server: KnownServer) -> bool:
    field = server.family.model_field
    return field is not None and isinstance(server.written.get(field), str)


def _retold(block: Block, error: CatalogError) -> list[Problem]:
    return [_retell(block.at(("adapter",)), problem) for problem in error.problems]


def _retell(place: Place, problem: Problem) -> Problem:
    """A problem of a file, told at the place that names the file."""
    line = f":{problem.line}" if problem.line is not None else ""
    where = f"{problem.file}{line}: " if problem.file else ""
    inner = f"{problem.path}: " if problem.path else ""
    return place.problem(f"{where}{inner}{problem.message}", problem.remedy)
