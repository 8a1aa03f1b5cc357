"""Which skills each question asks for, and so what each expert has shown at them: annotations and
profile tables, and the file they are kept in. Knows no wire format; fits no router."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from pydantic import BaseModel, ConfigDict, ValidationError

from composer.durable import replace_file
from composer.routing import keywords
from composer.routing.families.skills import profile_of, skills_of
from composer.routing.outcomes import Outcomes
from composer.routing.views import Encode
from composer.types import FloatArray
from router_training.asking import Ask
from router_training.cells import listed
from router_training.errors import AskFailed, AskRefused, DataError, TrainingError
from router_training.progress import Progress, silent

FORMAT = 1

NEAREST = 3
"""Skills of a list that a question is annotated with: the paper's keywords are 2 to 5."""

CONCURRENCY = 16
FAILED_IN_A_ROW = 3
"""Questions about which asking fails, before the rest is left for another run."""

Annotations = Mapping[str, tuple[str, ...]]
"""A question's text → its skills."""


@dataclass(frozen=True, slots=True, eq=False)
class ProfileTable:
    """P_m[k] `profile` (E, K): right less wrong answers on questions that ask for skill k; `count`
    (E, K) how many these are."""

    experts: tuple[str, ...]
    skills: tuple[str, ...]
    profile: FloatArray
    count: FloatArray


def profile_table(outcomes: Outcomes, least: int) -> ProfileTable:
    """Of outcomes with annotations, for skills that `least` questions ask for."""
    unread = np.zeros((len(outcomes), 1), np.float32)
    names, asks = skills_of(unread, outcomes, least, seed=0)
    profile, count = profile_of(outcomes.quality, asks)
    return ProfileTable(outcomes.experts, names, profile, count)


# --- annotating ----------------------------------------------------------------------------------


def by_labels(outcomes: Outcomes) -> Annotations:
    """Each question's own category and benchmark, as far as these tell questions apart. Raises
    TrainingError where they do not."""
    named = [of for of in (outcomes.category, outcomes.benchmark) if len(set(of) - {""}) > 1]
    if not named:
        raise TrainingError(
            "the outcomes name no two categories or benchmarks that could be skills; give a list "
            "of skills, or an expert to ask"
        )
    own: dict[str, tuple[str, ...]] = {}
    for text, *labels in zip(outcomes.text, *named, strict=True):
        known = dict.fromkeys([*own.get(text, ()), *filter(None, labels)])
        own[text] = tuple(known)
    return own


def by_embedding(
    texts: Sequence[str], skills: Sequence[str], encode: Encode, nearest: int = NEAREST
) -> Annotations:
    """The `nearest` of the skills to each text, by cosine."""
    every = list(dict.fromkeys(texts))
    cosine = encode(every) @ encode(list(skills)).T  # (n, K)
    first = np.argsort(-cosine, axis=1, kind="stable")[:, :nearest]
    return {
        text: tuple(skills[k] for k in own) for text, own in zip(every, first.tolist(), strict=True)
    }


async def by_llm(
    texts: Sequence[str],
    expert: str,
    samples: Sequence[Ask],
    *,
    concurrency: int = CONCURRENCY,
    progress: Progress = silent,
) -> tuple[Annotations, list[str]]:
    """What an expert says, asked once by each of `samples`: keywords that more than one of them
    has. Questions about which it said nothing have none. Also notes. Raises AskError where nobody
    can be asked, or asking failed several times in a row; what was said by then is kept by those
    `samples` that keep it."""
    every = list(dict.fromkeys(texts))
    found: dict[str, tuple[str, ...]] = {}
    refused: list[str] = []
    failed: list[AskFailed] = []
    in_a_row = 0
    room = asyncio.Semaphore(concurrency)
    label = f"asking {expert}"
    progress(label, 0, len(every))

    async def one(text: str) -> None:
        nonlocal in_a_row
        messages: list[Any] = [{"role": "user", "content": keywords.PROMPT.format(text=text)}]
        async with room:
            if in_a_row >= FAILED_IN_A_ROW:
                return
            try:
                said = [await ask(expert, messages) for ask in samples]
                in_a_row = 0
            except AskRefused as error:
                refused.append(str(error))
                found[text] = ()
                return
            except AskFailed as error:
                failed.append(error)
                in_a_row += 1
                return
        found[text] = keywords.agreed([one.text for one in said])
        progress(label, len(found), len(every))

    try:
        async with asyncio.TaskGroup() as tasks:
            for text in every:
                tasks.create_task(one(text))
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None
    if failed:
        raise TrainingError(
            f"{expert} said nothing about {len(every) - len(found)} of {len(every)} questions "
            f"({failed[0]}); give the same command again, and only those are asked about"
        )
    notes = []
    if refused:
        notes.append(f"{len(refused)} questions were refused, the first: {refused[0]}")
    if silent_ones := sum(not own for own in found.values()) - len(refused):
        notes.append(f"about {silent_ones} questions no two samples agree on a skill")
    return found, notes


def gathered(said: Annotations, encode: Encode, least: int) -> Annotations:
    """Skills that fewer than `least` questions ask for become the nearest, by their names' cosine,
    of those that more do; where no skill is asked for so often, all stay."""
    count = Counter(skill for own in said.values() for skill in own)
    often = [skill for skill, n in count.items() if n >= least]
    seldom = [skill for skill, n in count.items() if n < least]
    if not often or not seldom:
        return said
    nearest = (encode(seldom) @ encode(often).T).argmax(axis=1)
    to = {skill: often[k] for skill, k in zip(seldom, nearest.tolist(), strict=True)}
    return {
        text: tuple(dict.fromkeys(to.get(skill, skill) for skill in own))
        for text, own in said.items()
    }


def among(said: Annotations, skills: Sequence[str], encode: Encode) -> Annotations:
    """Each skill as the nearest of a list, by their names' cosine."""
    words = sorted({skill for own in said.values() for skill in own})
    if not words:
        return said
    nearest = (encode(words) @ encode(list(skills)).T).argmax(axis=1)
    to = {word: skills[k] for word, k in zip(words, nearest.tolist(), strict=True)}
    return {text: tuple(dict.fromkeys(to[skill] for skill in own)) for text, own in said.items()}


def annotated(outcomes: Outcomes, skills: Annotations) -> Outcomes:
    """The outcomes with the skills of their questions; () for a question that has none. Raises
    TrainingError where not one question has any."""
    own = tuple(tuple(skills.get(text, ())) for text in outcomes.text)
    if not any(own):
        raise TrainingError(
            "no question of these outcomes has a skill in the profile; make it of the same "
            "questions (`router-training profile`)"
        )
    return replace(outcomes, skills=own)


# --- the file -----------------------------------------------------------------------------------


class _Question(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    query: str
    skills: tuple[str, ...]


class ProfileFile(BaseModel):
    """`questions` are what training reads. The rest is for people: `by` how they were annotated,
    `profile` and `count` expert → skill → P_m[k] and the number of outcomes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int
    source: str
    by: Mapping[str, Any]
    questions: tuple[_Question, ...]
    profile: Mapping[str, Mapping[str, float]]
    count: Mapping[str, Mapping[str, int]]

    @property
    def annotations(self) -> Annotations:
        return {question.query: question.skills for question in self.questions}


def write_profile(
    path: Path,
    skills: Annotations,
    table: ProfileTable,
    *,
    source: str,
    by: Mapping[str, Any],
) -> None:
    """As a whole or not at all. Raises OSError."""
    rows = zip(table.experts, table.profile.tolist(), table.count.tolist(), strict=True)
    profile: dict[str, dict[str, float]] = {}
    count: dict[str, dict[str, int]] = {}
    for expert, sums, numbers in rows:
        profile[expert] = {k: round(v, 4) for k, v in zip(table.skills, sums, strict=True)}
        count[expert] = {k: int(v) for k, v in zip(table.skills, numbers, strict=True)}
    file = ProfileFile(
        format=FORMAT,
        source=source,
        by=dict(by),
        questions=tuple(_Question(query=text, skills=own) for text, own in skills.items()),
        profile=profile,
        count=count,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, [orjson.dumps(file.model_dump(mode="json"), option=orjson.OPT_INDENT_2)])


def read_profile(path: Path) -> ProfileFile:
    """Raises DataError."""
    remedy = "Write it with `router-training profile`."
    try:
        file = ProfileFile.model_validate(orjson.loads(path.read_bytes()))
    except FileNotFoundError as error:
        raise DataError.of(str(path), "there is no such file", remedy) from error
    except (OSError, orjson.JSONDecodeError, ValidationError) as error:
        first = " ".join(str(error).splitlines()[:2])
        raise DataError.of(str(path), f"not a profile ({first})", remedy) from error
    if file.format != FORMAT:
        message = f"a profile of format {file.format}, and this program reads {FORMAT}"
        raise DataError.of(str(path), message, remedy)
    return file


def read_list(path: Path) -> list[str]:
    """A skill a line; empty lines are left alone. Raises DataError for fewer than two."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeError) as error:
        raise DataError.of(
            str(path), f"it cannot be read: {error}", "Write one skill a line, as UTF-8 text."
        ) from error
    skills = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if len(skills) < 2:
        raise DataError.of(
            str(path), f"skills: {listed(skills) or 'none'}", "Name two or more, one a line."
        )
    return skills
