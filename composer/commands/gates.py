"""`composer gates`: which adapter of a gated expert spoke at which token."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from composer.commands.console import ExpertsOption, fail, out, read_settings
from composer.errors import ComposerError, EngineError, SettingsError
from composer.settings import Settings
from composer.types import Catalog, Expert, GateTrace, GroupBy, TokenGates


def gates(
    text: Annotated[str, typer.Argument(help="What the gated expert is asked.")],
    model: Annotated[
        str | None,
        typer.Option(help="The gated expert; default: the only one.", show_default=False),
    ] = None,
    groups: Annotated[
        Literal["all", "layers"],
        typer.Option(help="Average over all layers, or by ranges of them."),
    ] = "all",
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    experts: ExpertsOption = None,
    url: Annotated[
        str | None,
        typer.Option(help="Ask this running service; default: load the expert's server here."),
    ] = None,
    key: Annotated[
        str | None, typer.Option(envvar="COMPOSER_API_KEY", help="The service's key.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page of it to this file.")] = None,
    png: Annotated[
        Path | None, typer.Option(help="Write a picture of it to this file; needs matplotlib.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show which adapter of a gated expert spoke at which token of a text and its answer."""
    settings = read_settings(experts=experts)
    from composer.commands.gate_views import in_terminal, page, picture

    try:
        if url is None:
            name, trace = asyncio.run(_asked_here(settings, text, model, groups, max_tokens))
        else:
            name, trace = _asked_there(url.rstrip("/"), key, text, model, groups, max_tokens)
        if html is not None:
            _write(html, page(name, trace).encode())
        if png is not None:
            _write(png, picture(name, trace))
    except ComposerError as error:
        fail(error)
    if as_json:
        print(json.dumps({"expert": name, **asdict(trace)}))
        return
    for line in in_terminal(trace, colours=out.color_system is not None):
        out.print(line, soft_wrap=True, highlight=False)


async def _asked_here(
    settings: Settings, text: str, model: str | None, groups: GroupBy, max_tokens: int
) -> tuple[str, GateTrace]:
    """Starts the server of this one expert and nothing else; neither router nor records."""
    from composer.build import build_generation, load, make_embedder
    from composer.calling import call_of
    from composer.types import Request, Sampling

    catalog = load(settings).catalog
    name = _chosen({e.id for e in catalog.experts.values() if _gated(e)}, model)
    expert = catalog.experts[name]
    embedder = make_embedder(settings)
    alone = _alone(catalog, expert)
    try:
        generation = await build_generation(alone, [], embedder, str(settings.experts))
        engine = generation.engines[expert.server]
        try:
            await engine.start()
            request = Request(
                id="gates",
                model=name,
                messages=({"role": "user", "content": text},),
                sampling=Sampling(max_tokens=max_tokens, temperature=0.0),
                gates=groups,
            )
            call = call_of(request, expert, number=0, messages=None, sampling=request.sampling)
            call = replace(call, max_tokens_asked=False)
            if (
                expert.adapter is not None
                and expert.adapter.gate
                and expert.adapter.gate.per_request
            ):
                vector = await embedder.embed(text)
                call = replace(call, embedding=tuple(vector.tolist()))
            async with aclosing(engine.run(call)) as chunks:
                traces = [chunk.gates async for chunk in chunks]
        finally:
            await engine.close()
    finally:
        await embedder.close()
    trace = traces[-1] if traces else None
    if trace is None:
        raise EngineError(f"the server of expert {name!r} told nothing of its gate")
    return name, trace


def _gated(expert: Expert) -> bool:
    return expert.adapter is not None and expert.adapter.gate is not None


def _alone(catalog: Catalog, expert: Expert) -> Catalog:
    servers = {expert.server: catalog.servers[expert.server]}
    return replace(catalog, servers=servers, experts={expert.id: expert}, policies={}, keys={})


def _asked_there(
    url: str, key: str | None, text: str, model: str | None, groups: GroupBy, max_tokens: int
) -> tuple[str, GateTrace]:
    import httpx

    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    body = {
        "messages": [{"role": "user", "content": text}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "composer": {"gates": groups},
    }
    try:
        with httpx.Client(headers=headers, timeout=600) as client:
            listed = _json(client.get(f"{url}/v1/experts"))["data"]
            known = {one["id"] for one in listed if (one["adapter"] or {}).get("gate")}
            name = _chosen(known, model)
            answer = _json(client.post(f"{url}/v1/chat/completions", json={"model": name, **body}))
            return name, _trace(answer["composer"]["gates"][name])
    except (httpx.HTTPError, ValueError) as error:
        raise SettingsError(
            f"no service answers at {url}: {error}; start it, or give its --url"
        ) from error
    except (LookupError, TypeError, AttributeError) as error:  # JSON, but not what is documented
        raise SettingsError(
            f"what answers at {url} is no service of this kind, or of another version "
            f"({type(error).__name__}: {error}); give the --url of one"
        ) from error


def _json(response: Any) -> dict[str, Any]:
    """Raises EngineError with the service's own words where it refuses, ValueError where what
    answers is no such service."""
    body = response.json()
    if response.is_error:
        raise EngineError(str(body["error"]["message"]))
    return dict(body)


def _trace(body: Mapping[str, Any]) -> GateTrace:
    def tokens(own: Any) -> tuple[TokenGates, ...]:
        return tuple(TokenGates(one["token"], one["weights"]) for one in own)

    answers = tuple(tokens(answer) for answer in body["answers"])
    return GateTrace(tuple(body["members"]), tokens(body["prompt"]), answers, body["left_out"])


def _chosen(gated: set[str], model: str | None) -> str:
    """Raises SettingsError where the name is no gated expert's, or none is the only one."""
    known = ", ".join(sorted(gated))
    if not gated:
        raise SettingsError("no expert here has a gate; add one with `gate:` to experts.yaml")
    if model is None and len(gated) > 1:
        raise SettingsError(f"several experts have a gate; name one by --model: {known}")
    if model is not None and model not in gated:
        raise SettingsError(f"{model!r} is no expert with a gate; those are: {known}")
    return model or known


def _write(file: Path, data: bytes) -> None:
    try:
        file.write_bytes(data)
    except OSError as error:
        raise SettingsError(f"{file} cannot be written: {error}; name another file") from error
