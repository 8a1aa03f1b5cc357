"""Recorded answers as an engine: what is found, what is refused, how long it takes, how it ends."""

from __future__ import annotations

import asyncio
import csv
import gzip
import io
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from composer.engines import outcomes
from composer.engines.outcomes import read_table
from composer.engines.replay import ReplayEngine, ReplaySettings
from composer.errors import EngineError, EngineUnavailable, Unsupported
from composer.types import Adapter, Call, Chunk, Placement, Sampling, Usage

SHARED = Path(__file__).parents[3] / "shared" / "data"

QUESTION = "What is 2 + 2?\nA. 3\nB. 4"
HEADER = ["query_id", "query", "in_chars", "answer|small", "answer|large"]
HEADER += ["out_chars|small", "out_chars|large"]
ROWS: list[list[str]] = [
    ["q1", QUESTION, "22", "A", "B", "40", "801"],
    ["q2", "Say it in words.", "16", "one two  three", "", "", "0"],
    ["q3", "What is 2 + 2?  A. 3 B. 4", "99", "wrong", "wrong", "1", "1"],  # q1 again
]


def table(
    folder: Path,
    rows: Sequence[Sequence[str]] = ROWS,
    header: Sequence[str] = HEADER,
    name: str = "table.csv",
) -> Path:
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    data = text.getvalue().encode()
    path = folder / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def settings(*paths: Path, **changes: Any) -> ReplaySettings:
    return ReplaySettings.model_validate(
        {"table": list(paths), "model": "large", "time_scale": 0, **changes}
    )


def call(text: str = QUESTION, **changes: Any) -> Call:
    return Call(
        **{
            "id": "c1",
            "expert": "e",
            "server": "s",
            "adapter": None,
            "messages": ({"role": "user", "content": text},),
            "prompt": None,
            "sampling": Sampling(),
            "context_window": 4096,
            **changes,
        }
    )


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[ReplayEngine]:
    made = ReplayEngine("s", settings(table(tmp_path)))
    await made.start()
    yield made
    await made.close()


async def answer(engine: ReplayEngine, call: Call) -> list[Chunk]:
    return [chunk async for chunk in engine.run(call)]


def said(chunks: Sequence[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


# --- what is answered ----------------------------------------------------------------


@pytest.mark.parametrize(
    "asked",
    [
        call(),
        call(f"  {QUESTION}\n"),
        call("What is 2 + 2? A. 3 B. 4"),
        call(messages=(), prompt=QUESTION),
        call(
            messages=(
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": "something else"},
                {"role": "assistant", "content": "yes?"},
                {"role": "user", "content": [{"type": "text", "text": QUESTION}]},
            )
        ),
    ],
)
async def test_the_recorded_answer_however_it_is_spaced(engine: ReplayEngine, asked: Call) -> None:
    chunks = await answer(engine, asked)
    assert said(chunks) == "B"
    assert [chunk.finish_reason for chunk in chunks] == [None, "stop"]
    assert chunks[-1].usage == Usage(6, 201)  # 22 and 801 characters, four to a token, rounded up
    assert await engine.count_tokens(asked.messages, asked.prompt) == 6


async def test_words_come_one_by_one_and_unrecorded_lengths_stay_unknown(tmp_path: Path) -> None:
    engine = ReplayEngine("s", settings(table(tmp_path), model="small"))
    await engine.start()
    chunks = await answer(engine, call("Say it in words."))
    assert [chunk.text for chunk in chunks] == ["one ", "two  ", "three", ""]
    assert chunks[-1].finish_reason == "stop"
    assert chunks[-1].usage is None


async def test_an_answer_that_could_not_be_read_is_empty(engine: ReplayEngine) -> None:
    (chunk,) = await answer(engine, call("Say it in words."))
    assert (chunk.text, chunk.finish_reason, chunk.usage) == ("", "stop", Usage(4, 0))


async def test_what_was_drawn_is_not_drawn_again(engine: ReplayEngine) -> None:
    sampling = Sampling(max_tokens=1, temperature=2.0, top_p=0.1, seed=7, stop=("B",))
    neutral = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}}
    assert said(await answer(engine, call(sampling=sampling, extra=neutral))) == "B"


async def test_the_first_of_several_tables_and_of_equal_rows_counts(tmp_path: Path) -> None:
    other = [["x", "Say it in words.", "1", "s", "second", "1", "1"], ["y", "New?", *"1ab11"]]
    paths = table(tmp_path), table(tmp_path, other, name="more.csv.gz")
    engine = ReplayEngine("s", settings(*paths, model="small"))
    await engine.start()
    assert said(await answer(engine, call("Say it in words."))) == "one two  three"
    assert said(await answer(engine, call("New?"))) == "a"
    assert said(await answer(engine, call())) == "A"


# --- what is refused -----------------------------------------------------------------


@pytest.mark.parametrize("question", ["What is 2 + 2?", QUESTION.lower(), ""])
async def test_an_unknown_question_is_never_answered(engine: ReplayEngine, question: str) -> None:
    with pytest.raises(Unsupported, match=r"none to this question; ask") as refused:
        await answer(engine, call(question))
    assert refused.value.param == "messages"
    with pytest.raises(Unsupported) as refused:
        await answer(engine, call(messages=(), prompt=question))
    assert refused.value.param == "prompt"
    with pytest.raises(Unsupported):
        await engine.count_tokens((), question)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"sampling": Sampling(n=2)}, "n"),
        ({"sampling": Sampling(logprobs=0)}, "logprobs"),
        ({"extra": {"tools": [{"type": "function"}]}}, "tools"),
        ({"extra": {"response_format": {"type": "json_object"}}}, "response_format"),
        ({"extra": {"top_k": 3}}, "top_k"),
        (
            {"messages": ({"role": "user", "content": [{"type": "image_url"}]},)},
            "messages.0.content",
        ),
    ],
)
async def test_what_a_recording_cannot_honour(
    engine: ReplayEngine, changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(Unsupported) as refused:
        await answer(engine, call(**changes))
    assert refused.value.param == field


async def test_adapters_are_refused(engine: ReplayEngine, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="remove `adapter`"):
        await engine.prepare([Adapter(tmp_path, "sha256:0", 8, 16, ("q_proj",))])
    await engine.prepare([])


# --- time ----------------------------------------------------------------------------


async def test_an_answer_takes_its_recorded_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that moves by what is waited for."""
    now = [100.0]

    async def wait(seconds: float, ended: asyncio.Event) -> None:
        now[0] += max(seconds, 0)

    monkeypatch.setattr("composer.engines.replay._wait", wait)
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "time", lambda: now[0])
    paced = {"tokens_per_s": 10, "first_token_s": 3, "time_scale": 0.5, "assumed_tokens": 90}

    async def times(question: str, model: str) -> list[float]:
        engine = ReplayEngine("s", settings(table(tmp_path), model=model, **paced))
        await engine.start()
        began = now[0]
        return [now[0] - began async for _ in engine.run(call(question))]

    whole = (3 + 801 / 4 / 10) * 0.5
    assert await times(QUESTION, "large") == pytest.approx([whole, whole])
    begin, rest = 1.5, 90 / 10 * 0.5  # no length was recorded
    thirds = [begin + rest / 3, begin + rest * 2 / 3, begin + rest, begin + rest]
    assert await times("Say it in words.", "small") == pytest.approx(thirds)
    assert await times("Say it in words.", "large") == pytest.approx([1.5])


@pytest.mark.parametrize(
    ("own", "seconds"),
    [({}, [12.0, 4.0]), ({"start_s": 8, "stop_s": 0}, [8.0, 0.0])],
)
async def test_a_load_takes_what_the_settings_or_the_placement_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: dict[str, Any], seconds: list[float]
) -> None:
    waited: list[float] = []

    async def wait(seconds: float, ended: asyncio.Event) -> None:
        waited.append(seconds)

    monkeypatch.setattr("composer.engines.replay._wait", wait)
    placement = Placement("gpu", 8.0, start_s=12, stop_s=4)
    chosen = settings(table(tmp_path), time_scale=0.5, **own)
    engine = ReplayEngine("s", chosen, placement=placement)
    await engine.start()
    await engine.start()  # there already
    await engine.stop()
    await engine.stop()
    assert waited == seconds


def slow(folder: Path, **changes: Any) -> ReplayEngine:
    """An hour for a load, or for an answer."""
    placement = Placement("gpu", 8.0, start_s=0, stop_s=0)
    pace = {"time_scale": 1, "first_token_s": 3600, **changes}
    return ReplayEngine("s", settings(table(folder), **pace), placement=placement)


async def test_leaving_an_answer_ends_it_at_once(tmp_path: Path) -> None:
    engine = slow(tmp_path)
    await engine.start()
    running = asyncio.create_task(answer(engine, call()))
    await asyncio.sleep(0.01)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize("end", ["stop", "close"])
async def test_stopping_ends_what_runs(tmp_path: Path, end: str) -> None:
    engine = slow(tmp_path)
    await engine.start()
    running = [asyncio.create_task(answer(engine, call())) for _ in range(3)]
    await asyncio.sleep(0.01)
    assert not any(one.done() for one in running)
    await getattr(engine, end)()
    for one in running:
        with pytest.raises(EngineUnavailable, match=r"not running|closed"):
            await one


async def test_a_server_runs_only_between_start_and_stop(tmp_path: Path) -> None:
    placement = Placement("gpu", 8.0, start_s=0, stop_s=0)
    engine = ReplayEngine("s", settings(table(tmp_path)), placement=placement)
    with pytest.raises(EngineUnavailable, match="'s' is not running"):
        await answer(engine, call())
    for _ in range(2):
        await asyncio.gather(engine.start(), engine.start())
        assert said(await answer(engine, call())) == "B"
        await engine.stop()
        assert (await engine.health()).ok  # it made room, nothing is wrong with it
        with pytest.raises(EngineUnavailable):
            await answer(engine, call())
    await engine.close()
    await engine.close()
    assert not (await engine.health()).ok
    for attempt in (engine.start(), engine.prepare([]), answer(engine, call())):
        with pytest.raises(EngineUnavailable, match="closed"):
            await attempt


async def test_closing_ends_a_load(tmp_path: Path) -> None:
    engine = slow(tmp_path, start_s=3600)
    loading = asyncio.create_task(engine.start())
    await asyncio.sleep(0.01)
    await engine.close()
    with pytest.raises(EngineUnavailable, match="closed"):
        await loading


async def test_a_cancelled_load_can_be_tried_again(tmp_path: Path) -> None:
    engine = slow(tmp_path, start_s=3600, first_token_s=0)
    loading = asyncio.create_task(engine.start())
    await asyncio.sleep(0.01)
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    with pytest.raises(EngineUnavailable):
        await answer(engine, call())
    again = asyncio.create_task(engine.start())
    await asyncio.sleep(0.01)
    assert not again.done()
    await engine.close()
    with pytest.raises(EngineUnavailable):
        await again


# --- tables and settings --------------------------------------------------------------


async def test_servers_share_one_table_and_let_it_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = table(tmp_path)
    read: list[Path] = []
    real = outcomes._read

    def counted(path: Path) -> outcomes.OutcomeTable:
        read.append(path)
        return real(path)

    monkeypatch.setattr(outcomes, "_read", counted)
    engines = [ReplayEngine(f"s{i}", settings(path)) for i in range(8)]
    await asyncio.gather(*(engine.start() for engine in engines))
    assert len(read) == 1
    table(tmp_path, ROWS[:1])  # another file by the same name
    assert len(read_table(path)) == 1
    assert len(read) == 2
    assert said(await answer(engines[0], call("Say it in words."))) == ""  # as it was at the start
    engines.clear()
    assert not any(key[0] == path for key in outcomes._tables)


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        (ROWS, ["a", *HEADER[2:], "b"], "no column `query`"),
        ([["q", "1"]], ["query", "score|large"], "no column `answer|MODEL`; only tables with"),
        ([], HEADER, "no questions"),
        ([ROWS[0], ROWS[1][:5]], HEADER, r"line 5: 5 cells under 7"),
        ([[*ROWS[0][:6], "-3"]], HEADER, r"line 4: '-3' is no length; write"),
        ([ROWS[0]], [*HEADER[:5], "answer|large", "x"], "each column its own name"),
    ],
)
async def test_a_wrong_table_is_told_before_the_first_load(
    tmp_path: Path, rows: list[list[str]], header: list[str], message: str
) -> None:
    engine = ReplayEngine("s", settings(table(tmp_path, rows, header)))
    with pytest.raises(EngineUnavailable, match="server 's'.*" + message.replace("|", r"\|")):
        await engine.prepare([])


@pytest.mark.parametrize("content", [b"\x1f\x8bnot really", b"query,answer|large\n\xff,B\n"])
async def test_a_file_that_cannot_be_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.csv").write_bytes(content)
    with pytest.raises(EngineUnavailable, match=r"cannot be read.*should be CSV in UTF-8"):
        await ReplayEngine("s", settings(tmp_path / "bad.csv")).start()


async def test_a_truncated_gzip_file(tmp_path: Path) -> None:
    path = table(tmp_path, name="cut.csv.gz")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(EngineUnavailable, match="cannot be read"):
        await ReplayEngine("s", settings(path)).start()


async def test_a_missing_file_and_a_missing_model(tmp_path: Path) -> None:
    with pytest.raises(EngineUnavailable, match=r"nowhere.csv does not exist; correct `table`"):
        await ReplayEngine("s", settings(tmp_path / "nowhere.csv")).start()
    unknown = ReplayEngine("s", settings(table(tmp_path), model="huge"))
    with pytest.raises(EngineUnavailable, match=r"no answers of 'huge'; set .* small, large"):
        await unknown.prepare([])


def test_settings_that_do_not_fit_a_placement(tmp_path: Path) -> None:
    one = settings(tmp_path / "t.csv")
    ReplayEngine.check(one, None)
    ReplayEngine.check(one.model_copy(update={"start_s": 1.0}), Placement("gpu", 8.0))
    with pytest.raises(ValueError, match="remove `stop_s`"):
        ReplayEngine.check(one.model_copy(update={"stop_s": 1.0}), None)
    with pytest.raises(ValueError, match="remove `sleep_level`"):
        ReplayEngine.check(one, Placement("gpu", 8.0, sleep_level=1))


def test_one_table_needs_no_list() -> None:
    one = ReplaySettings.model_validate({"table": "a.csv", "model": "m"})
    assert one.table == (Path("a.csv"),)


# --- the shared tables ----------------------------------------------------------------


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not there: the shared outcome tables")
@pytest.mark.parametrize(("name", "models"), [("mmlu_pro", 28), ("zeroeval", 29)])
async def test_every_recorded_answer_of_the_shared_tables(name: str, models: int) -> None:
    path = SHARED / f"{name}.dev.csv.gz"
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    shared = read_table(path)
    assert len(shared) == len(rows)
    assert len(shared.models) == models
    for model in shared.models:
        for row in rows:
            found = shared.find(row["query"], model)
            assert found is not None
            assert found.answer == row[f"answer|{model}"]
            assert (found.in_chars, found.out_chars) == (
                int(row["in_chars"]),
                int(row[f"out_chars|{model}"]),
            )


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not there: the shared outcome tables")
@pytest.mark.parametrize("name", ["mix10", "routellm"])
def test_a_shared_table_without_answers_is_not_replayed(name: str) -> None:
    with pytest.raises(ValueError, match="only tables with recorded answers"):
        read_table(SHARED / f"{name}.dev.csv.gz")
