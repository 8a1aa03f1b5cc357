"""router-training profile."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from router_training.console import (
    API_KEY_ENV,
    ApiKeyEnv,
    Data,
    Experts,
    Json,
    Pool,
    Split,
    Url,
    bars,
    err,
    named_experts,
    out,
    outcomes_of,
    refuse,
    say,
    service_at,
    told_plainly,
    written,
)

if TYPE_CHECKING:
    from router_training.profiles import Annotations, ProfileTable
    from router_training.progress import Progress

SHOWN = 12
"""Skills of the table printed; the file has all."""


def profile(
    data: Data,
    out_file: Annotated[
        Path, typer.Option("--out", help="The profile, JSON: `train --skills` reads it.")
    ],
    skill_list: Annotated[
        Path | None,
        typer.Option(help="Skills to choose from, one a line. Each question gets the nearest."),
    ] = None,
    ask: Annotated[
        str | None,
        typer.Option(
            help="An expert that says which skills a question asks for, through a running service. "
            "Without it and a list, a question's skills are its category and benchmark."
        ),
    ] = None,
    url: Url = None,
    api_key_env: ApiKeyEnv = API_KEY_ENV,
    samples: Annotated[
        int,
        typer.Option(
            min=1,
            max=20,
            help="--ask: answers to each question; of several, skills "
            "that more than one names are kept.",
        ),
    ] = 5,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="Of --ask.")] = 0.7,
    nearest: Annotated[
        int, typer.Option(min=1, help="--skill-list without --ask: skills of a question.")
    ] = 3,
    least: Annotated[
        int,
        typer.Option(
            min=1, help="Questions that a skill needs; the rarer become the nearest of the others."
        ),
    ] = 5,
    concurrency: Annotated[int, typer.Option(min=1, max=1024, help="Questions at once.")] = 16,
    experts: Experts = None,
    pool: Pool = None,
    split: Split = None,
    as_json: Json = None,
) -> None:
    """Say which skills each question asks for, and write what each expert has shown at them.

    What an expert is asked is kept beside the output as it comes: stopped, the same command goes
    on, and nothing is asked twice.
    """
    with told_plainly():
        from router_training.embedding import open_embedding
        from router_training.profiles import (
            among,
            annotated,
            by_embedding,
            by_labels,
            gathered,
            profile_table,
            read_list,
            write_profile,
        )

        names = named_experts(data, experts, pool)
        outcomes = outcomes_of(data, names, split, None)
        skills = None if skill_list is None else read_list(skill_list)
        by: dict[str, Any] = {"least": least}
        notes: list[str] = []
        found: Annotations
        with bars(as_json) as progress:
            if ask is not None:
                by |= {"method": "llm", "expert": ask, "samples": samples}
                by |= {"temperature": temperature}
                address, key = service_at(url, api_key_env)
                found, notes = asyncio.run(
                    _asked(
                        outcomes.text,
                        ask,
                        url=address,
                        key=key,
                        samples=samples,
                        temperature=temperature,
                        concurrency=concurrency,
                        journal=out_file.with_name(out_file.name + ".answers.jsonl"),
                        progress=progress,
                    )
                )
                if skills is not None:
                    found = among(found, skills, open_embedding(progress).kept.encode)
            elif skills is not None:
                by |= {"method": "embedding", "nearest": nearest}
                encode = open_embedding(progress).kept.encode
                found = by_embedding(outcomes.text, skills, encode, nearest)
            else:
                by |= {"method": "labels"}
                found = by_labels(outcomes)
            if ask is not None or skills is not None:
                found = gathered(found, open_embedding(progress).kept.encode, least)
        if not any(found.values()):
            refuse(f"{ask} named no skill that two samples share; ask a more capable expert")
        table = profile_table(annotated(outcomes, found), least)
        source = Path(data).name if "://" not in data else "database"
        write_profile(out_file, found, table, source=source, by=by)
    for note in notes:
        err.print(note, style="dim", markup=False, highlight=False, soft_wrap=True)
    if written({"out": str(out_file), "by": by, "notes": notes, **_plain(table)}, as_json):
        return
    _print(table)
    say(f"{len(found)} questions, {len(table.skills)} skills → {out_file}")


async def _asked(
    texts: tuple[str, ...],
    expert: str,
    *,
    url: str,
    key: str | None,
    samples: int,
    temperature: float,
    concurrency: int,
    journal: Path,
    progress: Progress,
) -> tuple[Annotations, list[str]]:
    from contextlib import AsyncExitStack

    from composer.routing.keywords import MAX_TOKENS
    from router_training.asking import Endpoint, How
    from router_training.calls import Journal, Remembered
    from router_training.profiles import by_llm

    async with AsyncExitStack() as stack:
        kept = stack.enter_context(Journal(journal))
        asks = []
        for seed in range(samples):  # another seed each, so that a sample can be told from the next
            how = How(temperature=temperature, max_tokens=MAX_TOKENS, more={"seed": seed})
            endpoint = await stack.enter_async_context(Endpoint(url, api_key=key, how=how))
            await endpoint.check([expert])
            remembered = Remembered(endpoint, kept, how, endpoint.source)
            remembered.check([expert])
            asks.append(remembered)
        return await by_llm(texts, expert, asks, concurrency=concurrency, progress=progress)


def _plain(table: ProfileTable) -> dict[str, Any]:
    rows = zip(table.experts, table.profile.tolist(), table.count.tolist(), strict=True)
    return {
        "skills": list(table.skills),
        "experts": {e: {"profile": sums, "count": counts} for e, sums, counts in rows},
    }


def _print(table: ProfileTable) -> None:
    """Experts × the skills asked for most: right less wrong, and of how many."""
    asked = table.count.sum(axis=0)
    first = (-asked).argsort(kind="stable")[:SHOWN]
    shown = Table("expert", *(escape(table.skills[k]) for k in first))
    for e, expert in enumerate(table.experts):
        cells = [f"{table.profile[e, k]:+.0f} of {table.count[e, k]:.0f}" for k in first]
        shown.add_row(escape(expert), *cells)
    out.print(shown)
    if (more := len(table.skills) - len(first)) > 0:
        say(f"and {more} more skills")
