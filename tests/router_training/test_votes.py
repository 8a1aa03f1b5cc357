"""Heads of votes: fitted on recorded answers, written by the command, served through the API."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from composer.build import make_embedder
from composer.routing.artefact import EmbedderStamp
from composer.settings import Settings
from composer.strategies.extract import choice
from composer.strategies.voting.head import CUT, log_odds_of
from composer.strategies.voting.learnt import HeadFile
from composer.types import FloatArray
from router_training import load_router
from router_training.cli import app
from router_training.data import Answers, Dataset, load
from router_training.embedding import Embedding
from router_training.errors import TrainingError
from router_training.profiles import annotated, profile_table, write_profile
from router_training.progress import Progress
from router_training.train import train
from router_training.vectors import KeptVectors
from router_training.votes import (
    Heard,
    bound_of,
    calls_at,
    crossfitted,
    expected_gain,
    fit_head,
    head_file,
    numbered,
    tell,
    votes,
)
from tests.replayed import TOPICS, WAITS, Recorded, record, registry
from tests.tiny import ROOT, chat, serving

pytestmark = pytest.mark.usefixtures("short_grids")

EXPERTS = tuple(TOPICS)


def made_up(n: int = 600, experts: int = 5, seed: int = 0) -> Heard:
    """Experts right with the probability that the router says, wrong ones among four letters."""
    rng = np.random.default_rng(seed)
    quality = rng.uniform(0.2, 0.9, (n, experts)).astype(np.float32)
    quality = -np.sort(-quality, axis=1)
    right = rng.random((n, experts)) < quality
    answers = np.where(right, 0, rng.integers(1, 5, (n, experts)))
    answers[rng.random((n, experts)) < 0.05] = -1
    score = ((answers == 0) & right).astype(np.float32)
    return Heard(answers.astype(np.int64), log_odds_of(quality), score, np.arange(n))


def test_a_head_learns_that_agreement_counts() -> None:
    heard = made_up()
    head = fit_head(heard)
    told = tell(head, made_up(seed=1))
    assert head.follow > 0.3
    assert head.agreement[0] > 0.5
    right = told.score.mean(axis=0)
    assert right[4] > right[2] > right[0]
    for k in range(5):  # as likely as it says, in quarters
        order = np.argsort(told.probability[:, k])
        for part in np.array_split(order, 4):
            assert told.probability[part, k].mean() == pytest.approx(
                told.score[part, k].mean(), abs=0.12
            )


def test_fitting_twice_is_the_same_to_the_last_bit() -> None:
    one, other = (fit_head(made_up(200)) for _ in range(2))
    assert np.array_equal(one.gain, other.gain)
    assert np.array_equal(one.none, other.none)


def test_stops_save_calls_and_hardly_an_answer() -> None:
    heard = made_up(1200)
    head = fit_head(heard)
    held = tell(head, made_up(1200, seed=1))
    gain = expected_gain(head, held)
    rows = np.arange(1200)
    for first in (1, 2):
        bound = bound_of(held, gain, first, 3.0)
        calls = calls_at(held, gain, bound, first)
        assert calls.min() >= first
        assert 2.5 < calls.mean() <= 3.0
        stopped = held.score[rows, calls - 1].mean()
        assert stopped > held.score[:, 2].mean()  # than three for everybody
        assert stopped > held.score[:, 4].mean() - 0.03


def test_a_curve_rises_with_its_calls() -> None:
    file = head_file(made_up(400), experts=[f"e{i}" for i in range(5)], extractor="exact")
    assert set(file.curves) == {1, 2, 3, 4}
    for first, stops in file.curves.items():
        calls = [stop.calls for stop in stops]
        bounds = [stop.bound for stop in stops]
        assert calls == sorted(calls)
        assert bounds == sorted(bounds, reverse=True)
        assert calls[0] >= first
        assert calls[-1] <= 5
        middle = (calls[0] + calls[1]) / 2
        assert bounds[1] <= file.bound_for(first, middle) <= bounds[0]


def test_heads_are_crossfitted_by_whole_questions() -> None:
    heard = made_up(300)
    twice = replace(
        heard,
        group=np.arange(300) // 2,
        answers=np.repeat(heard.answers[::2], 2, axis=0),
        score=np.repeat(heard.score[::2], 2, axis=0),
        log_odds=np.repeat(heard.log_odds[::2], 2, axis=0),
    )
    told, gain = crossfitted(twice)
    assert np.array_equal(told.probability[::2], told.probability[1::2])
    assert np.array_equal(gain[::2], gain[1::2])


def test_answers_are_numbered_by_their_extracted_form() -> None:
    given_ = np.array([["B", "b", None], ["(C)", "A.", "none"]], object)
    assert numbered(Answers(("x", "y", "z"), ("B", "C"), given_), choice).tolist() == [
        [0, 0, -1],
        [0, 1, -1],
    ]


def test_experts_stand_in_the_order_of_their_quality(recorded: Recorded) -> None:
    data = dataset(recorded)
    quality = np.tile(np.array([0.1, 0.9, 0.5, 0.5], np.float32), (len(data), 1))
    assert data.answers is not None
    heard = Heard.of(numbered(data.answers, choice), quality, data.outcomes, 3)
    assert heard.score.tolist() == data.outcomes.quality[:, [1, 2, 3]].tolist()
    assert (np.abs(heard.log_odds) <= CUT).all()


# --- the command and the service --------------------------------------------------------


def topic(text: str) -> str:
    return next(name for name, words in TOPICS.items() if any(word in text for word in words))


def table_with_scores(recorded: Recorded, folder: Path) -> Path:
    path = folder / "scored.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        names = [f"{kind}|{e}" for kind in ("score", "answer") for e in EXPERTS]
        rows.writerow(["query", "category", "gold", *names])
        for i, text in enumerate(recorded.query):
            said = [recorded.answer[e][i] for e in EXPERTS]
            scores = [int(a == recorded.gold[i]) for a in said]
            rows.writerow([text, topic(text), recorded.gold[i], *scores, *said])
    return path


def dataset(recorded: Recorded) -> Dataset:
    return load(table_with_scores(recorded, recorded.path.parent))


@pytest.fixture(scope="module")
def embedder() -> Any:
    return make_embedder(Settings(cache_dir=ROOT / ".cache" / "composer"))


def trained(recorded: Recorded, embedder: Any, folder: Path) -> None:
    stamp = EmbedderStamp(id=embedder.id, digest=embedder.digest, dim=embedder.dim)
    model = train(dataset(recorded).outcomes, "category", embedder.encode, stamp)
    model.artefact().save(folder)


def policies(recorded: Recorded, **strategy: Any) -> str:
    config = yaml.safe_load(registry(recorded.path))
    router = {"name": "learned", "artefact": "./router"}
    vote = {"name": "vote", "extractor": "choice", "head": "./head.json", **strategy}
    del config["devices"]  # nobody waits for a swap
    for server in config["servers"].values():
        del server["placement"]
    config["policies"] = {"auto": {"router": router, "strategy": vote, "k": 4}}
    return yaml.safe_dump(config)


def run(*args: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


async def test_what_the_command_writes_is_served_as_it_was_judged(
    tmp_path: Path, recorded: Recorded, embedder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the API over replayed models: answers, calls and probabilities of the arrays."""

    def opened(progress: Progress) -> Embedding:
        return Embedding(KeptVectors(embedder, tmp_path / "vectors", progress), embedder.encode)

    monkeypatch.setattr("router_training.embedding.open_embedding", opened)
    trained(recorded, embedder, tmp_path / "router")
    out = tmp_path / "head.json"
    data = table_with_scores(recorded, tmp_path)
    to = ("--artefact", tmp_path / "router", "--data", data, "--out", out)
    status, shown, err = run("votes", *to, "--extractor", "choice", "--most", "4")
    assert status == 0, err
    assert "4 experts, 60 questions" in shown
    file = HeadFile.load(out)
    assert set(file.experts) == set(EXPERTS)

    offline = load_router(tmp_path / "router", embedder)
    quality: FloatArray = offline.score(recorded.query).quality
    table = dataset(recorded).of(offline.experts)
    assert table.answers is not None
    heard = Heard.of(numbered(table.answers, choice), quality, table.outcomes, 4)
    told = tell(file.head, heard)
    bound = file.bound_for(2, 3.0)
    expected = calls_at(told, expected_gain(file.head, told), bound, 2)
    gold = dict(zip(recorded.query, recorded.gold, strict=True))
    text = policies(recorded, first=2, mean_calls=3.0)
    async with serving(tmp_path, text, **WAITS) as (client, _):
        for i, query in enumerate(recorded.query):
            response = await client.post("/v1/chat/completions", json=chat(query))
            assert response.status_code == 200, response.text
            body: Mapping[str, Any] = response.json()
            details = body["composer"]["details"]
            k = int(expected[i])
            right = body["choices"][0]["message"]["content"] == gold[query]
            assert right == (told.score[i, k - 1] == 1)
            assert details["asked"] == k == len(body["composer"]["experts"])
            if k > 2:  # one of the first two may be cut short
                assert details["probability"] == pytest.approx(told.probability[i, k - 1], abs=2e-4)


def test_a_policy_with_another_expert_is_refused(
    tmp_path: Path, recorded: Recorded, embedder: Any
) -> None:
    from composer.build import load as load_catalog
    from composer.registry import RegistryError

    trained(recorded, embedder, tmp_path / "router")
    file = head_file(made_up(100, 4), experts=["algebra", "cells", "courts"], extractor="choice")
    (tmp_path / "head.json").write_text(file.text())
    (tmp_path / "experts.yaml").write_text(policies(recorded))
    with pytest.raises(RegistryError, match="the head was not fitted for 'markets'") as refused:
        load_catalog(Settings(experts=tmp_path / "experts.yaml"))
    assert [problem.path for problem in refused.value.problems] == ["policies.auto.strategy"]
    config = yaml.safe_load(policies(recorded, names={"markets": "courts"}))
    (tmp_path / "experts.yaml").write_text(yaml.safe_dump(config))
    one = load_catalog(Settings(experts=tmp_path / "experts.yaml")).catalog
    (tmp_path / "head.json").write_text(file.model_copy(update={"follow": 0.5}).text())
    other = load_catalog(Settings(experts=tmp_path / "experts.yaml")).catalog
    assert one.digest != other.digest  # so that a running service takes the new file up


def test_what_cannot_be_fitted_is_told(tmp_path: Path, recorded: Recorded, embedder: Any) -> None:
    trained(recorded, embedder, tmp_path / "router")
    manifest = load_router(tmp_path / "router", embedder).model.manifest
    data = dataset(recorded)

    def fit(some: Dataset, **how: Any) -> HeadFile:
        return votes(some, manifest, embedder.encode, extractor="choice", **how)

    with pytest.raises(TrainingError, match="no outcomes of the artefact's expert 'cells'"):
        fit(data.of(["algebra"]))
    with pytest.raises(TrainingError, match="only scores; votes need columns"):
        fit(replace(data, answers=None))
    with pytest.raises(TrainingError, match="5 experts of 4 cannot be asked"):
        fit(data)


def test_a_router_of_annotated_skills_needs_its_annotations(
    tmp_path: Path, recorded: Recorded, embedder: Any
) -> None:
    """Without them the head would be fitted on the scores of a router by categories."""
    data = dataset(recorded)
    skills = {text: (f"{topic(text)} by heart",) for text in recorded.query}
    own = replace(data, outcomes=annotated(data.outcomes, skills))
    stamp = EmbedderStamp(id=embedder.id, digest=embedder.digest, dim=embedder.dim)
    artefact = train(own.outcomes, "skills", embedder.encode, stamp).artefact()
    manifest = artefact.save(tmp_path / "router")

    def fit(some: Dataset) -> HeadFile:
        return votes(some, manifest, embedder.encode, extractor="choice", most=4)

    with pytest.raises(TrainingError, match=r"algebra by heart.*that it was trained with"):
        fit(data)
    others = annotated(data.outcomes, {text: ("another",) for text in recorded.query})
    with pytest.raises(TrainingError, match="or leave --skills out if that was none"):
        fit(replace(data, outcomes=others))
    assert fit(own).source["family"] == "skills"
    plain = train(data.outcomes, "skills", embedder.encode, stamp).artefact().save(tmp_path / "q")
    assert votes(data, plain, embedder.encode, extractor="choice", most=4).experts == EXPERTS
    table = table_with_scores(recorded, tmp_path)
    to = ("--artefact", tmp_path / "router", "--data", table, "--out", tmp_path / "head.json")
    status, _, err = run("votes", *to, "--extractor", "choice", "--most", "4")
    assert (status, "--skills" in err) == (2, True)
    write_profile(
        tmp_path / "p.json", skills, profile_table(own.outcomes, 1), source="x", by={"method": "x"}
    )
    status, _, err = run(
        "votes", *to, "--extractor", "choice", "--most", "4", "--skills", tmp_path / "p.json"
    )
    assert status == 0, err


def test_the_command_tells_what_is_wrong(tmp_path: Path, recorded: Recorded) -> None:
    data = table_with_scores(recorded, tmp_path)
    to = ("--artefact", tmp_path / "none", "--data", data, "--out", tmp_path / "head.json")
    status, _, err = run("votes", *to, "--extractor", "regex")
    assert (status, "needs a pattern" in err) == (2, True)
    status, _, err = run("votes", *to)
    assert (status, "there is no artefact" in err) == (2, True)


@pytest.fixture
def recorded(tmp_path: Path) -> Recorded:
    return record(tmp_path)


def test_json_of_the_head_is_plain() -> None:
    file = head_file(made_up(100, 3), experts=["a", "b", "c"], extractor="exact")
    assert json.loads(file.text())["experts"] == ["a", "b", "c"]
