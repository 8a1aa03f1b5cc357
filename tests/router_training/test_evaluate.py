"""Evaluation: the JSON has its keys, what cannot be measured is null, what does not fit is
refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from composer.routing.artefact import Artefact, ArtefactError
from composer.routing.outcomes import Outcomes
from router_training.errors import TrainingError
from router_training.evaluate import evaluate
from router_training.report import report
from router_training.train import train
from tests.router_training.helpers import logged
from tests.router_training.synthetic import stamp, table
from tests.routing.helpers import WordEmbedder

ARTEFACT_KEYS = {
    "name",
    "router",
    "avg_acc",
    "per_benchmark",
    "mean_cost",
    "gain_at_best",
    "gap_closed",
    "aiq",
    "apgr",
    "cpt50",
    "cpt80",
    "brier",
    "brier_base_rate",
    "ece",
    "budget_acc",
    "decision_ms_p50",
    "ci95",
    "trained_on",
}
BASELINE_KEYS = {"random", "best_single", "category_best", "random_mix", "oracle"}


def made(folder: Path, outcomes: Outcomes, router: str = "category") -> Path:
    train(outcomes, router, WordEmbedder().encode, stamp()).artefact().save(folder)
    return folder


def test_the_json_has_exactly_the_keys_of_its_description(tmp_path: Path) -> None:
    folders = [made(tmp_path / "one", table()), made(tmp_path / "two", table(), "clusters")]
    value = evaluate(folders, table(200, seed=2), WordEmbedder()).as_json()
    assert json.loads(json.dumps(value, allow_nan=False)) == value
    assert value.keys() == {"artefacts", "baselines"}
    assert value["baselines"].keys() == BASELINE_KEYS
    assert [a["name"] for a in value["artefacts"]] == ["one", "two"]
    assert [a["router"] for a in value["artefacts"]] == ["category", "clusters"]
    for artefact in value["artefacts"]:
        assert artefact.keys() == ARTEFACT_KEYS | {"knob"}  # with a curve and prices alone
        for promise in artefact["knob"]:
            low, high = promise["achieved_ci95"]
            assert low <= promise["achieved"] <= high
            assert promise["promised"] >= promise["asked"] - 1e-6
        assert artefact["budget_acc"].keys() == {"0.05", "0.10", "0.25", "0.50"}
        assert artefact["ci95"][0] <= artefact["avg_acc"] <= artefact["ci95"][1]
        assert artefact["apgr"] is None  # not a pool of two
        assert artefact["decision_ms_p50"] > 0
    best = value["baselines"]["best_single"]
    assert best["expert"] == "algebra"
    first = value["artefacts"][0]
    assert first["gain_at_best"] == pytest.approx(first["avg_acc"] / best["avg_acc"] - 1)
    assert best["avg_acc"] < first["avg_acc"] <= value["baselines"]["oracle"]["avg_acc"]


def test_without_prices_what_needs_them_is_null(tmp_path: Path) -> None:
    folder = made(tmp_path / "a", table())
    value = evaluate([folder], table(100, seed=2, priced=False), WordEmbedder()).as_json()
    assert value["artefacts"][0].keys() == ARTEFACT_KEYS
    artefact = value["artefacts"][0]
    assert artefact["mean_cost"] is None
    assert artefact["aiq"] is None
    assert set(artefact["budget_acc"].values()) == {None}
    assert value["baselines"]["random_mix"] is None
    assert artefact["avg_acc"] is not None


def test_of_single_outcomes_only_calibration_is_told(tmp_path: Path) -> None:
    folder = made(tmp_path / "a", table())
    result = evaluate([folder], logged(table(100, seed=2)), WordEmbedder())
    value = json.loads(json.dumps(result.as_json(), allow_nan=False))
    artefact = value["artefacts"][0]
    assert artefact["avg_acc"] is artefact["ci95"] is artefact["mean_cost"] is None
    assert artefact["brier"] < artefact["brier_base_rate"]
    assert value["baselines"]["oracle"]["avg_acc"] is None
    with pytest.raises(TrainingError, match="the report: none of the 100 questions"):
        report(result, "a log")


def test_a_pair_has_its_own_measures(tmp_path: Path) -> None:
    pair = ["algebra", "poems"]
    folder = made(tmp_path / "a", table().of(pair))
    artefact = evaluate([folder], table(300, seed=2), WordEmbedder()).as_json()["artefacts"][0]
    assert artefact["apgr"] > 0.6
    assert artefact["cpt50"] <= artefact["cpt80"]


def test_questions_trained_on_are_told_and_can_be_left_out(tmp_path: Path) -> None:
    folder, data = made(tmp_path / "a", table()), table(100, seed=2)
    seen = tuple(text.title().replace(" ", "  ") for text in table().text[:20])
    data = replace(data, text=seen + data.text[20:])
    [told] = evaluate([folder], data, WordEmbedder()).as_json()["artefacts"]
    assert told["trained_on"] == {"questions": 20, "of": 100, "left_out": False}
    result = evaluate([folder], data, WordEmbedder(), without_trained=True)
    assert len(result.outcomes) == 80
    assert result.artefacts[0].overlap.trained == 20
    [new] = evaluate([folder], table(50, seed=3), WordEmbedder()).artefacts
    assert new.overlap.sentence is None
    with pytest.raises(TrainingError, match="all questions to judge on were trained on"):
        evaluate([folder], table(), WordEmbedder(), without_trained=True)


def test_an_artefact_that_does_not_tell_its_questions_is_judged(tmp_path: Path) -> None:
    """As those written before artefacts told it."""
    artefact = Artefact.load(made(tmp_path / "new", table()))
    del artefact.states["trained"]
    artefact.save(tmp_path / "old")
    [judged] = evaluate([tmp_path / "old"], table(100, seed=2), WordEmbedder()).artefacts
    assert judged.as_json()["trained_on"] == {"questions": None, "of": 100, "left_out": False}
    assert judged.overlap.sentence is not None
    assert "not known" in judged.overlap.sentence


def test_order_of_experts_and_of_questions_changes_nothing(tmp_path: Path) -> None:
    folder = made(tmp_path / "a", table())
    data = table(150, seed=2)
    turned = data.of(data.experts[::-1])
    one, other = (evaluate([folder], d, WordEmbedder()).as_json() for d in (data, turned))
    for value in (one, other):
        value["artefacts"][0].pop("decision_ms_p50")
    assert one == other


def test_the_best_single_is_that_of_training(tmp_path: Path) -> None:
    folder = made(tmp_path / "a", table())
    data = table(100, seed=2)
    quality = data.quality.copy()
    quality[:, 2] = 1.0
    value = evaluate([folder], replace(data, quality=quality), WordEmbedder()).as_json()
    assert value["baselines"]["best_single"]["expert"] == "algebra"


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    three = made(tmp_path / "three", table())
    two = made(tmp_path / "two", table().of(["poems", "cheap"]))
    data, embedder = table(50, seed=2), WordEmbedder()
    with pytest.raises(ArtefactError, match="chooses from poems, too, and the data has no outcome"):
        evaluate([three], data.of(["algebra", "cheap"]), embedder)
    with pytest.raises(ArtefactError, match=r"chooses from algebra, too, and .*two does not know"):
        evaluate([two, three], data, embedder)
    with pytest.raises(ArtefactError, match=r"two knows nothing of algebra, which .*three chooses"):
        evaluate([three, two], data, embedder)
    with pytest.raises(TrainingError, match="no artefact to evaluate"):
        evaluate([], data, embedder)
    silent = replace(data, quality=np.full_like(data.quality, np.nan))
    with pytest.raises(TrainingError, match="no question has a known outcome"):
        evaluate([three], silent, embedder)
    other = WordEmbedder()
    other.digest = "other"
    with pytest.raises(ArtefactError, match="was trained on vectors of words"):
        evaluate([three], data, other)
