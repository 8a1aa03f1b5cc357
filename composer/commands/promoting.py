"""`composer promote`: which of two routers serves a policy, and what speaks for it. Asks a running
service, and decides nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.table import Table

from composer.commands.console import out, read_settings, say

DIGEST = 12
"""Characters of one that are shown."""


def promote(
    policy: Annotated[str, typer.Argument(help="A policy whose router has a shadow.")],
    do: Annotated[bool, typer.Option("--do", help="Promote, if it proved better.")] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Serve what experts.yaml names.")] = False,
    any_look: Annotated[
        bool,
        typer.Option(
            "--any-look",
            help="--do: if it proved better by the bound that holds however often one has looked.",
        ),
    ] = False,
    url: Annotated[
        str | None,
        typer.Option(
            help="The running service; default: COMPOSER_HOST and COMPOSER_PORT.",
            show_default=False,
        ),
    ] = None,
    key: Annotated[str | None, typer.Option(envvar="COMPOSER_API_KEY", help="Its key.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show how the artefact in a policy's shadow compares with the one that serves; promote it."""
    import httpx

    if do and undo:
        raise typer.BadParameter("--do and --undo exclude each other; give one of them")
    if any_look and not do:
        raise typer.BadParameter("--any-look says how --do judges; add --do, or leave it out")
    url = url or read_settings().url
    action = "promote" if do else "undo" if undo else None
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    path = f"{url.rstrip('/')}/v1/policies/{quote(policy, safe='')}/promotion"
    try:
        if action is None:
            answer = httpx.get(path, headers=headers, timeout=60)
        else:
            wanted = {"action": action, **({"any_look": True} if any_look else {})}
            answer = httpx.post(path, headers=headers, json=wanted, timeout=600)
        body = answer.json()
    except (httpx.HTTPError, ValueError) as error:
        say(f"no service answers at {url}: {error}; start it, or give its --url", "red")
        raise typer.Exit(1) from None
    if answer.is_error:
        say(body["error"]["message"], "red")
        raise typer.Exit(1)
    if as_json:
        print(json.dumps(body, indent=2))
        return
    if body.get("comparison") is not None:
        out.print(comparison_table(body["comparison"]))
    for line in verdict_lines(body):
        out.print(line, markup=False, highlight=False, soft_wrap=True)


def comparison_table(comparison: Mapping[str, Any]) -> Table:
    """Mean reward of both routers on the judged requests."""
    table = Table("estimate", "in shadow", "serving", "difference (95 %)")
    spread = f"{comparison['low']:+.3f} to {comparison['high']:+.3f}"
    table.add_row(
        "doubly robust",
        f"{comparison['new']:.3f}",
        f"{comparison['old']:.3f}",
        f"{comparison['difference']:+.3f} ({spread})",
    )
    for name, key in (("inverse propensity", "new_ips"), ("self-normalised", "new_snips")):
        value = comparison[key]
        table.add_row(name, "–" if value is None else f"{value:.3f}", "–", "–")
    return table


def verdict_lines(body: Mapping[str, Any]) -> list[str]:
    """What runs where, what the comparison rests on, and what may be concluded."""
    policy = body["policy"]
    if "artefact" not in body:
        return [f"policy {policy}: nothing runs in shadow, and nothing is promoted"]
    lines = [
        f"policy {policy}: {_short(body['artefact'])} serves, {_short(body['shadow'])} in shadow"
    ]
    found = body["comparison"]
    if found is None:
        lines.append("no judged request yet; collect feedback")
    else:
        lines.append(
            f"{found['requests']} judged requests, worth {found['effective']:.0f} equally weighted "
            f"ones; in {100 * found['unsupported']:.0f} % the shadow's choice had no chance, and "
            "counts as worth nothing"
        )
        lines.append(
            f"better with 95 % confidence: {_yes(body['better'])} by this look alone, "
            f"{_yes(body['always_better'])} however often one looks (at least "
            f"{found['always_low']:+.3f}). Who looks again until the first says yes errs far more "
            "often than in 5 %: --any-look asks for the second"
        )
        if body["series_ended"]:
            lines.append(
                "the second counts the first judged requests, which are full: late feedback alone "
                "moves it"
            )
    if body["left_out"]:
        lines.append(f"{body['left_out']} requests of all policies are left out since the start")
    if (promotion := body["promotion"]) is not None:
        lines.append(f"promoted {promotion['created']}; --undo takes it back")
    return lines


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:DIGEST]


def _yes(value: bool) -> str:
    return "yes" if value else "no"
