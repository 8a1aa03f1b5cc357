"""Intents as experts: right for their own queries alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from router_training.data import load
from router_training.errors import DataError
from router_training.intents import read_intents
from tests.router_training.helpers import write_csv


def test_one_expert_an_intent(tmp_path: Path) -> None:
    path = write_csv(
        tmp_path / "bank.train.csv",
        "query_id,query,intent,domain",
        "1,hi,greet,talk",
        "2,pay,pay,money",
        "3,what,oos,oos",
        "4,Hi!,greet,talk",
    )
    found = read_intents(path)
    assert found.experts == ("greet", "pay")
    assert found.quality.tolist() == [[1, 0], [0, 1], [0, 0], [1, 0]]
    assert found.category == ("talk", "money", "oos", "talk")
    assert found.benchmark == ("bank",) * 4
    assert found.group.tolist() == [0, 1, 2, 0]
    assert np.isnan(found.cost).all()
    assert found.quality.dtype == np.float32


def test_experts_of_the_training_part(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "dev.csv", "query,intent", "x,b", "y,d")
    assert read_intents(path, experts=["d", "c", "b"]).quality.tolist() == [[0, 0, 1], [1, 0, 0]]
    with pytest.raises(DataError, match=r":3: intent: 'd' \(1 query, first on line 3\) is not"):
        read_intents(path, experts=["b"])


def test_unknown_intents_are_told_once(tmp_path: Path) -> None:
    rows = [f"query {i},i{i % 30}" for i in range(60)]
    path = write_csv(tmp_path / "dev.csv", "query,intent", "x,b", *rows)
    with pytest.raises(DataError) as caught:
        read_intents(path, experts=["b"])
    assert caught.value.found == 1
    assert ":3: intent: 'i0' (2 queries, first on line 3), 'i1'" in str(caught.value)
    assert "and 27 others are not among the experts. Correct them, write 'oos'" in str(caught.value)


def test_no_intents(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no column intent.* There are: query, score\|a\."):
        read_intents(write_csv(tmp_path / "t.csv", "query,score|a", "x,1"))
    with pytest.raises(DataError, match="out of scope"):
        read_intents(write_csv(tmp_path / "t.csv", "query,intent", "x,oos"))
    with pytest.raises(DataError, match=":2: intent: there is nothing"):
        read_intents(write_csv(tmp_path / "t.csv", "query,intent", "x,", "y,a"))


def test_it_is_read_as_any_outcomes_are(tmp_path: Path) -> None:
    path = write_csv(
        tmp_path / "bank.csv", "query,intent,split", "a,x,train", "b,oos,train", "c,y,dev"
    )
    found = load(path)
    assert found.outcomes.experts == ("x", "y")
    assert found.notes == ("1 questions are out of scope",)
    assert found.ids == ("a", "b", "c")
    part = load(path, split="dev", experts=found.outcomes.experts)
    assert part.outcomes.quality.tolist() == [[0, 1]]
