"""`router-training select`: the few of many experts that a task needs, or that fit a machine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from router_training.commands.collect import ScorerName
from router_training.console import (
    API_KEY_ENV,
    ApiKeyEnv,
    Experts,
    Json,
    Pool,
    Prices,
    Seed,
    Split,
    Url,
    bars,
    err,
    named_experts,
    out,
    outcomes_of,
    percent,
    refuse,
    say,
    service_at,
    told_plainly,
    written,
)

if TYPE_CHECKING:
    from router_training.asking import Ask
    from router_training.selection import Selection

ONLY_RULES = {ScorerName.exact, ScorerName.regex, ScorerName.numeric, ScorerName.choice}


def select(
    data: Annotated[
        str,
        typer.Option(
            help="Examples of the task. With outcomes of the experts these are read, one by one; "
            "with --scorer the experts are asked."
        ),
    ],
    keep: Annotated[int, typer.Option(min=1, help="How many experts to keep.")] = 3,
    examples: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Draw so many of the examples, of each task (column `task`, `category` or "
            "`benchmark`) its share; default: all.",
        ),
    ] = None,
    category: Annotated[
        str | None, typer.Option(help="Only examples of this category or benchmark.")
    ] = None,
    confidence: Annotated[
        float, typer.Option(min=0.5, max=0.999, help="That the best are kept.")
    ] = 0.9,
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="Mean score that may be lost by ending early.")
    ] = 0.005,
    experts: Experts = None,
    pool: Pool = None,
    registry: Annotated[
        Path | None,
        typer.Option(help="An experts.yaml: descriptions and examples that are like the task's."),
    ] = None,
    scorer: Annotated[
        ScorerName | None, typer.Option(help="Ask the experts, and score so (as `collect`).")
    ] = None,
    url: Url = None,
    api_key_env: ApiKeyEnv = API_KEY_ENV,
    answers: Annotated[
        Path | None,
        typer.Option(
            help="With --scorer: where answers are kept, so that a stopped run goes on; default: "
            "beside --json, else beside the data."
        ),
    ] = None,
    memory_gb: Annotated[
        float | None, typer.Option(min=0.0, help="The best subset within this memory together.")
    ] = None,
    latency_ms: Annotated[
        float | None, typer.Option(min=0.0, help="The best subset of experts as fast as this.")
    ] = None,
    max_cost: Annotated[
        float | None,
        typer.Option(min=0.0, help="The best expert for each kind within US dollars a question."),
    ] = None,
    measured: Annotated[
        Path | None,
        typer.Option(help="For these limits: a table of expert, memory_gb and latency_ms."),
    ] = None,
    prices: Prices = None,
    split: Split = None,
    seed: Seed = 0,
    as_json: Json = None,
) -> None:
    """Pick the experts worth registering: the best for a task from few evaluations, or with
    --memory-gb, --latency-ms or --max-cost the best subset within these limits."""
    with told_plainly():
        if memory_gb is not None or latency_ms is not None or max_cost is not None:
            if scorer is not None:
                refuse("limits are kept on recorded outcomes; leave --scorer out")
            names = named_experts(data, experts, pool)
            result = _within(
                data, names, split, prices, (memory_gb, latency_ms, max_cost), measured
            )
            if not written(result, as_json):
                _show_subset(result)
            return
        given = named_experts(data, experts, pool)
        with bars(as_json) as progress:
            settings: dict[str, Any] = {
                "keep": keep, "confidence": confidence, "tolerance": tolerance,
                "seed": seed, "progress": progress,
            }  # fmt: skip
            if scorer is None:
                found = _recorded(
                    data, given, split, prices, category, examples, registry, settings
                )
            elif scorer not in ONLY_RULES:
                refuse(
                    f"--scorer {scorer} is not one of {', '.join(sorted(ONLY_RULES))}; run "
                    "`router-training collect` with it, and select from what it writes"
                )
            else:
                if category is not None:
                    refuse("--category is for recorded outcomes; name a file of the task's own")
                address, key = service_at(url, api_key_env)
                kept = answers or _beside(Path(data), as_json)
                found = _asked(Path(data), given, split, scorer, address, key, kept, examples,
                               registry, settings)  # fmt: skip
    plain = {
        "kept": list(found.kept),
        "unknown": list(found.unknown),
        "confidence": found.confidence,
        "regret": found.regret,
        "evaluations": found.evaluations,
        "exhaustive": found.exhaustive,
        "ranking": [
            {name: getattr(one, name) for name in one.__slots__} for one in found.standings
        ],
    }
    if not written(plain, as_json):
        _show(found)


def _recorded(
    data: str,
    names: Sequence[str] | None,
    split: str | None,
    prices: Path | None,
    category: str | None,
    examples: int | None,
    registry: Path | None,
    settings: dict[str, Any],
) -> Selection:
    import numpy as np

    from router_training.errors import TrainingError
    from router_training.selection import drawn_rows
    from router_training.selection import select as pick

    outcomes = outcomes_of(data, names, split, prices)
    if category is not None:
        of = zip(outcomes.benchmark, outcomes.category, strict=True)
        rows = np.array([category in pair for pair in of], np.bool_)
        if not rows.any():
            there = sorted({*outcomes.benchmark, *outcomes.category} - {""})
            raise TrainingError(
                f"no example is of {category!r}; there are: {', '.join(there) or 'none'}"
            )
        outcomes = outcomes.rows(rows)
    labels = [" ".join(pair) for pair in zip(outcomes.benchmark, outcomes.category, strict=True)]
    outcomes = outcomes.rows(np.array(drawn_rows(labels, examples, settings["seed"]), np.intp))
    column = {expert: i for i, expert in enumerate(outcomes.experts)}

    async def read(expert: str, rows: Sequence[int]) -> list[float | None]:
        own = outcomes.quality[list(rows), column[expert]]
        return [None if np.isnan(score) else float(score) for score in own]

    settings["similarity"] = _similarity(registry, outcomes.experts, outcomes.text)
    return asyncio.run(pick(outcomes.experts, len(outcomes), read, **settings))


def _beside(data: Path, as_json: Path | None) -> Path:
    out_file = data if as_json is None or str(as_json) == "-" else as_json
    return out_file.with_name(out_file.name + ".answers.jsonl")


def _asked(
    data: Path,
    names: Sequence[str] | None,
    split: str | None,
    scorer: str,
    url: str,
    key: str | None,
    answers: Path,
    examples: int | None,
    registry: Path | None,
    settings: dict[str, Any],
) -> Selection:
    from router_training.asking import Endpoint
    from router_training.calls import Journal, Remembered
    from router_training.collect import Prompt, Questions, check, heard, read_questions
    from router_training.errors import TrainingError
    from router_training.scorers import make_scorer
    from router_training.selection import drawn_rows
    from router_training.selection import select as pick

    questions = read_questions(data, split)
    columns = questions.table.columns
    labels = columns.get("task", columns.get("category", columns.get("benchmark")))
    taken = drawn_rows(
        [str(label) for label in labels or [""] * len(questions)], examples, settings["seed"]
    )
    questions = Questions(
        questions.table.rows(taken), tuple(questions.examples[row] for row in taken)
    )
    scored = make_scorer(scorer)
    why: dict[str, str] = {}
    tried: dict[str, int] = {}
    missing: dict[str, int] = {}

    async def run() -> Selection:
        async with Endpoint(url, api_key=key) as endpoint:
            there = await endpoint.check(names or ())
            check(questions, scored, there)
            with Journal(answers) as journal:
                remembered = Remembered(endpoint, journal, endpoint.how, endpoint.source)
                remembered.check(there)
                return await selected(there, remembered)

    async def selected(there: Sequence[str], remembered: Ask) -> Selection:
        async def ask(expert: str, rows: Sequence[int]) -> list[float | None]:
            some = Questions(
                questions.table.rows(list(rows)), tuple(questions.examples[i] for i in rows)
            )
            answered = await heard(some, [expert], remembered, scored, Prompt())
            scores = answered.scores[expert]
            tried[expert] = tried.get(expert, 0) + len(rows)
            missing[expert] = missing.get(expert, 0) + scores.count(None)
            if None in scores:
                why.setdefault(expert, answered.notes[0])
            if set(tried) == set(there) and tried == missing:
                raise TrainingError("; ".join(["there is not one answer", *why.values()]))
            return scores

        texts = [example.text for example in questions.examples]
        similarity = _similarity(registry, there, texts)
        return await pick(there, len(questions), ask, similarity=similarity, **settings)

    found = asyncio.run(run())
    for expert, number in missing.items():
        if number:
            note = f"no score of {expert} on {number} of {tried[expert]} examples ({why[expert]})"
            err.print(note, style="dim", markup=False, highlight=False, soft_wrap=True)
    return found


def _similarity(registry: Path | None, experts: Sequence[str], texts: Sequence[str]) -> Any:
    """(E,) how near each expert's texts in the registry come to the task's examples, on average
    over these; None without a registry."""
    if registry is None:
        return None
    from router_training.embedding import open_embedding
    from router_training.registered import claims_in
    from router_training.suitability import nearness

    encode = open_embedding().kept.encode
    claims = [claims_in(registry, expert) for expert in experts]
    return nearness(claims, texts, encode)


def _within(
    data: str,
    names: Sequence[str] | None,
    split: str | None,
    prices: Path | None,
    limits: tuple[float | None, float | None, float | None],
    measured: Path | None,
) -> dict[str, Any]:
    from dataclasses import asdict

    from router_training.subset import Limits, keep_within, read_measured

    outcomes = outcomes_of(data, names, split, prices)
    if measured is None and limits[:2] != (None, None):
        refuse("--memory-gb and --latency-ms need what was measured; name its file by --measured")
    known = {} if measured is None else read_measured(measured, outcomes.experts)
    kept = keep_within(outcomes, Limits(*limits), known)
    return {**asdict(kept), "experts": list(kept.experts)}


def _show(found: Selection) -> None:
    table = Table("expert", "", "expected (95 %)", "among the best", "evaluations")
    kept = set(found.kept)
    for one in found.standings:
        table.add_row(
            escape(one.expert),
            "kept" if one.expert in kept else "" if one.scores else "unknown",
            percent(one.expected, (one.low, one.high)) if one.scores else "–",
            percent(one.likely, None) if one.scores else "–",
            str(one.evaluations),
        )
    out.print(table)
    if found.unknown:
        say(f"without a score, so that nothing is known of them: {', '.join(found.unknown)}")
    say(
        f"{found.evaluations} evaluations of {found.exhaustive}; the kept are the best with "
        f"{percent(found.confidence, None)}, and the best are expected to be better by "
        f"{100 * found.regret:.1f} points"
    )


def _show_subset(kept: dict[str, Any]) -> None:
    table = Table("kind of question", "expert")
    for kind, expert in kept["of"].items():
        table.add_row(escape(kind), escape(expert))
    out.print(table)
    whole = "the best subset" if kept["exact"] else "the best subset is at most"
    parts = [
        f"kept: {', '.join(kept['experts'])}",
        f"mean quality {percent(kept['value'], None)} ({whole} {percent(kept['best'], None)}, "
        f"with everybody {percent(kept['everybody'], None)})",
    ]
    if kept["memory_gb"] is not None:
        parts.append(f"{kept['memory_gb']:g} GB")
    if kept["cost"] is not None:
        parts.append(f"{kept['cost']:.3g} US dollars a question")
    say("; ".join(parts))
