"""Whether a policy's router and strategy fit its experts: theirs to say, and told here with the
place. Knows them by their families alone, and reads no policy of the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from composer.errors import errors_of
from composer.registry.blocks import Place, unknown_name
from composer.registry.context import Context
from composer.registry.experts import Prepared
from composer.registry.families import ComponentFamily
from composer.types import Expert, Policy


def check_fit(
    context: Context,
    place: Place,
    policy: Policy,
    absent: Sequence[str],
    prepared: Mapping[str, Prepared],
) -> None:
    """`place` is the policy's; `absent` are run-time experts that it would have too, were they not
    left out. An expert that is wrong itself is told elsewhere, and nothing is asked about the
    others without it."""
    router = context.families.routers[policy.router.name]
    _check_asked(context, place / "router", router.asks(policy.router.settings), prepared)
    experts = [known for id_ in policy.experts if (known := prepared[id_].expert) is not None]
    if len(experts) < len(policy.experts):
        return
    if error := _misfit(router, policy, experts):
        _tell(context, place / "router", policy, absent, experts, prepared, error)
    strategy = context.families.strategies[policy.strategy.name]
    _check_weigher(
        context, place / "strategy", strategy.weighs(policy.strategy.settings), experts, prepared
    )
    # By their ids alone, so that those who are absent for a while count as well.
    whole = replace(policy, experts=(*policy.experts, *absent))
    if error := _misfit(strategy, whole, experts):
        for one in errors_of(error):
            context.problems.append((place / "strategy").problem(*in_words(one)))


def in_words(error: ValueError) -> tuple[str, str]:
    """Message and remedy of an error that reads "what is wrong; the remedy"."""
    message, _, remedy = str(error).partition("; ")
    return message, f"{remedy[:1].upper()}{remedy[1:]}."


def _misfit(
    family: ComponentFamily, policy: Policy, experts: Sequence[Expert]
) -> ValueError | None:
    try:
        family.check(policy, experts)
    except ValueError as error:
        return error
    return None


def _tell(
    context: Context,
    place: Place,
    policy: Policy,
    absent: Sequence[str],
    experts: Sequence[Expert],
    prepared: Mapping[str, Prepared],
    error: ValueError,
) -> None:
    """Of a router that refuses these experts: where the file's own would do, it is the business of
    those added at run time, and of each that does not fit in with the file's."""
    told = [in_words(one) for one in errors_of(error)]
    router = context.families.routers[policy.router.name]
    added = [expert for expert in experts if expert.source == "runtime"]
    own = [expert for expert in experts if expert.source == "file"]
    if added and own and _misfit(router, policy, own) is None:
        alone = [one for one in added if _misfit(router, policy, [*own, one]) is not None]
        for expert in alone or added:
            block = prepared[expert.id].entry.block
            said = f"it does not fit policy {policy.id!r}:"
            problems = [block.problem((), f"{said} {message}", remedy) for message, remedy in told]
            context.add_runtime(expert.id, problems)
        return
    if absent and _misfit(router, replace(policy, quality=None, max_cost=None), experts) is None:
        until = "requests that aim at a quality or a spend are refused here"
        context.warn_left_out(place, absent[0], until)
        return
    context.problems.extend(place.problem(*words) for words in told)


def _check_asked(
    context: Context, place: Place, asked: str | None, prepared: Mapping[str, Prepared]
) -> None:
    """A router can ask any expert of the catalog that follows free instructions."""
    if asked is None:
        return
    if asked not in prepared:
        if asked in context.left_out:
            context.warn_left_out(place, asked, "the router decides without asking it")
        elif not context.experts_missing:
            message, remedy = unknown_name("expert", asked, list(prepared))
            context.problems.append(place.problem(f"it asks {asked!r}, and {message}", remedy))
        return
    expert = prepared[asked].expert
    if expert is not None and expert.prompt is not None:
        message = (
            f"it asks {asked!r}, which reads only what its `prompt` template makes of a request"
        )
        remedy = "Name an expert that follows free instructions."
        context.problems.append(place.problem(message, remedy))


def _check_weigher(
    context: Context,
    place: Place,
    weigher: str | None,
    experts: Sequence[Expert],
    prepared: Mapping[str, Prepared],
) -> None:
    """A strategy can have the policy's experts weighed by the gate of any expert of the catalog
    that they are members of."""
    if weigher is None:
        return
    if weigher not in prepared:
        if weigher in context.left_out:
            context.warn_left_out(place, weigher, "the router's weights are taken")
        elif not context.experts_missing:
            message, remedy = unknown_name("expert", weigher, list(prepared))
            message = f"{weigher!r} is to weigh its experts, and {message}"
            context.problems.append(place.problem(message, remedy))
        return
    expert = prepared[weigher].expert
    if expert is None:
        return
    gate = None if expert.adapter is None else expert.adapter.gate
    if gate is None:
        message = (
            f"{weigher!r} is to weigh its experts, and has no gate whose weights can be read: on "
            f"server {expert.server!r} it is {'an' if expert.adapter else 'without an'} adapter"
        )
        remedy = (
            "Name an expert with `gate: FOLDER` on an embedded server, or remove `gate`: the "
            "router's weights do on any engine."
        )
        context.problems.append(place.problem(message, remedy))
        return
    members = [e for e in experts if e.adapter is not None and e.adapter.digest in gate.digests]
    if len(members) < 2:
        message = (
            f"{weigher!r} is to weigh its experts, and {len(members)} of them "
            f"{'is' if len(members) == 1 else 'are'} among the gate's members "
            f"({', '.join(gate.members)}, by the adapters that it was made of)"
        )
        remedy = "Name two or more of these in `experts`, or make the gate again with them."
        context.problems.append(place.problem(message, remedy))
