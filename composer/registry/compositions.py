"""Experts that are compositions of other experts' adapters: their recipes read, their members
found, their adapters made. Knows no way of merging."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, Protocol, get_args

from composer.adapters.cache import verify_cached
from composer.adapters.files import outside
from composer.adapters.lora_config import AdapterFeature
from composer.adapters.recipe import Member, Recipe, RecipeSpec
from composer.errors import AdapterError, CatalogError, Problem
from composer.registry.blocks import Block, Place, block_at, unknown_name, validate
from composer.registry.cards import read_card, read_examples
from composer.registry.context import Context
from composer.registry.gather import Entry
from composer.registry.servers import KnownServer
from composer.registry.specs import CardSpec
from composer.source import parse_yaml
from composer.types import Composed, Expert, empty

KEY = "composition"


class Known(Protocol):
    """An expert that was looked at before; `expert` is None where something is wrong with it."""

    @property
    def expert(self) -> Expert | None: ...


@dataclass(frozen=True, slots=True)
class Made:
    """A composition's adapter: its folder, the root that this lies in, what it was made of, and
    what is said of each member, by keys of an expert."""

    folder: Path
    root: Path
    digest: str
    composed: Composed
    said: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class _Written:
    """`block` is where the recipe stands (the entry, or a file of its own); relative folders of
    members start at `start`."""

    spec: RecipeSpec
    block: Block
    start: Path


def is_composed(entry: Entry) -> bool:
    return KEY in entry.block.data


def in_order(
    context: Context, entries: Sequence[Entry]
) -> tuple[list[Entry], list[tuple[Entry, Problem]]]:
    """Members before what is composed of them; and those that cannot be made, being made of
    themselves."""
    by_id = {entry.id: entry for entry in entries}
    needs = {
        entry.id: [member for member in _members(context, entry) if member in by_id]
        for entry in entries
    }
    circular: list[tuple[Entry, Problem]] = []
    while True:
        try:
            order = list(TopologicalSorter(needs).static_order())
        except CycleError as error:
            ring: list[str] = error.args[1]
            way = " → ".join(reversed(ring))
            for id_ in set(ring):
                problem = by_id[id_].block.problem(
                    (KEY,), f"it is composed of itself: {way}", "Take one of these members out."
                )
                circular.append((by_id[id_], problem))
                del needs[id_]
            needs = {
                id_: [member for member in members if member in needs]
                for id_, members in needs.items()
            }
        else:
            return [by_id[id_] for id_ in order], circular


def _members(context: Context, entry: Entry) -> Collection[str]:
    """As far as they can be read; what is wrong is told when the entry's turn comes."""
    try:
        written, _ = _read(context, entry)
    except (CatalogError, OSError, RuntimeError, ValueError):
        return ()
    if written is None:
        return ()
    return (*written.spec.weights, *filter(None, [written.spec.subtract]))


def make(
    context: Context,
    entry: Entry,
    server: KnownServer | None,
    known: Mapping[str, Known],
    servers: Mapping[str, KnownServer],
) -> tuple[Made | None, list[Problem]]:
    """The entry's composition, built where it is not in the cache yet. Without a server (wrong
    itself) what does not depend on one is looked at. Blocks."""
    place = entry.block.at((KEY,))
    if "adapter" in entry.block.data:
        message = "an expert is either an `adapter` or a `composition`"
        return None, [place.problem(message, "Remove one of the two.")]
    try:
        written, problems = _read(context, entry)
    except CatalogError as error:
        return None, [_retell(place, problem) for problem in error.problems]
    except (OSError, RuntimeError, ValueError) as error:
        return None, [place.problem(f"it cannot be read: {error}", "Correct the path.")]
    if written is None:
        return None, problems
    named: list[tuple[tuple[str, ...], str, float]] = [
        (("members", name), name, w) for name, w in written.spec.weights.items()
    ]
    if (general := written.spec.subtract) is not None:
        named.append((("subtract",), general, 1.0))
    found = [
        _member(context, written, path, name, weight, server, known, servers)
        for path, name, weight in named
    ]
    problems = [one for one in found if isinstance(one, Problem)]
    members = [one for one in found if isinstance(one, _Found)]
    if problems or server is None or len(members) < len(found):
        return None, problems
    ranks = [r for r in (written.spec.max_rank, server.max_rank) if r is not None]
    subtract = members.pop().member if general is not None else None
    recipe = Recipe(
        tuple(one.member for one in members),
        written.spec.method,
        written.spec.settings,
        written.spec.modules,
        min(ranks, default=None),
        subtract,
    )
    try:
        made = context.compositions.make(recipe)
    except AdapterError as error:
        return None, [_told(context, written.block, problem) for problem in error.problems]
    except OSError as error:
        message = f"it cannot be written to {context.compositions.folder}: {error}"
        return None, [place.problem(message, "Make room, or set another COMPOSER_CACHE_DIR.")]
    context.look(made.folder)
    return (
        Made(
            made.folder,
            context.compositions.folder,
            made.adapter,
            made.composed,
            tuple(one.said for one in members),
        ),
        [],
    )


def with_members(block: Block, members: Sequence[Mapping[str, Any]]) -> Block:
    """The block with what it does not say itself taken from its members, as from a card: what all
    of them have together (skills, examples, the description), or what they agree on. A folder
    without a card has nothing to add, and nothing to disagree with."""
    members = [one for one in members if one]
    if not members:
        return block
    added: dict[str, Any] = {
        "description": " ".join(filter(None, (one["description"] for one in members))),
        "skills": _each_once(skill for one in members for skill in one["skills"]),
        **{key: _agreed([one[key] for one in members]) for key in ("sampling", "prompt", "cost")},
    }
    if "examples_from" not in block.data:
        added["examples"] = _each_once(text for one in members for text in one["examples"])
    left_open = {key: value for key, value in added.items() if value and key not in block.data}
    return replace(block, data={**left_open, **block.data})


def _said_by_expert(expert: Expert) -> Mapping[str, Any]:
    return {
        "description": expert.description,
        "skills": expert.skills,
        "examples": expert.examples,
        "sampling": asdict(expert.sampling),
        "prompt": expert.prompt,
        "cost": expert.cost and asdict(expert.cost),
    }


def _said_by_card(context: Context, folder: Path) -> Mapping[str, Any]:
    """The same of the card of a folder; nothing where it has none. Raises CatalogError."""
    card = read_card(folder, context.roots, context.cache)
    inner = None if card is None or card.data is None else card.data.get("composer")
    if card is None or inner is None:
        return empty()
    block, problems = block_at(Place(card, ("composer",)), inner)
    spec, more = (None, []) if block is None else validate(CardSpec, block)
    if spec is None:
        raise CatalogError([*problems, *more])
    examples = spec.examples
    if spec.examples_from is not None:
        file = context.located(spec.examples_from, folder)
        context.look(file)
        examples += read_examples(file, context.roots)
    return {
        "description": spec.description,
        "skills": spec.skills,
        "examples": examples,
        "sampling": spec.sampling.model_dump(),
        "prompt": spec.prompt,
        "cost": spec.cost and spec.cost.model_dump(),
    }


@dataclass(frozen=True, slots=True)
class _Found:
    member: Member
    said: Mapping[str, Any]


def _read(context: Context, entry: Entry) -> tuple[_Written | None, list[Problem]]:
    """The recipe, from where it stands. Raises CatalogError, OSError, RuntimeError, ValueError."""
    place, data, start = entry.block.at((KEY,)), entry.block.data[KEY], context.folder
    if isinstance(data, str) and data:
        file = context.located(data)
        context.look(file)
        if (refusal := outside(file, context.roots)) is not None:
            raise CatalogError([refusal])
        document = parse_yaml(file.read_text(encoding="utf-8-sig"), str(file))
        place, data, start = Place(document, ()), document.data, file.parent
    block, problems = block_at(place, data)
    if block is None:
        return None, problems
    spec, problems = validate(RecipeSpec, block)
    return (None if spec is None else _Written(spec, block, start)), problems


def _member(
    context: Context,
    written: _Written,
    path: tuple[str, ...],
    name: str,
    weight: float,
    server: KnownServer | None,
    known: Mapping[str, Known],
    servers: Mapping[str, KnownServer],
) -> _Found | Problem | None:
    """None: it is wrong itself, which is told where it stands."""
    place = written.block.at(path)
    if name not in known:
        return _folder(context, written, place, name, weight, server, list(known))
    expert = known[name].expert
    if expert is None:
        return None
    if expert.adapter is None:
        message = f"{name!r} is the model of server {expert.server!r} alone, without an adapter"
        return place.problem(message, "Name experts that have one.")
    if expert.adapter.gate is not None:
        message = f"{name!r} is a gate, which weighs its members anew at every token"
        return place.problem(message, "Name the gate's members.")
    if not _one_base(server, servers.get(expert.server)):
        assert server is not None
        message = (
            f"{name!r} is an adapter of another base model than that of server {server.server.id!r}"
        )
        return place.problem(message, "Compose adapters of one base model.")
    adapter = expert.adapter
    return _Found(Member(name, adapter.path, weight, adapter.digest), _said_by_expert(expert))


def _folder(
    context: Context,
    written: _Written,
    place: Place,
    name: str,
    weight: float,
    server: KnownServer | None,
    ids: Sequence[str],
) -> _Found | Problem:
    try:
        folder = context.located(name, written.start)
        if not name.startswith((".", "/", "~")) and not folder.is_dir():
            message, remedy = unknown_name("expert", name, ids)
            return place.problem(message, f"{remedy} A folder is written as ./{name}.")
        context.look(folder)
        adapter = verify_cached(
            context.cache,
            folder,
            server.base if server else None,
            roots=context.roots,
            features=get_args(AdapterFeature),
        )
        said = _said_by_card(context, folder)
    except CatalogError as error:
        return _retell(place, error.problems[0])
    except (OSError, RuntimeError, ValueError) as error:
        return place.problem(f"this path cannot be used: {error}", "Correct it.")
    return _Found(Member(name, adapter.path, weight, adapter.digest), said)


def _one_base(own: KnownServer | None, other: KnownServer | None) -> bool:
    """As far as the bases are known."""
    if own is None or other is None or own.base is None or other.base is None:
        return True
    return any(own.base.is_named(name) for name in other.base.names)


def _each_once(texts: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(texts))


def _agreed(values: Sequence[Any]) -> Any:
    return values[0] if all(value == values[0] for value in values) else None


def _told(context: Context, block: Block, problem: Problem) -> Problem:
    """A problem of the recipe at its key; one of a member's files at the whole."""
    if problem.file == str(context.compositions.folder):
        path = (problem.path,) if problem.path in block.data else ()
        return block.problem(path, problem.message, problem.remedy)
    return _retell(block.at(()), problem)


def _retell(place: Place, problem: Problem) -> Problem:
    """A problem of a file, told at the place that names the file."""
    if problem.line is not None:  # it says better where to look
        return problem
    where = f"{problem.file}: " if problem.file else ""
    inner = f"{problem.path}: " if problem.path else ""
    return place.problem(f"{where}{inner}{problem.message}", problem.remedy)
