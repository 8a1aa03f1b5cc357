"""router-training collect."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from router_training.console import (
    API_KEY_ENV,
    ApiKeyEnv,
    Experts,
    Json,
    Split,
    Url,
    bars,
    err,
    named_experts,
    number,
    out,
    refuse,
    say,
    service_at,
    told_plainly,
    written,
)

if TYPE_CHECKING:
    from router_training.asking import How
    from router_training.collect import Collected, Prompt, Questions
    from router_training.progress import Progress


class ScorerName(StrEnum):
    exact = "exact"
    regex = "regex"
    numeric = "numeric"
    choice = "choice"
    judge = "judge"
    code = "code"


class JudgeMode(StrEnum):
    grade = "grade"
    pair = "pair"


def collect(
    data: Annotated[
        Path,
        typer.Option(
            help="Questions: CSV, JSON lines or parquet with `query`, and `gold` or `tests`."
        ),
    ],
    out_file: Annotated[
        Path, typer.Option("--out", help="The table of outcomes: .csv, .jsonl (.gz) or .parquet.")
    ],
    scorer: Annotated[
        ScorerName, typer.Option(help="How an answer is held against the right one.")
    ],
    url: Url = None,
    api_key_env: ApiKeyEnv = API_KEY_ENV,
    experts: Experts = None,
    split: Split = None,
    system: Annotated[
        str | None, typer.Option(help="A system message before each question.")
    ] = None,
    template: Annotated[
        str, typer.Option(help="The user's message, with {query} where the question goes.")
    ] = "{query}",
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0)] = 0.0,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of one answer; default: the expert's own.")
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(help="regex: what to find in an answer; without it `gold` is the pattern."),
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(min=0.0, help="numeric: how far off is right, relative.")
    ] = None,
    judge: Annotated[str | None, typer.Option(help="judge: the expert that grades.")] = None,
    judge_mode: Annotated[
        JudgeMode | None,
        typer.Option(help="judge: grade each answer, or compare it with `gold` in both orders."),
    ] = None,
    allow_code: Annotated[
        bool,
        typer.Option(
            "--allow-code", help="code: run what experts write, in bubblewrap if installed."
        ),
    ] = False,
    code_timeout: Annotated[
        float, typer.Option(min=0.1, help="code: seconds for each run.")
    ] = 10.0,
    concurrency: Annotated[int, typer.Option(min=1, max=1024, help="Calls at once.")] = 16,
    wait: Annotated[
        float, typer.Option(min=0.0, help="Seconds that a call is tried while the service is full.")
    ] = 600.0,
    as_json: Json = None,
) -> None:
    """Ask experts all questions through the service, and write who was how right at what cost.

    Answers are kept beside the output as they come: stopped, the same command goes on, and with
    another scorer nobody is asked again. Exit status 1 where calls failed: what was answered is
    written, and the same command asks for the rest.
    """
    with told_plainly():
        from router_training.asking import How
        from router_training.collect import Prompt, read_questions, summary, table_of
        from router_training.writing import check_writable, write_table

        if scorer is not ScorerName.code and allow_code:
            refuse(f"the scorer {scorer} takes no --allow-code; leave it out")
        check_writable(out_file)
        prompt = Prompt(system, template)
        questions = read_questions(data, split)
        address, key = service_at(url, api_key_env)
        run = _Run(
            url=address,
            key=key,
            experts=tuple(named_experts(str(data), experts, None) or ()),
            how=How(temperature=temperature, max_tokens=max_tokens),
            scorer=scorer,
            settings={
                "pattern": pattern,
                "tolerance": tolerance,
                "judge": judge,
                "mode": None if judge_mode is None else judge_mode.value,
            },
            code_timeout=code_timeout if allow_code else None,
            concurrency=concurrency,
            wait_s=wait,
            journal=out_file.with_name(out_file.name + ".answers.jsonl"),
        )
        with bars(as_json) as progress:
            found = asyncio.run(run(questions, prompt, progress))
        write_table(out_file, table_of(questions, found, prompt))
    for note in found.notes:
        err.print(note, style="dim", markup=False, highlight=False, soft_wrap=True)
    rows = summary(found)
    told = {"out": str(out_file), "experts": rows, "failed": found.unasked, "notes": found.notes}
    if not written(told, as_json):
        _show(rows, len(questions))
        say(f"{len(questions)} questions, {len(rows)} experts → {out_file}")
    if found.unasked:
        err.print(
            f"{found.unasked} calls failed or were not tried, and their outcomes are missing in "
            f"{out_file}; the same command makes these calls again, and no other",
            style="red",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(1)


def _show(rows: Sequence[Mapping[str, Any]], questions: int) -> None:
    table = Table("expert", "answered", "scored", "mean score", "US dollars")
    for row in rows:
        counts = [f"{row[name]} of {questions}" for name in ("answered", "scored")]
        table.add_row(escape(row["expert"]), *counts, number(row["mean"]), number(row["cost_usd"]))
    out.print(table)


@dataclass(frozen=True)
class _Run:
    """One run against one service."""

    url: str
    key: str | None
    experts: tuple[str, ...]
    how: How
    scorer: str
    settings: dict[str, Any]
    code_timeout: float | None
    concurrency: int
    wait_s: float
    journal: Path

    async def __call__(self, questions: Questions, prompt: Prompt, progress: Progress) -> Collected:
        from router_training.asking import Endpoint
        from router_training.calls import Journal, Remembered
        from router_training.collect import check, collect
        from router_training.sandbox import Sandbox
        from router_training.scorers import make_scorer

        sandbox = None
        if self.code_timeout is not None:
            sandbox = Sandbox.open(timeout_s=self.code_timeout)
            if sandbox.warning:
                err.print(sandbox.warning, style="yellow", markup=False, soft_wrap=True)
        endpoint = Endpoint(self.url, api_key=self.key, how=self.how, wait_s=self.wait_s)
        async with endpoint:
            wanted = [*self.experts, *filter(None, [self.settings["judge"]])]
            there = await endpoint.check(wanted)
            experts = self.experts or there
            with Journal(self.journal) as journal:
                ask = Remembered(endpoint, journal, self.how, endpoint.source)
                ask.check(dict.fromkeys([*experts, *filter(None, [self.settings["judge"]])]))
                scorer = make_scorer(self.scorer, ask=ask, sandbox=sandbox, **self.settings)
                check(questions, scorer, experts)
                found = await collect(
                    questions,
                    experts,
                    ask,
                    scorer,
                    prompt,
                    concurrency=self.concurrency,
                    progress=progress,
                )
                found.notes += [] if sandbox is None else sandbox.notes
                return found
