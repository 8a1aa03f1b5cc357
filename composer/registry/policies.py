"""The `policies:` block: each entry as a Policy over the experts that its patterns match."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import filter as matching
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from composer.registry.blocks import Block, Place, block_at, block_named, unknown_name, validate
from composer.registry.context import Context
from composer.registry.experts import Prepared
from composer.registry.families import ComponentFamily
from composer.registry.fitting import check_fit
from composer.registry.gather import Entry
from composer.registry.specs import PolicySpec
from composer.types import SAFE_PARAMETERS, Component, Policy, Unsure

_SHOWN = 5


def make_policies(
    context: Context, entries: Mapping[str, Any], experts: Sequence[Prepared]
) -> dict[str, Policy]:
    """Those policies that are right, by id; the problems of the others go to the context."""
    prepared = {result.entry.id: result for result in experts}
    policies = {}
    for id_, data in entries.items():
        place = Place(context.file, ("policies", id_))
        if id_ in prepared:
            _check_id(context, place, prepared[id_].entry)
        block, problems = block_named(place, id_, data)
        context.problems += problems
        if block is not None and (policy := _make_policy(context, id_, block, prepared)):
            policies[id_] = policy
    return policies


def _check_id(context: Context, place: Place, expert: Entry) -> None:
    id_, why = expert.id, "and a request names either by `model`"
    if expert.source == "runtime":
        problem = expert.block.problem((), f"{id_!r} is a policy too, {why}", "Choose another id.")
        context.add_runtime(id_, [problem])
    else:
        message = f"{id_!r} is an expert's id too, {why}"
        context.problems.append(place.problem(message, "Rename one of the two."))


def _make_policy(
    context: Context, id_: str, block: Block, prepared: Mapping[str, Prepared]
) -> Policy | None:
    families = context.families
    router = _made(context, block, "router", families.routers)
    strategy = _made(context, block, "strategy", families.strategies)
    rest = {key: value for key, value in block.data.items() if key not in ("router", "strategy")}
    spec, problems = validate(PolicySpec, replace(block, data=rest))
    context.problems += problems
    if spec is None:
        return None
    experts, absent = _matched(context, block, spec, list(prepared))
    default = _default(context, block, spec, experts, list(prepared))
    _check_costs(context, block, id_, spec, experts, prepared)
    _check_aims(context, block, spec)
    null = _own(context, block, "null_expert", spec.null_expert, experts, list(prepared))
    parameters = _parameters(context, block, spec)
    if router is None or strategy is None:
        return None
    if families.routers[router.name].needs_texts:
        _check_texts(context, block, id_, spec, experts, prepared)
    policy = Policy(
        id=id_,
        router=router,
        strategy=strategy,
        experts=experts,
        default_expert=default,
        threshold=spec.threshold,
        cost_weight=spec.cost_weight,
        k=spec.k,
        max_wait_s=spec.max_wait_s,
        parameters=parameters,
        tolerance=spec.tolerance,
        quality=spec.quality,
        max_cost=spec.max_cost,
        min_quality=spec.min_quality,
        top_p=spec.top_p,
        null_expert=null,
        null_margin=spec.null_margin,
        unsure=Unsure(**spec.unsure.model_dump()) if spec.unsure else None,
        stay=spec.stay,
    )
    check_fit(context, block.home, policy, absent, prepared)
    return policy


def _made(
    context: Context, block: Block, kind: str, families: Mapping[str, ComponentFamily]
) -> Component | None:
    """A router or strategy. Its paths start at the registry's folder, and what lies there is
    watched."""
    written = block.data.get(kind)
    name = written.get("name") if isinstance(written, Mapping) else None
    family = families.get(name) if isinstance(name, str) else None
    if family is not None and isinstance(written, Mapping):
        for dotted in family.path_fields:
            path = dotted.split(".")
            inner: Any = written
            for key in path:
                inner = inner.get(key) if isinstance(inner, Mapping) else None
            if isinstance(inner, str) and inner:
                located = os.path.abspath(context.located(inner))
                written = _with(written, path, located)
                context.look(Path(located))
        block = replace(block, data={**block.data, kind: written})
    settings = {name: family.settings for name, family in families.items()}
    component = _component(context, block, kind, settings)
    if component is None or family is None:
        return component
    return replace(component, digest=family.digest(component.settings))


def _with(data: Mapping[str, Any], path: Sequence[str], value: str) -> dict[str, Any]:
    """A copy with another value where the path leads."""
    key, *rest = path
    return {**data, key: _with(data[key], rest, value) if rest else value}


def _component(
    context: Context, block: Block, kind: str, family: Mapping[str, type[BaseModel]]
) -> Component | None:
    """A router or strategy: `{name: …, its own settings …}`."""
    known = list(family)
    if kind not in block.data:
        choice = ", ".join(f"`{name}`" for name in known)
        remedy = f"Add `{kind}: {{name: …}}`, with one of {choice}."
        context.problems.append(block.problem((kind,), "it is missing", remedy))
        return None
    inner, problems = block_at(block.at((kind,)), block.data[kind])
    context.problems += problems
    if inner is None:
        return None
    if "name" not in inner.data:
        choice = ", ".join(f"`{one}`" for one in known)
        context.problems.append(inner.problem(("name",), "it is missing", f"Add one of {choice}."))
        return None
    name = inner.data["name"]
    if not isinstance(name, str) or name not in family:
        path = ("name",)
        context.problems.append(inner.problem(path, *unknown_name(kind, name, known)))
        return None
    own = {key: value for key, value in inner.data.items() if key != "name"}
    settings, problems = validate(family[name], replace(inner, data=own))
    context.problems += problems
    return None if settings is None else Component(name, settings)


def _matched(
    context: Context, block: Block, spec: PolicySpec, ids: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The ids that a pattern matches and no `!pattern` does, in the order of the catalog; and of
    the run-time experts that are left out at present, the same."""
    found: set[str] = set()
    left_out: set[str] = set()
    passed_over = sorted(context.left_out.difference(ids))
    for number, written in enumerate(spec.experts):
        pattern = written.removeprefix("!")
        some = matching([*ids, *passed_over], pattern)
        (left_out if written != pattern else found).update(some)
        if pattern in passed_over:
            until = "the policy goes without it"
            context.warn_left_out(block.at(("experts", number)), pattern, until)
        if not some and ids and not context.experts_missing:
            message, remedy = unknown_name("expert", pattern, ids)
            if any(mark in pattern for mark in "*?["):
                message = f"no expert's id matches {pattern!r}"
            context.problems.append(block.problem(("experts", number), message, remedy))
    if found and found <= left_out:
        message, remedy = (
            "every expert is left out again",
            "Narrow the patterns that begin with `!`.",
        )
        context.problems.append(block.problem(("experts",), message, remedy))
    experts, absent = (
        tuple(id_ for id_ in some if id_ in found and id_ not in left_out)
        for some in (ids, passed_over)
    )
    if absent and not experts:
        message = f"all its experts are left out at present: {_listed(absent)}"
        remedy = "Mend or delete them (GET /health says why), or add another one."
        context.problems.append(block.problem(("experts",), message, remedy))
    return experts, absent


def _parameters(context: Context, block: Block, spec: PolicySpec) -> frozenset[str]:
    """What the policy allows: the default, with what is added by `+`, or what stands in its
    place."""
    if spec.parameters is None:
        return SAFE_PARAMETERS
    known = sorted(
        SAFE_PARAMETERS.union(*(f.parameters for f in context.families.engines.values()))
    )
    for number, written in enumerate(spec.parameters):
        if written.removeprefix("+") not in known:
            message, remedy = unknown_name("parameter", written.removeprefix("+"), known)
            context.problems.append(block.problem(("parameters", number), message, remedy))
    added = {written.removeprefix("+") for written in spec.parameters if written[:1] == "+"}
    if added and len(added) < len(set(spec.parameters)):
        message = "some names begin with `+` and some do not, so they both add and replace"
        remedy = "Write `+` before all of them, or before none."
        context.problems.append(block.problem(("parameters",), message, remedy))
    return SAFE_PARAMETERS | added if added else frozenset(spec.parameters)


def _default(
    context: Context,
    block: Block,
    spec: PolicySpec,
    experts: Sequence[str],
    ids: Sequence[str],
) -> str | None:
    if spec.default_expert is None and spec.threshold > 0:
        message = "below it the default expert answers, but the policy has none"
        remedy = "Add `default_expert`, or remove the threshold."
        context.problems.append(block.problem(("threshold",), message, remedy))
    return _own(context, block, "default_expert", spec.default_expert, experts, ids)


def _own(
    context: Context,
    block: Block,
    key: str,
    expert: str | None,
    experts: Sequence[str],
    ids: Sequence[str],
) -> str | None:
    """An expert that the policy names, which has to be one of its own; None where it is left out
    at present."""
    if expert is None:
        return None
    if expert not in ids:
        if expert in context.left_out:
            context.warn_left_out(block.at((key,)), expert, "the policy has none")
            return None
        if not context.experts_missing:
            problem = block.problem((key,), *unknown_name("expert", expert, ids))
            context.problems.append(problem)
    elif expert not in experts:
        message = f"{expert!r} is not among the policy's experts"
        remedy = f"Add {expert!r} to `experts`, or name one of those."
        context.problems.append(block.problem((key,), message, remedy))
    return expert


def _check_aims(context: Context, block: Block, spec: PolicySpec) -> None:
    said = [key for key in ("quality", "max_cost", "cost_weight") if getattr(spec, key)]
    if len(said) > 1:
        message = f"it stands beside {said[0]!r}, and both say what cost is to count for"
        context.problems.append(block.problem((said[1],), message, "Keep one of the two."))


def _check_costs(
    context: Context,
    block: Block,
    id_: str,
    spec: PolicySpec,
    experts: Sequence[str],
    prepared: Mapping[str, Prepared],
) -> None:
    """Where cost counts, an expert whose cost is not given would pass for a free one."""
    if spec.cost_weight == 0:
        return
    free = []
    for expert in experts:
        entry, known = prepared[expert].entry, prepared[expert].spec
        if known is None or known.cost is not None:
            continue
        if entry.source == "runtime":
            message, remedy = (
                f"it is missing, and costs count in policy {id_!r}",
                "Add `cost` (0 where it is free).",
            )
            context.add_runtime(expert, [entry.block.problem(("cost",), message, remedy)])
        else:
            free.append(expert)
    if free:
        message = f"costs count here, but {_listed(free)} {_have(free)} no `cost`"
        remedy = "Add `cost` there (0 where it is free), or remove `cost_weight`."
        context.problems.append(block.problem(("cost_weight",), message, remedy))


def _check_texts(
    context: Context,
    block: Block,
    id_: str,
    spec: PolicySpec,
    experts: Sequence[str],
    prepared: Mapping[str, Prepared],
) -> None:
    """A router can find an expert only by what is said about it. With one expert there is
    nothing to find, and the default expert is there for what fits none."""
    if len(experts) < 2:
        return
    mute = []
    for expert in experts:
        entry, known = prepared[expert].entry, prepared[expert].expert
        if known is None or expert == spec.default_expert:
            continue
        if known.description or known.skills or known.examples:
            continue
        if entry.source == "runtime":
            message = f"the router of policy {id_!r} has nothing to find it by"
            problem = entry.block.problem((), message, "Add `examples` or a `description`.")
            context.add_runtime(expert, [problem])
        else:
            mute.append(expert)
    if mute:
        message = f"the router has nothing to find {_listed(mute)} by"
        remedy = "Add `examples` or a `description` there, or leave it out of this policy."
        context.problems.append(block.problem(("router",), message, remedy))


def _listed(ids: Sequence[str]) -> str:
    shown = ", ".join(repr(id_) for id_ in ids[:_SHOWN])
    return shown if len(ids) <= _SHOWN else f"{shown} and {len(ids) - _SHOWN} more"


def _have(ids: Sequence[str]) -> str:
    return "has" if len(ids) == 1 else "have"
