"""Every expert that is named, wherever: experts.yaml, scanned folders, run time. Looks into none.

All become blocks of the same form, so that what follows is one path.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from composer.adapters.files import is_gate
from composer.errors import Problem
from composer.registry.blocks import ID_REMEDY, Block, Place, block_at, validate
from composer.registry.cards import scan
from composer.registry.context import Context, Mount
from composer.registry.specs import ID, AdaptersFrom
from composer.source import Document

RUNTIME = "runtime"
"""Where problems of experts added at run time are said to stand, in place of a file."""


@dataclass(frozen=True, slots=True)
class Entry:
    """An expert as written, before anything it names was looked at. `folder` is that of its
    adapter or gate where it was found by scanning."""

    id: str
    block: Block
    source: Literal["file", "runtime"]
    folder: Path | None = None


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
            _add(context, entry, problem)
            context.experts_missing = True
        elif first is None:
            by_id[entry.id] = entry
        else:
            _add(context, entry, _twice(entry, first))
    return list(by_id.values())


def _add(context: Context, entry: Entry, problem: Problem) -> None:
    if entry.source == "runtime":
        context.add_runtime(entry.id, [problem])
    else:
        context.problems.append(problem)


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
            message = "an expert has no `id`" if id_ is None else f"the id {id_!r} is no text"
            place = Place(document, ("experts",))
            context.add_runtime("", [place.problem(message, f"Add `id`. {ID_REMEDY}")])
            context.experts_missing = True
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
        pattern = context.expanded(spec.path)
        folders, searched = scan(context.folder, pattern, context.look)
    except (OSError, RuntimeError, ValueError) as error:
        context.problems.append(
            path_place.problem(f"this pattern cannot be searched: {error}", "Correct it.")
        )
        return []
    if spec.server_path is not None:
        start = Path(os.path.abspath(context.folder / _before_marks(Path(pattern))))
        context.mounts.append(Mount(spec.server, start, PurePosixPath(spec.server_path)))
    if not folders and not _still_empty(searched):
        message = f"no folder matches {spec.path}"
        remedy = "Correct the pattern; it is relative to the folder of this file."
        context.problems.append(path_place.problem(message, remedy))
    entries = []
    for folder in folders:
        context.look(folder)
        key = "gate" if is_gate(folder) else "adapter"
        data = {"server": spec.server, key: str(folder)}
        block = Block(data, home=path_place, places={"server": server_place, key: path_place})
        entries.append(Entry(spec.id_prefix + folder.name, block, "file", folder))
    return entries


def _before_marks(pattern: Path) -> Path:
    """The folder that all matches have in common: what comes before the first part that is a
    pattern, or before the last part where none is."""
    marked = (i for i, part in enumerate(pattern.parts) if any(mark in part for mark in "*?["))
    return Path(*pattern.parts[: next(marked, len(pattern.parts) - 1)])


def _still_empty(searched: Collection[Path]) -> bool:
    """Whether the folders that were searched are there and hold no folder yet: that is how a
    pile of adapters begins. A pattern that misses what is there is a mistake."""
    return bool(searched) and not any(
        child.is_dir() for folder in searched for child in folder.iterdir()
    )
