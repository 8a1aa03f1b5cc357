"""`composer route`: what a policy's router decides, and why."""

from __future__ import annotations

import asyncio
import json
from time import perf_counter
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from composer.commands.console import ExpertsOption, fail, out, read_settings, say
from composer.errors import ComposerError


def route(
    text: Annotated[str, typer.Argument(help="What a user would ask.")],
    policy: Annotated[
        str | None, typer.Option(help="A policy; default: the default policy.")
    ] = None,
    experts: ExpertsOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show who would answer, and why. Loads no model but the embedder."""
    settings = read_settings(experts=experts)
    from composer.build import load, make_embedder

    try:
        catalog = load(settings).catalog
        embedder = make_embedder(settings)
        decision = asyncio.run(_decide(text, policy, catalog, embedder, str(settings.experts)))
    except ComposerError as error:
        fail(error)
    if as_json:
        print(json.dumps(decision, indent=2))
        return
    plan = decision["plan"]
    chosen = {choice["expert"] for choice in plan["choices"]}
    table = Table("expert", "expected quality", "nearest")
    for expert, score in decision["scores"].items():
        why = plan["reasons"].get("evidence", {}).get(expert, {})
        name = f"[bold]{expert} ←[/]" if expert in chosen else expert
        table.add_row(name, f"{score:.3f}", escape(str(why.get("nearest", ""))))
    out.print(table)
    if (asked := plan["reasons"].get("asked")) is not None:
        say(
            f"while serving, this router asks {asked['expert']!r} first; no engine runs here, so "
            "it decided without",
            "yellow",
        )
    rule = plan["reasons"]["rule"]
    if rule == "below_threshold":
        rule = f"the best quality is below the threshold of {plan['reasons']['threshold']:g}"
    elif rule == "aim_quality":
        asked = plan["reasons"]["aim"]["quality"]
        rule = f"aim: quality ≥ {asked:g} of the best single expert's, at least cost"
    elif rule == "aim_max_cost":
        rule = f"aim: at most ${plan['reasons']['aim']['max_cost']:g} a request on average"
    out.print(
        f"policy {decision['policy']} → {', '.join(chosen)} ({plan['strategy']}; {rule}; "
        f"{decision['decision_ms']:.1f} ms)",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


async def _decide(
    text: str, policy: str | None, catalog: Any, embedder: Any, file: str
) -> dict[str, Any]:
    from composer.build import build_ways, named_ways
    from composer.deciding import decide, way_of
    from composer.generations import Generation
    from composer.types import Message, Request

    messages: tuple[Message, ...] = ({"role": "user", "content": text},)
    request = Request(id="route", model=policy or "", messages=messages, explore=False)
    try:
        ways = await build_ways(catalog, embedder, file)
        generation = Generation(catalog, ways, named_ways(catalog), {})
        await embedder.embed("warm up")  # the first run of a model is not what a service sees
        began = perf_counter()
        plan = await decide(request, generation, way_of(request, generation))
        decision_ms = (perf_counter() - began) * 1000
    finally:
        await embedder.close()
    return {
        "text": text,
        "policy": plan.policy,
        "scores": dict(plan.scores),
        "plan": {
            "strategy": plan.strategy,
            "choices": [{"expert": c.expert, "weight": round(c.weight, 4)} for c in plan.choices],
            "calls": list(plan.calls),
            "reasons": dict(plan.reasons),
        },
        "catalog_digest": catalog.digest,
        "decision_ms": round(decision_ms, 3),
    }
