"""Skills of questions by labels, embedding and an expert; the profile's file; `profile` and
`train --skills` as a person uses them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from composer.routing.families.skills import Skills, SkillsSettings
from composer.routing.outcomes import Outcomes
from composer.types import Message
from router_training import asking
from router_training.asking import Said
from router_training.embedding import Embedding
from router_training.errors import AskError, AskFailed, AskRefused, DataError, TrainingError
from router_training.profiles import (
    among,
    annotated,
    by_embedding,
    by_labels,
    by_llm,
    gathered,
    profile_table,
    read_list,
    read_profile,
    write_profile,
)
from router_training.progress import Progress
from router_training.vectors import KeptVectors
from tests.router_training.helpers import outcomes
from tests.router_training.synthetic import KINDS, table, write_table
from tests.router_training.test_training_cli import run
from tests.routing.helpers import WordEmbedder

ENCODE = WordEmbedder().encode


def known() -> Outcomes:
    return outcomes(
        [[1, 0], [0, 0], [1, np.nan]], category=["a", "a", "b"], benchmark=["x", "x", "x"]
    )


def test_labels_that_tell_questions_apart_are_skills() -> None:
    assert by_labels(known()) == {
        "question 0": ("a",), "question 1": ("a",), "question 2": ("b",)
    }  # fmt: skip
    two = replace(known(), benchmark=("x", "y", "y"), category=("a", "", "b"))
    assert by_labels(two)["question 1"] == ("y",)
    with pytest.raises(TrainingError, match="give a list of skills, or an expert to ask"):
        by_labels(outcomes([[1, 0]]))


def test_the_table_is_the_profile_that_the_router_learns() -> None:
    some = annotated(known(), {"question 0": ("s", "t"), "question 2": ("s",)})
    assert some.skills == (("s", "t"), (), ("s",))
    found = profile_table(some, least=1)
    assert found.skills == ("s", "t")
    np.testing.assert_array_equal(found.profile, [[2, 1], [-1, -1]])
    np.testing.assert_array_equal(found.count, [[2, 1], [1, 1]])
    features: Any = {"embedding": np.eye(3, 4, dtype=np.float32)}
    fitted = Skills.fit(features, some, SkillsSettings(least=1), 0)
    np.testing.assert_array_equal(fitted.profile, found.profile)


def test_the_nearest_skills_of_a_list() -> None:
    skills = ["algebra and equations", "poems", "cooking"]
    found = by_embedding(["equations and algebra", "write poems", "write poems"], skills, ENCODE, 1)
    assert found == {"equations and algebra": (skills[0],), "write poems": (skills[1],)}
    assert len(by_embedding(["x"], skills, ENCODE, 9)["x"]) == 3


class Expert:
    """Says what `script` makes of the question; counts the calls."""

    def __init__(self, *said: str | Exception) -> None:
        self.said = said
        self.calls = 0

    async def __call__(self, expert: str, messages: Sequence[Message]) -> Said:
        self.calls += 1
        now = self.said[min(self.calls, len(self.said)) - 1]
        if isinstance(now, Exception):
            raise now
        return Said(now)


async def test_keywords_on_which_samples_agree() -> None:
    samples = [Expert("algebra, logic"), Expert("logic"), Expert("poetry")]
    found, notes = await by_llm(["q", "r", "q"], "wise", samples)
    assert found == {"q": ("logic",), "r": ("logic",)}
    assert [one.calls for one in samples] == [2, 2, 2]
    assert notes == []


async def test_a_refused_question_has_no_skill_and_is_told() -> None:
    found, notes = await by_llm(["q", "r"], "wise", [Expert(AskRefused("too long"), "logic")])
    assert sorted(found.values()) == [(), ("logic",)]
    assert notes == ["1 questions were refused, the first: too long"]
    _, notes = await by_llm(["q"], "wise", [Expert("a"), Expert("b")])
    assert notes == ["about 1 questions no two samples agree on a skill"]


async def test_where_asking_fails_again_and_again_the_rest_is_left() -> None:
    expert = Expert("logic", AskFailed("down"))
    with pytest.raises(TrainingError, match=r"about 29 of 30 questions \(down\); give the same"):
        await by_llm([f"q{i}" for i in range(30)], "wise", [expert], concurrency=1)
    assert expert.calls == 4
    with pytest.raises(AskError, match="nobody"):
        await by_llm(["q"], "wise", [Expert(AskError("nobody is there"))])


def test_rare_skills_become_the_nearest_of_the_others() -> None:
    said = {"q": ("linear algebra",), "r": ("algebra",), "s": ("algebra", "poems"), "t": ("poems",)}
    found = gathered(said, ENCODE, 2)
    assert found["q"] == ("algebra",)
    assert {text: own for text, own in found.items() if text != "q"} == {
        text: own for text, own in said.items() if text != "q"
    }
    assert gathered(said, ENCODE, 5) == said  # where all are rare
    listed = among(said, ["algebra of sets", "old poems"], ENCODE)
    assert listed["s"] == ("algebra of sets", "old poems")


def test_the_file_says_the_same_again(tmp_path: Path) -> None:
    some = annotated(known(), {"question 0": ("s",), "question 1": (), "question 2": ("s",)})
    file = tmp_path / "deep" / "profile.json"
    skills = dict(zip(some.text, some.skills, strict=True))
    write_profile(file, skills, profile_table(some, 1), source="x.csv", by={"method": "labels"})
    read = read_profile(file)
    assert read.annotations == skills
    assert read.profile == {"e0": {"s": 2}, "e1": {"s": -1}}
    assert read.count == {"e0": {"s": 2}, "e1": {"s": 1}}


@pytest.mark.parametrize("text", ["{", '{"format": 1}', "[]"])
def test_a_file_that_is_no_profile_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "p.json"
    file.write_text(text)
    with pytest.raises(DataError, match="Write it with `router-training profile`"):
        read_profile(file)
    with pytest.raises(DataError, match="no such file"):
        read_profile(tmp_path / "none.json")


def test_other_questions_than_the_profile_s_are_refused() -> None:
    with pytest.raises(TrainingError, match="make it of the same questions"):
        annotated(known(), {"something else": ("s",)})


def test_a_list_needs_two_skills(tmp_path: Path) -> None:
    file = tmp_path / "skills.txt"
    file.write_text("one\n\n one \n")
    with pytest.raises(DataError, match=r"skills: one.*two or more"):
        read_list(file)
    file.write_text("one\ntwo\n")
    assert read_list(file) == ["one", "two"]
    with pytest.raises(DataError, match="cannot be read"):
        read_list(tmp_path / "none.txt")


# --- the commands -------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_grids: None) -> Path:
    def opened(progress: Progress) -> Embedding:
        model = WordEmbedder()
        return Embedding(KeptVectors(model, tmp_path / "vectors", progress), model.encode)

    monkeypatch.setattr("router_training.embedding.open_embedding", opened)
    monkeypatch.setenv("COLUMNS", "200")
    return write_table(tmp_path / "t.train.csv", table(150))


def test_profile_and_then_train(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    status, out, err = run("profile", "--data", data, "--out", file)
    assert status == 0, err
    assert f"150 questions, {len(KINDS)} skills → {file}" in out
    skills = tmp_path / "skills.txt"
    skills.write_text("\n".join(" ".join(words[0].split()[:2]) for words in KINDS.values()))
    status, out, err = run(
        "profile", "--data", data, "--out", file, "--skill-list", skills, "--nearest", "1",
        "--json", "-",
    )  # fmt: skip
    assert status == 0, err
    told = json.loads(out)
    assert told["by"] == {"least": 5, "method": "embedding", "nearest": 1}
    assert read_profile(file).annotations.keys() == set(table(150).text)
    folder = tmp_path / "r"
    status, out, err = run(
        "train", "--router", "skills", "--data", data, "--skills", file, "--out", folder
    )
    assert status == 0, err
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["values"]["family"]["names"]) == set(told["skills"])


def _words(prompt: str) -> set[str]:
    return set(prompt.split("<<<")[1].split())


def test_an_expert_is_asked_once_whatever_happens(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []
    broken = {"after": 20}

    def handler(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "wise"}]})
        if broken and len(seen) >= broken["after"]:
            return httpx.Response(500, json={"error": {"message": "fell over"}})
        body = json.loads(request.content)
        seen.append(body)
        question = body["messages"][0]["content"]
        kind = next(k for k, (words, _) in KINDS.items() if set(words.split()) & _words(question))
        text = f"{kind}, sample {body['seed']}"
        choice = {"message": {"content": text}, "finish_reason": "stop"}
        return httpx.Response(200, json={"choices": [choice]})

    real = asking.Endpoint.__init__

    def init(self: asking.Endpoint, url: str, **settings: Any) -> None:
        real(self, url, **{**settings, "transport": httpx.MockTransport(handler), "wait_s": 0})

    monkeypatch.setattr(asking.Endpoint, "__init__", init)
    file = tmp_path / "profile.json"
    asked = ("profile", "--data", data, "--out", file, "--ask", "wise", "--samples", "2")
    status, _, err = run(*asked)
    assert status == 2
    assert "give the same command again" in err
    assert not file.exists()
    broken.clear()
    status, _, err = run(*asked)
    assert status == 0, err
    assert len(seen) == 300  # two samples of 150 questions, none of them twice
    assert {body["temperature"] for body in seen} == {0.7}
    profile = read_profile(file)
    assert {own for own in profile.annotations.values()} == {(kind,) for kind in KINDS}
    assert profile.by["method"] == "llm"


def test_what_is_wrong_is_told(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    wrong = tmp_path / "wrong.json"
    wrong.write_text("{}")
    train = ("train", "--router", "skills", "--data", data, "--out", tmp_path / "r")
    for args, said in (
        ((*train, "--skills", wrong), "not a profile"),
        (("profile", "--data", data, "--out", file, "--skill-list", wrong), "two or more"),
        (("profile", "--data", data, "--out", file, "--ask", "wise", "--url", "http://127.0.0.1:9"),
         "no service answers"),
    ):  # fmt: skip
        status, out, err = run(*args)
        assert (status, out) == (2, ""), args
        assert said in err, err
        assert "Traceback" not in err
