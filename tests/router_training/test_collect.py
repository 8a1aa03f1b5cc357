"""`router-training collect` against the real API over loopback, over replayed models."""

from __future__ import annotations

import asyncio
import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from starlette.types import ASGIApp, Receive, Scope, Send
from typer.testing import CliRunner

from api.app import create_app
from composer.build import make_service
from composer.settings import Settings
from composer.types import Message
from router_training.asking import How, Said
from router_training.calls import Journal, Remembered
from router_training.cli import app
from router_training.collect import Prompt, check, collect, read_questions, table_of
from router_training.data import load
from router_training.errors import AskError, AskFailed, AskRefused, DataError, TrainingError
from router_training.scoring import Choice, Exact, Example, Numeric
from router_training.writing import write_table
from tests.api.conftest import Serving
from tests.replayed import TOPICS, WAITS, Recorded, registry
from tests.router_training.helpers import write_csv, write_jsonl
from tests.tiny import ROOT

EXPERTS = tuple(TOPICS)


class Counted:
    """Requests for answers that reached the API, by (expert, question)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.asked: Counter[tuple[str, str]] = Counter()
        self.order: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("path") != "/v1/chat/completions":
            await self._app(scope, receive, send)
            return

        async def read() -> Any:
            message = await receive()
            if message["type"] == "http.request" and message.get("body"):
                body = json.loads(message["body"])
                self.asked[body["model"], body["messages"][-1]["content"]] += 1
                self.order.append(body["model"])
                assert body["composer"] == {"priority": "batch"}
            return message

        await self._app(scope, read, send)


def config(recorded: Recorded, **replay: Any) -> str:
    text: dict[str, Any] = yaml.safe_load(registry(recorded.path))
    for server in text["servers"].values():
        server.update(replay)
    text["experts"]["algebra"]["cost"] = {"input_per_1m": 1.0, "output_per_1m": 2.0}
    return yaml.safe_dump(text)


@pytest.fixture
def pace() -> dict[str, Any]:
    return {"time_scale": 0}


@pytest.fixture
def served(
    tmp_path: Path, recorded: Recorded, pace: dict[str, Any]
) -> Iterator[tuple[str, Counted]]:
    """The API's address over the four models, and what was asked there."""
    (tmp_path / "experts.yaml").write_text(config(recorded, **pace))
    service = make_service(
        Settings(
            experts=tmp_path / "experts.yaml",
            database_url=f"sqlite+aiosqlite:///{tmp_path}/composer.db",
            journal=tmp_path / "journal",
            files_dir=tmp_path / "files",
            cache_dir=ROOT / ".cache" / "composer",
            **WAITS,
        )
    )
    counted = Counted(create_app(service))
    with Serving(counted) as url:
        yield url, counted


@pytest.fixture
def questions(tmp_path: Path, recorded: Recorded) -> Path:
    rows = zip(recorded.query, recorded.gold, strict=True)
    return write_jsonl(
        tmp_path / "questions.jsonl",
        *({"query": q, "gold": g, "category": "c", "benchmark": "b", "page": 7} for q, g in rows),
    )


def run(*args: str | Path) -> tuple[int, str, str]:
    result = CliRunner(env={"COLUMNS": "250"}).invoke(app, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_a_table_that_training_reads(
    served: tuple[str, Counted], questions: Path, recorded: Recorded, tmp_path: Path
) -> None:
    url, counted = served
    out = tmp_path / "made" / "outcomes.csv.gz"
    common = ("collect", "--data", questions, "--out", out, "--url", url)
    status, said, err = run(*common, "--scorer", "choice")
    assert status == 0, err
    assert "60 questions, 4 experts" in said
    assert set(counted.asked.values()) == {1}
    assert len(counted.asked) == 240
    # One expert after the other.
    assert [e for i, e in enumerate(counted.order) if i == 0 or counted.order[i - 1] != e] == [
        *EXPERTS
    ]

    data = load(out)
    assert data.outcomes.experts == EXPERTS
    assert data.outcomes.text == tuple(recorded.query)
    assert set(data.outcomes.category) == {"c"}
    assert data.answers is not None
    assert data.answers.gold == tuple(recorded.gold)
    for column, expert in enumerate(EXPERTS):
        given = recorded.answer[expert]
        right = [float(a == g) for a, g in zip(given, recorded.gold, strict=True)]
        assert data.outcomes.quality[:, column].tolist() == right
        assert data.answers.given[:, column].tolist() == [a or None for a in given]
    assert "columns left alone: page" in data.notes

    # Another scorer asks nobody, nor does the same again.
    before = out.read_bytes()
    status, _, err = run(*common, "--scorer", "exact")
    assert status == 0, err
    assert out.read_bytes() == before  # letters are texts, too
    assert sum(counted.asked.values()) == 240


def test_costs_where_they_are_known(
    served: tuple[str, Counted], tmp_path: Path, recorded: Recorded
) -> None:
    """The replayed table has no lengths, so the service knows no cost, and none is invented."""
    data = write_csv(tmp_path / "q.csv", "query,gold", f'"{recorded.query[0]}",A')
    out = tmp_path / "out.jsonl"
    status, said, err = run(
        *("collect", "--data", data, "--out", out, "--url", served[0], "--scorer", "choice"),
        *("--experts", "cells,algebra", "--json", "-"),
    )
    assert status == 0, err
    assert [row["expert"] for row in json.loads(said)["experts"]] == ["cells", "algebra"]
    [row] = map(json.loads, out.read_text().splitlines())
    assert row["in_chars"] == len(recorded.query[0])
    assert not any(name.startswith("cost|") for name in row)


@pytest.mark.parametrize("pace", [{"time_scale": 0.1, "tokens_per_s": 1e6}])
def test_killed_it_goes_on(served: tuple[str, Counted], questions: Path, tmp_path: Path) -> None:
    """A kill loses no answer, and asks again only what was on its way."""
    url, counted = served
    out = tmp_path / "outcomes.csv"
    args = ["collect", "--data", questions, "--out", out, "--url", url, "--scorer", "choice"]
    args += ["--concurrency", "4", "--experts", "algebra,cells"]
    journal = out.with_name("outcomes.csv.answers.jsonl")
    child = subprocess.Popen(
        [sys.executable, "-m", "router_training", *map(str, args)],
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    until = time.monotonic() + 60
    while not journal.exists() or journal.read_bytes().count(b"\n") < 20:
        assert child.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < until
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not out.exists()
    kept = journal.read_bytes().count(b"\n")
    with journal.open("ab") as file:
        file.write(b'{"key": "cut o')  # as a kill in the middle of a write leaves it

    status, _, err = run(*args)
    assert status == 0, err
    assert len(counted.asked) == 120
    again = sum(counted.asked.values()) - 120
    assert again <= 4, "what was on its way when it was killed"
    assert len(journal.read_bytes().splitlines()) == 120 >= kept
    assert load(out).outcomes.known.all()


def test_what_is_wrong_is_said_before_anybody_is_asked(
    served: tuple[str, Counted], questions: Path, tmp_path: Path
) -> None:
    url, counted = served
    folder = tmp_path / "out"
    for more, words in (
        (("--experts", "algebra,poems"), "has no expert poems; it has: algebra, cells"),
        (("--url", "http://127.0.0.1:9"), "no service answers at http://127.0.0.1:9"),
        (("--template", "no place"), "has no {query}"),
        (("--scorer", "judge"), "add --judge EXPERT"),
        (("--scorer", "judge", "--judge", "poems"), "has no expert poems"),
        (("--scorer", "numeric"), "questions.jsonl:1: gold: 'A' is no number"),
        (("--scorer", "code"), "add --allow-code"),
        (("--scorer", "code", "--allow-code"), "tests: there is no such column"),
        (("--allow-code",), "takes no --allow-code"),
        (("--pattern", "x"), "takes no --pattern"),
        (("--out", "outcomes.xlsx"), "the file's ending says no format"),
        (("--split", "test"), "no row is of the split 'test'"),
        (("--data", "nowhere.csv"), "there is no such file"),
    ):
        args = ("--data", questions, "--out", folder / "o.csv", "--url", url, "--scorer", "choice")
        status, _, err = run("collect", *args, *more)
        assert status == 2
        assert words in err
        assert not counted.asked
        assert not folder.exists() or not list(folder.iterdir())


def test_a_judge_is_asked_after_all_answers_and_its_refusals_are_no_scores(
    served: tuple[str, Counted], questions: Path, tmp_path: Path
) -> None:
    """Replayed models refuse what nobody had asked them, so they judge nothing."""
    url, counted = served
    args = ("collect", "--data", questions, "--out", tmp_path / "o.csv", "--url", url)
    args += ("--experts", "algebra", "--scorer", "judge", "--judge", "cells")
    status, _, err = run(*args)
    assert status == 2
    assert "not one of 60 answers could be scored: expert 'cells' refuses (status 400)" in err
    assert not (tmp_path / "o.csv").exists()
    assert counted.order == ["algebra"] * 60 + ["cells"] * 60


def test_a_key_is_read_from_the_environment(
    tmp_path: Path, recorded: Recorded, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "experts.yaml").write_text(config(recorded))
    service = make_service(
        Settings(
            experts=tmp_path / "experts.yaml",
            database_url=f"sqlite+aiosqlite:///{tmp_path}/composer.db",
            journal=tmp_path / "journal",
            files_dir=tmp_path / "files",
            cache_dir=ROOT / ".cache" / "composer",
            api_key="open sesame",
            **WAITS,
        )
    )
    with Serving(create_app(service)) as url:
        args = ("collect", "--data", questions, "--out", tmp_path / "o.csv", "--url", url)
        args += ("--scorer", "choice", "--experts", "cells", "--api-key-env", "THEIR_KEY")
        status, _, err = run(*args)
        assert status == 2
        assert "wants another key" in err
        monkeypatch.setenv("THEIR_KEY", "open sesame")
        status, _, err = run(*args)
        assert status == 0, err


# --- without a service -------------------------------------------------------------------


class Fake:
    """Experts that answer from a table of (expert, question), or raise what stands there."""

    def __init__(self, answers: dict[tuple[str, str], Any]) -> None:
        self.answers = answers
        self.asked: list[tuple[str, str]] = []

    async def __call__(self, expert: str, messages: Sequence[Message]) -> Said:
        key = (expert, str(messages[-1]["content"]))
        self.asked.append(key)
        await asyncio.sleep(0)
        answer = self.answers[key]
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, Said) else Said(answer)


def two(tmp_path: Path, n: int = 2) -> Path:
    return write_csv(tmp_path / "q.csv", "query,reference", *(f"q{i},{i}" for i in range(n)))


async def test_what_failed_is_missing_and_never_wrong(tmp_path: Path) -> None:
    questions = read_questions(two(tmp_path))
    ask = Fake(
        {
            ("a", "q0"): Said("it is 0", "stop", 10, 5, 0.25),
            ("a", "q1"): AskRefused("too long"),
            ("b", "q0"): AskFailed("away"),
            ("b", "q1"): Said("2", "length"),
        }
    )
    found = await collect(questions, ["a", "b"], ask, Numeric(), Prompt("be brief"))
    assert found.scores == {"a": [1.0, None], "b": [None, 0.0]}
    assert found.unasked == 1
    assert found.notes == [
        "a: 1 calls are refused, the first: too long",
        "b: 1 calls failed; the first: away",
        "b: 1 answers are cut off at their greatest length",
    ]
    for name in ("out.csv", "out.jsonl", "out.parquet"):
        out = tmp_path / name
        write_table(out, table_of(questions, found, Prompt("be brief")))
        data = load(out)
        assert data.outcomes.known.tolist() == [[True, False], [False, True]]
        assert data.outcomes.cost[0, 0] == 0.25
        assert not [note for note in data.notes if "left alone" in note]
        assert data.answers is not None
        assert data.answers.given.tolist() == [["it is 0", None], [None, "2"]]
        assert data.answers.gold == ("0", "1")


async def test_an_expert_that_only_fails_is_left_for_another_run(tmp_path: Path) -> None:
    questions = read_questions(two(tmp_path, 50))
    answers: dict[tuple[str, str], Any] = {("a", f"q{i}"): AskFailed("down") for i in range(50)}
    answers |= {("b", f"q{i}"): str(i) for i in range(50)}
    ask = Fake(answers)
    found = await collect(questions, ["a", "b"], ask, Exact(), Prompt(), concurrency=1)
    assert sum(expert == "a" for expert, _ in ask.asked) == 3
    assert found.unasked == 50
    assert found.notes[0].startswith("a: 3 calls failed, and 47 more were not tried")
    assert found.scores["b"] == [1.0] * 50


async def test_a_lost_service_ends_the_run_with_its_own_words(tmp_path: Path) -> None:
    questions = read_questions(two(tmp_path, 50))
    ask = Fake({("a", f"q{i}"): AskError("nobody there; start it") for i in range(50)})
    with pytest.raises(AskError, match="nobody there; start it"):
        await collect(questions, ["a"], ask, Exact(), Prompt())
    nothing = Fake({("a", f"q{i}"): AskRefused("no") for i in range(50)})
    with pytest.raises(TrainingError, match="not one answer; a: 50 calls are refused"):
        await collect(questions, ["a"], nothing, Exact(), Prompt())


async def test_remembered_calls_are_made_once(tmp_path: Path) -> None:
    ask = Fake({("a", "q"): "yes", ("b", "q"): AskRefused("too long"), ("c", "q"): AskFailed("no")})
    hello: Any = [{"role": "user", "content": "q"}]
    for _ in range(2):
        with Journal(tmp_path / "deep" / "j.jsonl") as journal:
            remembered = Remembered(ask, journal, How())
            both = await asyncio.gather(remembered("a", hello), remembered("a", hello))
            assert [said.text for said in both] == ["yes", "yes"]
            with pytest.raises(AskRefused, match="too long"):
                await remembered("b", hello)
            with pytest.raises(AskFailed):
                await remembered("c", hello)
            with pytest.raises(TrainingError, match="written by another run"):
                Journal(tmp_path / "deep" / "j.jsonl")
    assert Counter(expert for expert, _ in ask.asked) == {"a": 1, "b": 1, "c": 2}
    with Journal(tmp_path / "deep" / "j.jsonl") as journal:  # asked otherwise, it is another call
        await Remembered(ask, journal, How(temperature=1.0))("a", hello)
    assert Counter(expert for expert, _ in ask.asked)["a"] == 2


async def test_answers_of_two_sources_are_not_mixed(tmp_path: Path) -> None:
    hello: Any = [{"role": "user", "content": "q"}]
    path = tmp_path / "j.jsonl"

    async def told(source: str, expert: str) -> str:
        with Journal(path) as journal:
            ask = Remembered(Fake({(expert, "q"): source}), journal, How(), lambda _: source)
            ask.check([expert])
            return (await ask(expert, hello)).text

    assert await told("http://one", "a") == "http://one"
    kept = path.read_bytes()
    with pytest.raises(TrainingError, match="1 answers of 'a' from http://one, and those asked"):
        await told("http://two", "a")
    assert path.read_bytes() == kept
    assert await told("http://one", "a") == "http://one"
    assert await told("http://two", "b") == "http://two"  # another expert may be elsewhere
    path.write_text(json.dumps({"key": "k", "expert": "a", "said": {"text": "x"}}) + "\n")
    with pytest.raises(TrainingError, match="from an unknown source"):
        await told("http://one", "a")


def test_what_is_no_journal(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    for line in ('{"key": 1}\n', "[]\n", "hello\n", '{"key": "k", "said": {"words": 1}}\n'):
        path.write_text(line)
        with pytest.raises(TrainingError, match="line 1, is no answer that a run has kept"):
            Journal(path)
        assert path.read_text() == line


def test_questions(tmp_path: Path) -> None:
    path = write_csv(
        tmp_path / "q.csv",
        "query,choices,gold,tests,score|old",
        'Where?,"[""here"", ""there""]",there,x = 1,0.5',
    )
    questions = read_questions(path)
    [example] = questions.examples
    assert example.text == "Where?\nA. here\nB. there"
    assert (example.choices, example.gold, example.tests) == (("here", "there"), "there", "x = 1")
    check(questions, Choice(), ["new"])
    with pytest.raises(DataError, match=r"score\|old: it was collected already"):
        check(questions, Choice(), ["old"])

    lacking = read_questions(write_csv(tmp_path / "l.csv", "query,gold", "a,1", "b,", "c,x"))
    with pytest.raises(DataError) as raised:
        check(lacking, Numeric(), ["new"])
    assert [p.line for p in raised.value.problems] == [3, 4]
    with pytest.raises(DataError, match=r"gold: there is no such column \(or reference\)"):
        check(read_questions(write_csv(tmp_path / "n.csv", "query", "a")), Exact(), ["new"])
    with pytest.raises(DataError, match="both gold and reference"):
        read_questions(write_csv(tmp_path / "b.csv", "query,gold,reference", "a,1,1"))


def test_outcomes_of_a_new_expert_join_those_there(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "q.csv", "query,gold,score|old", "a,1,0.5", "b,2,")
    questions = read_questions(path)
    ask = Fake({("new", "a"): "1", ("new", "b"): "1"})
    found = asyncio.run(collect(questions, ["new"], ask, Exact(), Prompt()))
    write_table(tmp_path / "out.csv", table_of(questions, found, Prompt()))
    data = load(tmp_path / "out.csv")
    assert data.outcomes.experts == ("old", "new")
    assert data.outcomes.of(["new"]).quality.tolist() == [[1.0], [0.0]]


def test_tables_are_written_as_they_are_read(tmp_path: Path) -> None:
    columns = {
        "query": ['say "hi",\nplease', "2020-01-01"],
        "choices": [["a", "b"], None],
        "score|it's": [0.5, None],
        "in_chars": [3, 4],
        "answer|it's": ["a\rb", "x" * 200_000],
    }
    for name in ("t.csv", "t.csv.gz", "t.jsonl", "t.jsonl.gz", "t.parquet"):
        path = tmp_path / name
        write_table(path, columns)
        data = load(path)
        assert data.outcomes.text == ('say "hi",\nplease\nA. a\nB. b', "2020-01-01"), name
        assert data.outcomes.experts == ("it's",)
        assert data.outcomes.quality[0, 0] == 0.5
        assert data.answers is not None
        assert data.answers.given[:, 0].tolist() == columns["answer|it's"]
    with (tmp_path / "t.csv").open(newline="") as file:
        assert next(csv.reader(file)) == [*columns]
    with pytest.raises(DataError, match="ending says no format"):
        write_table(tmp_path / "t.txt", columns)


def test_select_asks_the_service_for_as_few_answers_as_it_takes(
    served: tuple[str, Counted], questions: Path, recorded: Recorded
) -> None:
    """With the same scorers, in the service's own order of experts, and the best is kept."""
    url, counted = served
    status, said, err = run(
        *("select", "--data", questions, "--keep", "1", "--examples", "40", "--url", url),
        *("--scorer", "choice", "--json", "-"),
    )
    assert status == 0, err
    found = json.loads(said)
    right = {
        e: np.mean([a == g for a, g in zip(recorded.answer[e], recorded.gold, strict=True)])
        for e in EXPERTS
    }
    assert right[found["kept"][0]] >= max(right.values()) - 0.1
    assert found["evaluations"] == len(counted.asked) <= found["exhaustive"] == 160
    assert set(counted.asked.values()) == {1}
    status, _, err = run("select", "--data", questions, "--url", url, "--scorer", "judge")
    assert status == 2
    assert "router-training collect" in err


def serving(monkeypatch: pytest.MonkeyPatch, ask: Fake) -> None:
    """Asks this in place of a service, which says that it has the experts of its answers."""
    experts = tuple(dict.fromkeys(expert for expert, _ in ask.answers))

    class Service:
        how = How()
        source = staticmethod(lambda expert: "here")

        def __init__(self, url: str, **given: Any) -> None: ...

        async def __aenter__(self) -> Service:
            return self

        async def __aexit__(self, *error: object) -> None: ...

        async def check(self, wanted: Sequence[str]) -> tuple[str, ...]:
            return experts

        async def __call__(self, expert: str, messages: Sequence[Message]) -> Said:
            return await ask(expert, messages)

    monkeypatch.setattr("router_training.asking.Endpoint", Service)


def selecting(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ask: Fake, *more: str | Path
) -> tuple[int, str, str]:
    """`select` of twelve questions."""
    serving(monkeypatch, ask)
    data = two(tmp_path, 12)
    return run("select", "--data", data, "--keep", "1", "--scorer", "exact", "--json", "-", *more)


def test_select_goes_on_where_one_expert_is_silent_and_after_a_stop(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answers: dict[tuple[str, str], Any] = {("a", f"q{i}"): str(i) for i in range(12)}
    answers |= {("b", f"q{i}"): "no" for i in range(12)}
    answers |= {("mute", f"q{i}"): AskRefused("no room") for i in range(12)}
    lost = AskError("nobody there; start it")
    stopped = Fake(answers | {("b", f"q{i}"): lost for i in range(12)})
    status, _, err = selecting(monkeypatch, tmp_path, stopped)
    assert status == 2
    assert "nobody there; start it" in err
    before = [key for key in stopped.asked if key[0] == "a"]
    assert len(before) == 4
    again = Fake(answers)
    status, out, err = selecting(monkeypatch, tmp_path, again)
    assert status == 0, err
    assert not set(before) & set(again.asked)
    assert json.loads(out)["kept"] == ["a"]
    assert "no score of mute on" in err
    assert "the first: no room" in err
    assert (tmp_path / "q.csv.answers.jsonl").exists()
    elsewhere = tmp_path / "elsewhere.jsonl"
    nobody = Fake({key: AskRefused("no room") for key in answers})
    status, _, err = selecting(monkeypatch, tmp_path, nobody, "--answers", elsewhere)
    assert status == 2
    assert "there is not one answer; a: 4 calls are refused" in err
    assert len(nobody.asked) == 12  # one round of the three


@pytest.mark.parametrize("where", ["--json", "--out"])
def test_calls_that_failed_are_told_by_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str
) -> None:
    """What was gained is kept, and the same command asks for the rest alone."""
    answers: dict[tuple[str, str], Any] = {("a", f"q{i}"): str(i) for i in range(3)}
    data, out = two(tmp_path, 3), tmp_path / "o.csv"
    args = ("collect", "--data", data, "--out", out, "--scorer", "exact")
    args += ("--json", "-") if where == "--json" else ()
    serving(monkeypatch, Fake(answers | {("a", "q1"): AskFailed("away")}))
    status, said, err = run(*args)
    assert status == 1
    assert "1 calls failed or were not tried, and their outcomes are missing in" in err
    assert "the same command makes these calls again, and no other" in err
    assert load(out).outcomes.known[:, 0].tolist() == [True, False, True]
    if where == "--json":
        assert json.loads(said)["failed"] == 1
    again = Fake(answers)
    serving(monkeypatch, again)
    status, _, err = run(*args)
    assert (status, again.asked) == (0, [("a", "q1")]), err


async def test_a_judge_that_only_fails_is_left_for_another_run(tmp_path: Path) -> None:
    questions = read_questions(two(tmp_path, 50))
    ask = Fake({("a", f"q{i}"): str(i) for i in range(50)})
    tried = 0

    class Down(Exact):
        async def __call__(self, answer: str, example: Example) -> float | None:
            nonlocal tried
            tried += 1
            if tried <= 2:
                return 1.0
            raise AskFailed("the judge is down")

    found = await collect(questions, ["a"], ask, Down(), Prompt(), concurrency=1)
    assert tried == 5
    assert found.unasked == 48
    assert found.scores["a"] == [1.0, 1.0] + [None] * 48
    assert found.notes == [
        "3 answers could not be scored, and 45 more were not tried; first: the judge is down"
    ]
