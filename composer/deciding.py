"""The decision about a request: which way it goes, who may answer, their scores, the plan. Runs
nothing but what a router asks; knows no scheduler and no record."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection

import numpy as np

from composer.eligibility import check_exclude, check_gates, check_parameters, restricted
from composer.errors import UnknownModel, Unsupported
from composer.generations import Generation, Way
from composer.routing import conversation
from composer.routing.aims import aim_of
from composer.routing.base import Query
from composer.routing.choose import choose, most_experts
from composer.routing.explore import draw_of, explored
from composer.types import Ask, Choice, Plan, Request


def way_of(request: Request, generation: Generation) -> Way:
    """The policy the request names, or the plain way to the one expert it names."""
    catalog = generation.catalog
    model = request.model or catalog.default_policy
    if model in generation.ways:
        return generation.ways[model]
    if model not in catalog.experts:
        raise UnknownModel(
            f"there is no model {model!r}; GET /v1/models lists the policies and experts",
            param="model",
        )
    if model in request.exclude:
        raise Unsupported(
            f"{model!r} is both asked for and excluded; drop one of the two",
            param="composer.exclude",
        )
    return generation.named(model)


async def decide(
    request: Request,
    generation: Generation,
    way: Way,
    resident: Callable[[str], bool] = lambda server: True,
    answered_last: Collection[str] = (),
    ask: Ask | None = None,
) -> Plan:
    """The plan for a request that goes this way, nothing run but what its router asks by `ask`.
    `resident` says of a server whether its weights are loaded; `answered_last` are its session's
    experts. Raises RequestError when no plan is possible."""
    check_exclude(request.exclude, generation.catalog.experts)
    request = restricted(request, generation.catalog)
    check_parameters(request, way.policy)
    check_gates(request, way.policy, generation.catalog)
    way.strategy.check(request)
    eligible = way.eligibility.mask(request)
    if way.router is None:
        if request.quality is not None or request.max_cost is not None:
            wish = "quality" if request.quality is not None else "max_cost"
            raise Unsupported(
                f"{wish} needs a policy that chooses; {request.model!r} is one expert, which "
                "answers whatever it costs: name a policy as `model`, or leave the wish out",
                param=f"composer.{wish}",
            )
        expert = way.eligibility.experts[0]
        return Plan(
            policy=way.policy.id,
            strategy=way.policy.strategy.name,
            choices=(Choice(expert, 1.0),),
            calls=(expert,),
            reasons={"rule": "named"},
        )
    query = Query(request.text, request.turns[:-1], patient=request.priority == "batch")
    asked = way.router.asked
    if asked in request.exclude or asked not in generation.catalog.experts:
        ask = None  # whom the request excludes, or a run-time expert that is left out at present
    scores, turns_read = await conversation.score(way.router, query, eligible, ask)
    aim = aim_of(
        way.policy,
        way.cost,
        scores,
        way.router.curve,
        quality=request.quality,
        max_cost=request.max_cost,
        calls=way.strategy.calls(most_experts(way.policy))[1],
    )
    position = way.eligibility.position
    columns = [position[expert] for expert in answered_last if expert in position]
    last = np.isin(np.arange(len(position)), columns) if columns else None  # (E,)
    # A conversation under way is not moved to try somebody out.
    draw = draw_of(request.id) if request.explore and last is None else None
    here = None
    if way.policy.tolerance > 0 or last is not None:
        catalog = generation.catalog
        loaded = {server: resident(generation.place(server)) for server in catalog.servers}
        here = np.array([loaded[catalog.experts[e].server] for e in way.policy.experts], np.bool_)
    plan = choose(scores, aim, way.policy, here, last, way.strategy.calls)
    if query.earlier:
        plan = dataclasses.replace(plan, reasons={**plan.reasons, "turns_read": turns_read})
    plan = explored(plan, scores, aim, way.policy, draw)
    least, most = way.strategy.calls(len(plan.calls))
    told = aim.told(scores.experts, plan.calls[:most], least)
    return dataclasses.replace(plan, reasons={**plan.reasons, **told})
