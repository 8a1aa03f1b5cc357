"""Outcome tables in every form become the same arrays, and what is wrong is told with its place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest

from router_training.data import load, read
from router_training.errors import SHOWN, DataError
from tests.router_training.helpers import NAN, write_csv, write_jsonl

WIDE = (
    "query_id,benchmark,category,query,in_chars,score|a,score|b,out_chars|a,out_chars|b,gold,"
    "answer|a,answer|b",
    "q1,maths,sums,What is 1+1?,40,1,0.5,80,400,2,2,3",
    'q2,maths,sums,"Name it,\nplease.",20,,0,,8,x,,y',
)
PRICES = (
    "table,model,usd_per_1M_input,usd_per_1M_output",
    "t,a,1,2",
    "t,b,,",
    "other,b,3,3",
)


def test_counted_tokens_go_before_lengths(tmp_path: Path) -> None:
    write_csv(tmp_path / "models.csv", *PRICES)
    path = write_csv(
        tmp_path / "t.csv",
        "query,in_chars,score|a,out_chars|a,in_tokens|a,out_tokens|a",
        "x,40,1,80,12,500",
        "y,40,1,80,,500",
        "z,40,1,80,,",
    )
    expected = [[(12 + 2 * 500) / 1e6], [(10 + 2 * 500) / 1e6], [(10 + 2 * 20) / 1e6]]
    np.testing.assert_allclose(load(path).outcomes.cost, expected)
    long = write_csv(
        tmp_path / "t.long.csv", "query,expert,score,in_tokens,out_tokens", "x,a,1,12,500"
    )
    np.testing.assert_allclose(load(long).outcomes.cost, expected[:1])


def test_one_question_a_row(tmp_path: Path) -> None:
    write_csv(tmp_path / "models.csv", *PRICES)
    data = load(write_csv(tmp_path / "t.train.csv", *WIDE))
    found = data.outcomes
    assert found.experts == ("a", "b")
    assert found.text == ("What is 1+1?", "Name it,\nplease.")
    assert found.category == ("sums", "sums")
    assert found.benchmark == ("maths", "maths")
    np.testing.assert_array_equal(found.quality, np.array([[1, 0.5], [NAN, 0]], np.float32))
    # (1·40 + 2·80) / 4 / 1,000,000; b has no price in this table, whatever it has in another
    np.testing.assert_allclose(found.cost, [[5e-05, NAN], [NAN, NAN]], rtol=1e-6)
    assert data.ids == ("q1", "q2")
    assert data.answers is not None
    assert data.answers.gold == ("2", "x")
    assert data.answers.given.tolist() == [["2", "3"], [None, "y"]]
    assert data.answers.of(["b"]).rows(np.array([1])).given.tolist() == [["y"]]


def test_a_gzipped_file_is_the_same(tmp_path: Path) -> None:
    plain = read(write_csv(tmp_path / "t.csv", *WIDE))
    zipped = tmp_path / "t.csv.gz"
    zipped.write_bytes(gzip.compress((tmp_path / "t.csv").read_bytes()))
    again = read(zipped)
    assert (again.text, again.experts) == (plain.text, plain.experts)
    np.testing.assert_array_equal(again.quality, plain.quality)


LONG: tuple[dict[str, Any], ...] = (
    {"query": "one", "expert": "a", "score": 1, "cost": 0.5, "category": "c", "benchmark": "m"},
    {"query": "one", "expert": "b", "score": 0.25, "cost": 1.0},
    {"query": "two", "expert": "b", "score": True, "group": 7},
    {"query": "One!", "expert": "a", "score": None, "cost": 2.0},
    {"query": "three", "expert": "a", "score": 0, "group": 7, "answer": "no", "gold": "yes"},
)


def check_long(path: Path) -> None:
    data = load(path)
    found = data.outcomes
    assert found.experts == ("a", "b")
    assert found.text == ("one", "two", "One!", "three")
    np.testing.assert_array_equal(
        found.quality, np.array([[1, 0.25], [NAN, 1], [NAN, NAN], [0, NAN]], np.float32)
    )
    np.testing.assert_array_equal(
        found.cost, np.array([[0.5, 1], [NAN, NAN], [2, NAN], [NAN, NAN]], np.float32)
    )
    assert found.category == ("c", "", "", "")
    assert found.benchmark == ("m", "", "", "")
    assert found.group.tolist() == [0, 1, 0, 1]  # one text but for its signs; one label
    assert data.answers is not None
    assert data.answers.given.tolist() == [[None, None], [None, None], [None, None], ["no", None]]
    assert data.answers.gold == (None, None, None, "yes")
    assert any("1 questions have no known outcome" in note for note in data.notes)


def test_one_outcome_a_row(tmp_path: Path) -> None:
    check_long(write_jsonl(tmp_path / "t.jsonl", *LONG))


def to_parquet(jsonl: Path) -> Path:
    path = jsonl.with_suffix(".parquet")
    duckdb.execute(f"COPY (SELECT * FROM read_json('{jsonl}')) TO '{path}' (FORMAT parquet)")
    return path


def test_parquet_long_and_wide(tmp_path: Path) -> None:
    as_numbers = [
        {**row, "score": None if row["score"] is None else float(row["score"])} for row in LONG
    ]
    check_long(to_parquet(write_jsonl(tmp_path / "t.jsonl", *as_numbers)))
    wide = write_jsonl(
        tmp_path / "wide.jsonl",
        {"query": "x", "score|a": 1.0, "cost|a": 0.1, "score|b": None},
        {"query": "y", "score|a": 0.0, "cost|a": None, "score|b": 0.5},
    )
    for path in (wide, to_parquet(wide)):
        found = read(path)
        np.testing.assert_array_equal(found.quality, np.array([[1, NAN], [0, 0.5]], np.float32))
        np.testing.assert_array_equal(found.cost, np.array([[0.1, NAN], [NAN, NAN]], np.float32))


def test_nan_of_a_data_frame_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    duckdb.execute(
        "COPY (SELECT 'x' AS query, 1::DOUBLE AS \"score|a\" "
        "UNION ALL SELECT 'y', 'nan'::DOUBLE) "
        f"TO '{path}' (FORMAT parquet)"
    )
    np.testing.assert_array_equal(read(path).quality, np.array([[1], [NAN]], np.float32))


def test_several_outcomes_of_one_expert_are_averaged(tmp_path: Path) -> None:
    rows = [
        {"query": "x", "expert": "a", "score": s, "cost": c} for s, c in [(1, 2), (0, 4), (0, None)]
    ]
    data = load(write_jsonl(tmp_path / "t.jsonl", *rows))
    assert data.outcomes.quality[0, 0] == pytest.approx(1 / 3)
    assert data.outcomes.cost[0, 0] == 3
    assert any("means of several" in note for note in data.notes)


def test_questions_are_told_apart_by_id_where_there_is_one(tmp_path: Path) -> None:
    rows = [
        {"query_id": i, "query": "x", "expert": e, "score": 1}
        for i, e in [("1", "a"), ("2", "b"), ("1", "b")]
    ]
    found = read(write_jsonl(tmp_path / "t.jsonl", *rows))
    np.testing.assert_array_equal(found.quality, np.array([[1, 1], [NAN, 1]], np.float32))
    assert found.group.tolist() == [0, 0]


def test_choices_become_lettered_lines(tmp_path: Path) -> None:
    cell = json.dumps(["red", "blue, or so"]).replace('"', '""')
    path = write_csv(
        tmp_path / "t.csv", "query,choices,score|a", f'Which?,"{cell}",1', "No choice.,,0"
    )
    assert read(path).text == ("Which?\nA. red\nB. blue, or so", "No choice.")


def test_experts_split_and_explicit_prices(tmp_path: Path) -> None:
    path = write_csv(
        tmp_path / "t.csv",
        "split,query,in_chars,score|a,score|b,out_chars|a,out_chars|b",
        "train,x,4,1,0,4,4",
        "dev,y,4,0,1,4,4",
    )
    prices = write_csv(tmp_path / "prices.csv", "model,usd_per_1M_input,usd_per_1M_output", "b,1,3")
    found = read(path, experts=["b", "a"], split="dev", prices=prices)
    assert found.text == ("y",)
    np.testing.assert_array_equal(found.quality, [[1, 0]])
    np.testing.assert_allclose(found.cost, [[4e-6, NAN]], rtol=1e-6)
    with pytest.raises(DataError, match=r"no row is of the split 'test'\. There are: dev, train"):
        read(path, split="test")
    with pytest.raises(DataError, match=r"no outcomes of c\. There are those of: a, b"):
        read(path, experts=["c"])


def test_contaminated_questions_are_marked(tmp_path: Path) -> None:
    data = load(
        write_csv(tmp_path / "t.csv", "query,contaminated,score|a", "x,1,1", "y,0,1", "z,,0")
    )
    assert data.contaminated.tolist() == [True, False, False]
    assert len(data.rows(~data.contaminated)) == 2


def test_other_columns_are_left_alone_with_a_note(tmp_path: Path) -> None:
    data = load(write_csv(tmp_path / "t.csv", "query,origin,score|a,out_chars|zz", "x,web,1,9"))
    assert data.notes[0] == "columns left alone: origin, out_chars|zz"


def test_all_problems_at_once_with_their_places(tmp_path: Path) -> None:
    path = write_csv(
        tmp_path / "t.csv",
        "query,score|a,cost|a,contaminated,choices",
        "fine,1,0.1,0,",
        '"two\nlines",1.5,-1,2,"[1"',
        ",yes,inf,,",
        "x,nan,1_0,,7",
    )
    with pytest.raises(DataError) as caught:
        read(path)
    told = [(p.line, p.path, p.message) for p in caught.value.problems]
    assert [line for line, _, _ in told] == sorted(line for line, _, _ in told if line)
    assert set(told) == {
        (3, "score|a", "'1.5' is out of range"),
        (3, "cost|a", "'-1' is out of range"),
        (3, "contaminated", "2 is neither 0 nor 1"),
        (3, "choices", "not a JSON list of options"),
        (5, "score|a", "'yes' is not a number"),
        (5, "cost|a", "'inf' is out of range"),
        (5, "query", "there is nothing"),
        (6, "score|a", "'nan' is not a number"),
        (6, "cost|a", "'1_0' is not a number"),
        (6, "choices", "not a JSON list of options"),
    }
    assert str(caught.value).startswith(f"{path}:3: score|a: '1.5' is out of range. Write a number")


def test_not_more_problems_than_can_be_read(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", "query,score|a", *["x,2"] * 50)
    with pytest.raises(DataError, match="and 30 more") as caught:
        read(path)
    assert len(caught.value.problems) == SHOWN


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["query,score|a", "x,"], "not one outcome is known"),
        (["query,score|a"], "there are no rows"),
        (["text,score|a", "x,1"], "query: there is no such column"),
        (["query,answer", "x,1"], "there are no scores among the columns query, answer"),
        (["query,intent", "x,oos"], "every query is out of scope"),
        (["query,score|a,score|a", "x,1,0"], "stands there twice"),
        (["query,score|", "x,1"], "the column names no model"),
        (["query,expert,score,score|a", "x,a,1,1"], "both"),
        (["query,score|a", "x,1,2"], ":2: 3 cells under 2 columns"),
        (["query,expert,score", "x,,1"], ":2: expert: there is nothing"),
    ],
)
def test_what_is_no_outcome_table(tmp_path: Path, rows: list[str], said: str) -> None:
    with pytest.raises(DataError) as caught:
        read(write_csv(tmp_path / "t.csv", *rows))
    assert said in str(caught.value)


def test_rows_of_one_question_may_not_contradict_each_other(tmp_path: Path) -> None:
    rows = [
        {"query_id": "1", "query": q, "expert": e, "score": 1} for q, e in [("x", "a"), ("y", "b")]
    ]
    with pytest.raises(DataError, match=r":2: query: differs from line 1"):
        read(write_jsonl(tmp_path / "t.jsonl", *rows))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for name, content, said in [
        ("t.txt", b"x", "ending says no format"),
        ("t.csv.gz", gzip.compress(b"query,score|a\n" * 99)[:-9], "cannot be read"),
        ("t.csv", b"query,score|a\n\xff,1\n", "not UTF-8"),
        ("t.jsonl", b'{"query": 1\n[]\n', ":1: not JSON"),
        ("t.parquet", b"PAR1 no more", "cannot be read"),
    ]:
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(DataError, match=said):
            read(path)
    for ending in ("csv", "jsonl", "parquet"):
        with pytest.raises(DataError, match="there is no such file"):
            read(tmp_path / f"none.{ending}")


def test_prices_with_faults(tmp_path: Path) -> None:
    table = write_csv(tmp_path / "t.csv", *WIDE)
    half = write_csv(tmp_path / "half.csv", "model,usd_per_1M_input,usd_per_1M_output", "a,1,")
    with pytest.raises(DataError, match=r"half\.csv:2: a has half a price"):
        read(table, prices=half)
    with pytest.raises(DataError, match="there is no column usd_per_1M_input"):
        read(table, prices=write_csv(tmp_path / "p.csv", "model,price", "a,1"))
    disputed = write_csv(
        tmp_path / "two.csv", *PRICES[:1], "x,a,1,1", "y,a,2,2", "x,b,1,1", "y,b,1,1"
    )
    found = read(table, prices=disputed)
    assert np.isnan(found.cost).tolist() == [[True, False], [True, False]]
