"""The retrieval benchmark on files of one's own: its table, and what it refuses."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import retrieval
from benchmarks.common import bootstrap

TRAIN = {
    "weather": ["will it rain today", "is it sunny outside", "how cold is it", "snow tomorrow?"],
    "money": ["pay my bill", "how much is in my account", "transfer ten dollars", "my balance"],
    "food": ["book a table", "how do i cook rice", "a recipe for soup", "order a pizza"],
    "oos": ["who won the cup", "tell me about mars", "what is love"],
}
EVAL = {
    "weather": ["rain this evening?", "is it cold tomorrow"],
    "money": ["what is my balance", "pay ten dollars"],
    "food": ["soup recipe please"],
    "oos": ["who invented the wheel", "how old is the moon"],
}


def write(path: Path, table: dict[str, list[str]], **columns: str) -> Path:
    names = {"query": "query", "intent": "intent"} | columns
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(names.values())
        rows.writerows((text, intent) for intent, texts in table.items() for text in texts)
    return path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["retrieval.py", *map(str, arguments)])
    retrieval.main()


def test_one_table_with_both_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train, evaluate = write(tmp_path / "t.csv", TRAIN), write(tmp_path / "e.csv", EVAL)
    out = tmp_path / "out" / "table.json"
    run(monkeypatch, "--train", train, "--eval", evaluate, "--json", out, "--quick")
    rows = json.loads(out.read_text(encoding="utf-8"))
    routers = [row["router"] for row in rows]
    assert routers[0] == "ours: blend, discriminant (default)"
    assert {"kNN, nearest row", "nearest centroid", "logistic regression"} <= set(routers)
    for row in rows:
        assert not any(isinstance(value, dict | list) for value in row.values())
        assert (row["intents"], row["examples"], row["queries"]) == (3, 12, 7)  # no oos trained
        assert 0.6 <= row["top1_low"] <= row["top1"] <= row["top1_high"] <= 1 or row["top1"] < 1
        assert row["auroc"] > 0.5
    assert "logistic regression" in capsys.readouterr().out


def test_without_out_of_scope_rows_there_is_no_auroc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = {intent: texts for intent, texts in EVAL.items() if intent != "oos"}
    train, evaluate = write(tmp_path / "t.csv", TRAIN), write(tmp_path / "e.csv", inside)
    run(monkeypatch, "--train", train, "--eval", evaluate, "--json", tmp_path / "o", "--quick")
    assert {row["auroc"] for row in json.loads((tmp_path / "o").read_text())} == {None}


@pytest.mark.parametrize(
    ("train", "evaluate", "message"),
    [
        ({}, {}, "has no rows"),
        (TRAIN, {"sports": ["who won"]}, r"intents never trained: \['sports'\]"),
    ],
)
def test_tables_that_do_not_fit_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    train: dict[str, list[str]],
    evaluate: dict[str, list[str]],
    message: str,
) -> None:
    files = write(tmp_path / "t.csv", train), write(tmp_path / "e.csv", evaluate)
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, "--train", files[0], "--eval", files[1])


def test_files_that_are_no_tables_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = write(tmp_path / "t.csv", TRAIN)
    other = write(tmp_path / "e.csv", EVAL, intent="label")
    with pytest.raises(SystemExit, match=r"e\.csv has no column intent"):
        run(monkeypatch, "--train", good, "--eval", other)
    with pytest.raises(SystemExit, match=r"gone\.csv does not exist; name other files"):
        run(monkeypatch, "--train", good, "--eval", tmp_path / "gone.csv")
    with pytest.raises(SystemExit):
        run(monkeypatch, "--train", good)


def test_examples_are_capped_per_intent(monkeypatch: pytest.MonkeyPatch) -> None:
    class Blind:
        def encode(self, texts: list[str]) -> np.ndarray:
            return np.ones((len(texts), 2), np.float32)

    many = retrieval.Queries([f"text {i}" for i in range(300)], ["a", "b", "oos"] * 100)
    monkeypatch.setattr(retrieval, "MAX_EXAMPLES", 7)
    problem = retrieval.prepare("set", many, many, Blind())  # type: ignore[arg-type]
    assert [len(e.examples) for e in problem.experts] == [7, 7]
    assert len(problem.train) == len(problem.train_intent) == 14
    assert (problem.in_scope.sum(), len(problem.intent)) == (200, 300)


def test_bootstrap_intervals_hold_the_mean_and_widen_with_groups() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 10)
    values = (rng.random(40) < 0.7).astype(float)[groups]  # equal within a group
    plain, grouped = bootstrap(values), bootstrap(values, groups=groups)
    assert plain[0] < values.mean() < plain[1]
    assert grouped[1] - grouped[0] > 2 * (plain[1] - plain[0])
