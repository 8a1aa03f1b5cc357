"""Named experts become Experts: cards read, fields validated, adapters verified or composed.

One path for those of the file, of scanned folders and of run time.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import get_args

from composer.adapters.cache import gate_cached, verify_cached
from composer.adapters.files import (
    CARD,
    CONFIG,
    TERNARY,
    is_compressed,
    is_gate,
    outside,
)
from composer.adapters.hub import adapter_root, fetch_adapter, is_hub_name
from composer.adapters.lora_config import AdapterFeature
from composer.adapters.provenance import made_of
from composer.errors import AdapterError, CatalogError, Problem
from composer.registry import compositions
from composer.registry.blocks import Block, Place, block_at, unknown_name, validate
from composer.registry.cards import read_card, read_examples
from composer.registry.context import Context
from composer.registry.gather import RUNTIME, Entry
from composer.registry.servers import KnownServer
from composer.registry.specs import CardSpec, ExpertSpec
from composer.types import Ability, Adapter, Cost, Expert, SamplingDefaults

_THREADS = min(4, os.cpu_count() or 1)

_MAKES_ADAPTER = {"adapter", compositions.KEY}

_FREE: frozenset[Ability] = frozenset({"logprobs"})
"""Abilities that come with the engine, whatever the model: an expert has them without saying so."""


@dataclass(slots=True)
class Prepared:
    """What became of an entry. `expert` is None where anything was wrong."""

    entry: Entry
    expert: Expert | None = None
    spec: ExpertSpec | None = None
    problems: list[Problem] = field(default_factory=list)


def prepare(
    context: Context,
    entries: Sequence[Entry],
    servers: Mapping[str, KnownServer],
    named: Collection[str],
) -> list[Prepared]:
    """Cards read, fields validated, adapters verified; in the order of `entries`. Reading and
    hashing run in threads, which numpy and hashlib let run side by side; then compositions are
    made, each after its members. `named` are the servers of the file, those included that are
    wrong themselves: what names one of these is looked at as far as it goes without it."""
    composed = [entry for entry in entries if compositions.is_composed(entry)]
    plain = [entry for entry in entries if not compositions.is_composed(entry)]
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="registry") as pool:
        done = {
            result.entry.id: result
            for result in pool.map(lambda one: _prepare(context, one, servers, named, {}), plain)
        }
    order, circular = compositions.in_order(context, composed)
    for entry, problem in circular:
        done[entry.id] = Prepared(entry, problems=[problem])
    for entry in order:
        done[entry.id] = _prepare(context, entry, servers, named, done)
    results = [done[entry.id] for entry in entries]
    for result in results:
        if result.entry.source == "runtime":
            context.add_runtime(result.entry.id, result.problems)
        else:
            context.problems += result.problems
    return results


def _prepare(
    context: Context,
    entry: Entry,
    servers: Mapping[str, KnownServer],
    named: Collection[str],
    known: Mapping[str, Prepared],
) -> Prepared:
    """`known` are the experts that a composition may name."""
    result = Prepared(entry)
    block = entry.block
    server = _server(block, servers, named, result)
    made = None
    others = _MAKES_ADAPTER & block.data.keys()
    key = "gate" if block.data.get("gate") is not None and not others else "adapter"
    try:
        folder, roots = _adapter_folder(context, entry, key)
    except CatalogError as error:
        result.problems += _retold(block, key, error)
        return result
    try:
        if folder is not None:
            block = _with_card(context, entry, folder, roots, result)
        if compositions.is_composed(entry):
            made, problems = compositions.make(context, entry, server, known, servers)
            result.problems += problems
            # What it needs no more is left out, so that the rest is checked all the same.
            rest = {key: value for key, value in block.data.items() if key not in _MAKES_ADAPTER}
            block = replace(block, data=rest)
            if made is not None:
                folder, roots = made.folder, (made.root,)
                block = compositions.with_members(block, made.said)
    except CatalogError as error:
        # One without a line is about the card as a whole, so where it is named is the place.
        place = block.at((key,))
        result.problems += [p if p.line else _retell(place, p) for p in error.problems]
        return result
    except (OSError, RuntimeError, ValueError) as error:  # a path that no file system takes
        result.problems.append(
            block.problem((key,), f"this path cannot be used: {error}", "Correct it.")
        )
        return result

    expanded = key == "adapter" and made is None and folder is not None and is_compressed(folder)
    if expanded and folder is not None:
        folder, roots = _expanded(context, block, folder, roots, result)
        if folder is None:
            return result
    spec, problems = validate(ExpertSpec, block, beside=(compositions.KEY,))
    result.problems += problems
    examples = _examples(context, block, result)
    adapter = None
    if folder is not None:
        digest = made.digest if made is not None else None
        digest = digest if spec is None or spec.digest is None else spec.digest
        adapter = _verified(context, block, key, folder, roots, server, digest, result)
    if spec is None:
        return result
    if spec.gate is not None and others:
        message = (
            f"an expert has a `gate`, which holds its members, or {' or '.join(sorted(others))}"
        )
        result.problems.append(block.problem(("gate",), message, "Remove all but one."))
    has_adapter = folder is not None or compositions.is_composed(entry)
    if spec.digest is not None and not has_adapter:
        message = "it pins an adapter, but the expert has none"
        remedy = "Remove it, or add the `adapter` or `gate`."
        problem = block.problem(("digest",), message, remedy)
        result.problems.append(problem)
    if spec.server_path is not None and (key == "gate" or not has_adapter):
        message = "it is an adapter's folder, but the expert has none"
        problem = block.problem(("server_path",), message, "Remove it, or add the `adapter`.")
        result.problems.append(problem)
    if spec.server_path is not None and entry.source == "runtime":
        # What the server loads from its disk is the operator's to say, not an API caller's.
        message = "an expert that is added at run time cannot say it"
        remedy = "Remove it; `server_path` of an `adapters_from` entry holds for its folder."
        result.problems.append(block.problem(("server_path",), message, remedy))
    if server is None:
        return result
    if adapter is not None and folder is not None:
        ours = made is not None or isinstance(spec.adapter, str)  # one of the hub lies in its cache
        seen = context.seen_by(spec.server, folder) if ours else None
        if spec.server_path is not None:
            below = made is not None or expanded
            seen = f"{spec.server_path}/{folder.name}" if below else spec.server_path
        # One that `composer compose` made may stand here by its folder alone.
        composed = made_of(adapter.path, adapter.digest) if made is None else made.composed
        adapter = replace(adapter, server_path=seen, composed=composed)
    abilities = _abilities(block, spec, server, result)
    window = _window(block, spec, server, result)
    if not result.problems and (adapter is not None or not has_adapter):
        result.spec = spec
        result.expert = Expert(
            id=entry.id,
            server=spec.server,
            description=spec.description,
            skills=spec.skills,
            examples=spec.examples + examples,
            adapter=adapter,
            prompt=spec.prompt,
            sampling=SamplingDefaults(**spec.sampling.model_dump()),
            context_window=window,
            chars_per_token=spec.chars_per_token,
            abilities=abilities,
            parameters=server.family.parameters,
            cost=_cost(spec),
            source=entry.source,
        )
    return result


def _adapter_folder(
    context: Context, entry: Entry, key: str
) -> tuple[Path | None, tuple[Path, ...]]:
    """The folder of the adapter or gate and the roots it may lie in. None where there is none, or
    one written in a way that validation refuses."""
    written = entry.block.data.get(key)
    if isinstance(written, str) and written:
        folder = entry.folder or context.located(written)
        context.look(folder)
        return folder, context.roots
    if isinstance(written, Mapping) and key == "adapter":
        name, revision = written.get("hub"), written.get("revision")
        if isinstance(name, str) and isinstance(revision, str) and is_hub_name(name) and revision:
            folder = fetch_adapter(name, revision)
            return folder, (adapter_root(folder).resolve(),)
    return None, context.roots


def _expanded(
    context: Context, block: Block, folder: Path, roots: Sequence[Path], result: Prepared
) -> tuple[Path | None, tuple[Path, ...]]:
    """The ordinary adapter of a compressed one, and the root that it lies in: made beside the
    compositions, where it is not there yet. None where that cannot be. Blocks."""
    shelf = context.compositions
    try:
        if (refusal := outside(folder / TERNARY, roots)) is not None:
            raise AdapterError([refusal])
        return shelf.expand(folder), (shelf.folder,)
    except CatalogError as error:
        result.problems += _retold(block, "adapter", error)
    except OSError as error:
        message = f"it cannot be expanded into {shelf.folder}: {error}"
        remedy = "Make room, or set another COMPOSER_CACHE_DIR."
        result.problems.append(block.problem(("adapter",), message, remedy))
    return None, ()


def _with_card(
    context: Context, entry: Entry, folder: Path, roots: Sequence[Path], result: Prepared
) -> Block:
    """The block with what it does not say itself taken from the adapter's card."""
    block = entry.block
    card = read_card(folder, roots, context.cache)
    inner = card.data.get("composer") if card is not None and card.data is not None else None
    if card is None or inner is None:
        if entry.folder is not None and ((folder / CONFIG).exists() or is_gate(folder)):
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
    start = context.folder
    if place.document.file != RUNTIME:  # a card's files lie beside the card
        start = Path(place.document.file).parent
    file = context.located(written, start)
    context.look(file)
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
    named: Collection[str],
    result: Prepared,
) -> KnownServer | None:
    name = block.data.get("server")
    if not isinstance(name, str):
        return None
    if named and name not in named:  # that there is none at all is told once
        message, remedy = unknown_name("server", name, list(named))
        result.problems.append(block.problem(("server",), message, remedy))
    return servers.get(name)


def _verified(
    context: Context,
    block: Block,
    key: str,
    folder: Path,
    roots: Sequence[Path],
    server: KnownServer | None,
    digest: str | None,
    result: Prepared,
) -> Adapter | None:
    """Without a server, what does not depend on one is verified."""
    features = server.family.adapter_features if server else get_args(AdapterFeature)
    base = server.base if server else None
    if server is not None and key == "adapter":
        try:
            server.family.check_adapters(server.server.settings)
        except ValueError as error:
            message, _, remedy = str(error).partition("; ")
            message = f"server {server.server.id!r} {message}"
            remedy = f"{remedy[:1].upper()}{remedy[1:]}."
            result.problems.append(block.problem(("adapter",), message, remedy))
            return None
    try:
        if key == "gate":
            return gate_cached(
                context.cache, folder, base, roots=roots, features=features, digest=digest
            )
        return verify_cached(
            context.cache,
            folder,
            base,
            roots=roots,
            max_rank=server.max_rank if server else None,
            features=features,
            digest=digest,
        )
    except CatalogError as error:
        result.problems += _retold(block, key, error)
    except OSError as error:  # changed while it was read
        result.problems.append(
            block.problem((key,), f"{folder} cannot be read: {error}", "Try again.")
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


def _retold(block: Block, key: str, error: CatalogError) -> list[Problem]:
    return [_retell(block.at((key,)), problem) for problem in error.problems]


def _retell(place: Place, problem: Problem) -> Problem:
    """A problem of a file, told at the place that names the file."""
    line = f":{problem.line}" if problem.line is not None else ""
    where = f"{problem.file}{line}: " if problem.file else ""
    inner = f"{problem.path}: " if problem.path else ""
    return place.problem(f"{where}{inner}{problem.message}", problem.remedy)
