"""Selecting experts: known answers, fewer evaluations, honest confidence, limits."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from composer.routing.subsets import best_subset
from router_training.cli import app
from router_training.embedding import Embedding
from router_training.errors import TrainingError
from router_training.selection import Selection, drawn_rows, posterior, select
from router_training.subset import Limits, brute_force, by_kind, keep_within
from router_training.suitability import nearness
from router_training.vectors import KeptVectors
from tests.router_training.helpers import NAN, outcomes, write_csv
from tests.router_training.synthetic import table, write_table
from tests.routing.helpers import WordEmbedder


def scores_of(means: Sequence[float], n: int = 64, seed: int = 0) -> np.ndarray:
    """(E, n) of 0 and 1; an example is as hard for all."""
    rng = np.random.default_rng(seed)
    hard = rng.normal(0, 0.15, n)
    chance = np.clip(np.array(means)[:, None] + hard, 0, 1)
    return (rng.random(chance.shape) < chance).astype(np.float64)


def chosen(scores: np.ndarray, **given: Any) -> tuple[Selection, Counter[str]]:
    asked: Counter[str] = Counter()
    names = [f"e{i}" for i in range(len(scores))]

    async def evaluate(expert: str, rows: Sequence[int]) -> list[float | None]:
        asked[expert] += len(rows)
        own = scores[int(expert[1:]), list(rows)]
        return [None if np.isnan(score) else float(score) for score in own]

    return asyncio.run(select(names, scores.shape[1], evaluate, **given)), asked


def test_the_best_are_kept_with_far_fewer_evaluations() -> None:
    found, asked = chosen(scores_of([0.2] * 17 + [0.8, 0.85, 0.9]), keep=3)
    assert set(found.kept) == {"e17", "e18", "e19"}
    assert found.confidence >= 0.9
    assert found.evaluations == sum(asked.values()) < found.exhaustive / 3
    assert found.exhaustive == 20 * 64
    for one in found.standings:
        assert one.evaluations == asked[one.expert]
        assert 0 <= one.low <= one.expected <= one.high <= 1
    ranked = [one.expected for one in found.standings]
    assert ranked == sorted(ranked, reverse=True)


def test_what_cannot_be_told_apart_costs_all_examples_unless_little_is_at_stake() -> None:
    alike = scores_of([0.5] * 6)
    strict, _ = chosen(alike, keep=1, tolerance=0.0, confidence=0.99)
    assert strict.evaluations > strict.exhaustive / 2
    assert strict.confidence < 0.9
    easy, _ = chosen(alike, keep=1, tolerance=0.1)
    assert easy.evaluations < strict.evaluations
    assert easy.regret <= 0.1


def test_the_confidence_is_kept() -> None:
    """In nine of ten tasks the true best are kept, where that much is said."""
    right = said = 0.0
    for seed in range(40):
        means = np.random.default_rng(seed).uniform(0.1, 0.9, 10)
        found, _ = chosen(scores_of(means.tolist(), 64, seed), keep=2, seed=seed)
        right += set(found.kept) == {f"e{i}" for i in np.argsort(-means)[:2]}
        said += found.confidence
    assert abs(right - said) / 40 < 0.15


def test_a_description_that_tells_saves_evaluations() -> None:
    means = np.full(60, 0.1)
    means[7] = 0.9
    similar = np.random.default_rng(1).normal(0.2, 0.03, 60)
    similar[7] = 0.6
    with_, _ = chosen(scores_of(means.tolist()), similarity=similar.astype(np.float32))
    without, _ = chosen(scores_of(means.tolist()))
    assert with_.kept == without.kept == ("e7",)
    assert with_.evaluations < without.evaluations


def test_a_description_that_misleads_is_overruled() -> None:
    means = [0.2] * 19 + [0.9]
    wrong = np.linspace(1, 0, 20).astype(np.float32)
    found, _ = chosen(scores_of(means), similarity=wrong)
    assert found.kept == ("e19",)


def test_missing_scores_say_nothing() -> None:
    scores = scores_of([0.2, 0.9, 0.3])
    scores[1, ::2] = NAN
    found, _ = chosen(scores)
    assert found.kept == ("e1",)
    with pytest.raises(TrainingError, match="not one candidate has a score"):
        chosen(np.full((3, 8), NAN))


def test_who_never_scored_is_unknown_and_not_kept() -> None:
    """The prior's mean would have been better than any of the others'."""
    scores = scores_of([0.1, 0.2, 0.9])
    scores[2] = NAN
    found, _ = chosen(scores)
    assert found.kept == ("e1",)
    assert found.unknown == ("e2",)
    assert found.standings[-1].expert == "e2"
    found, _ = chosen(scores, keep=2)
    assert found.kept == ("e1", "e0")
    found, _ = chosen(scores[1:], keep=1)
    assert found.kept == ("e0",)


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    count=st.integers(1, 60),
    seed=st.integers(0, 99),
)
def test_drawn_examples_have_each_task_in_its_share(
    sizes: list[int], count: int, seed: int
) -> None:
    labels = [str(task) for task, size in enumerate(sizes) for _ in range(size)]
    rows = drawn_rows(labels, count, seed)
    assert rows == sorted(set(rows))
    assert len(rows) == min(count, len(labels))
    assert rows == drawn_rows(labels, count, seed)
    of = Counter(labels[row] for row in rows)
    for task, size in enumerate(sizes):
        assert abs(of[str(task)] - len(rows) * size / len(labels)) < 2


def test_which_examples_are_drawn_is_the_seeds() -> None:
    labels = ["a"] * 40
    assert len({tuple(drawn_rows(labels, 5, seed)) for seed in range(8)}) > 6


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), experts=st.integers(2, 8), n=st.integers(1, 12))
def test_the_posterior_is_that_of_the_whole_model(seed: int, experts: int, n: int) -> None:
    """Against the same normal model with every difficulty written out, by one big inverse."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 2, (experts, n)).astype(np.float64)
    scores[rng.random(scores.shape) < 0.3] = np.nan
    from router_training.selection import _widths

    known = ~np.isnan(scores)
    noise, difficulty, spread = _widths(scores, known)
    mean, covariance = posterior(scores)
    rows, columns = np.nonzero(known)
    design = np.zeros((len(rows), experts + n))
    design[np.arange(len(rows)), rows] = 1
    design[np.arange(len(rows)), experts + columns] = 1
    prior = np.zeros((experts + n, experts + n))
    prior[:experts, :experts] = spread * np.eye(experts) + 1.0
    prior[experts:, experts:] = difficulty * np.eye(n)
    precision = np.linalg.inv(prior) + design.T @ design / noise
    start = np.concatenate([np.full(experts, 0.5), np.zeros(n)])
    moment = np.linalg.inv(prior) @ start + design.T @ scores[known] / noise
    whole = np.linalg.inv(precision)
    np.testing.assert_allclose(mean, (whole @ moment)[:experts], atol=1e-6)
    np.testing.assert_allclose(covariance, whole[:experts, :experts], atol=1e-6)


@pytest.mark.parametrize(("keep", "n", "says"), [(3, 8, "keep fewer"), (1, 0, "no example")])
def test_no_choice_is_no_selection(keep: int, n: int, says: str) -> None:
    with pytest.raises(TrainingError, match=says):
        chosen(np.zeros((3, n)), keep=keep)


def test_nearness_is_that_of_the_nearest_text() -> None:
    encode = WordEmbedder().encode
    claims = [["sonnet rhyme", "sum root"], ["hello tea"]]
    near = nearness(claims, ["sonnet rhyme", "sum root"], encode)
    assert near[0] == pytest.approx(1, abs=1e-5)
    assert near[1] < 0.5


# --- subsets under limits -------------------------------------------------------------------

TWO = outcomes(
    [[1, 0, 0.6]] * 30 + [[0, 1, 0.6]] * 30,
    [[0.01, 0.02, 0.001]] * 60,
    category=["a"] * 30 + ["b"] * 30,
)
MEASURED = {"e0": (10.0, 50.0), "e1": (10.0, 200.0), "e2": (8.0, 20.0)}


def test_an_expert_without_an_outcome_is_nobodys_choice() -> None:
    quality = np.hstack([TWO.quality, np.full((60, 1), NAN)])
    found = keep_within(
        outcomes(quality, category=TWO.category),
        Limits(memory_gb=40),
        MEASURED | {"e3": (1.0, 1.0)},
    )
    assert "e3" not in found.of.values()
    known = keep_within(
        outcomes(TWO.quality, category=TWO.category), Limits(memory_gb=40), MEASURED
    )
    assert found.everybody == pytest.approx(known.everybody)


@pytest.mark.parametrize(
    ("limits", "kept"),
    [
        (Limits(memory_gb=20), {"e0", "e1"}),
        (Limits(memory_gb=18.5), {"e1", "e2"}),
        (Limits(memory_gb=9), {"e2"}),
        (Limits(memory_gb=28, latency_ms=100), {"e0", "e2"}),
    ],
)
def test_the_best_subset_within_limits(limits: Limits, kept: set[str]) -> None:
    found = keep_within(TWO, limits, MEASURED)
    assert set(found.experts) == kept
    assert found.exact
    assert found.value == pytest.approx(found.best)
    assert found.value <= found.everybody + 1e-9


def test_a_limit_of_cost_maps_kinds_within_it() -> None:
    rich = keep_within(TWO, Limits(cost=0.02), {})
    assert rich.of == {"a": "e0", "b": "e1"}
    poor = keep_within(TWO, Limits(cost=0.006), {})
    assert poor.of == {"a": "e0", "b": "e2"}
    assert poor.cost is not None
    assert poor.cost <= 0.006
    assert poor.value < rich.value
    with pytest.raises(TrainingError, match="raise the budget"):
        keep_within(TWO, Limits(cost=0.0001), {})


def test_limits_need_what_is_measured() -> None:
    with pytest.raises(TrainingError, match="needs latency_ms of every expert, and 'e1'"):
        keep_within(TWO, Limits(latency_ms=1), {"e0": (1.0, 1.0), "e1": (1.0, NAN)})
    with pytest.raises(TrainingError, match="give one of them"):
        keep_within(TWO, Limits(memory_gb=20, cost=1), MEASURED)
    with pytest.raises(TrainingError, match="no expert is within the limits"):
        keep_within(TWO, Limits(memory_gb=1), MEASURED)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), experts=st.integers(1, 7), room=st.floats(1, 20))
def test_no_subset_is_better_than_the_one_kept(seed: int, experts: int, room: float) -> None:
    rng = np.random.default_rng(seed)
    _, count, quality, _ = by_kind(
        outcomes(
            rng.integers(0, 2, (40, experts)),
            category=[str(kind) for kind in rng.integers(0, 4, 40)],
        )
    )
    memory = rng.uniform(0.5, 8, experts)
    if memory.min() > room:
        return
    found = best_subset(count, quality, memory, room)
    assert found.value == pytest.approx(brute_force(count, quality, memory, room)[1])


# --- the command --------------------------------------------------------------------------


def run(*args: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_select_from_recorded_outcomes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    data = write_table(tmp_path / "t.csv", table())
    status, out, err = run("select", "--data", data, "--keep", "1", "--category", "verse")
    assert status == 0, err
    best = next(line for line in out.splitlines() if "kept" in line)
    assert "poems" in best
    assert "evaluations of" in out
    status, _, err = run("select", "--data", data, "--keep", "1", "--category", "chess")
    assert status == 2
    assert "no example is of 'chess'; there are: maths, small talk, synthetic, verse" in err


def test_select_with_descriptions_from_a_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = WordEmbedder()

    def opened() -> Embedding:
        return Embedding(KeptVectors(model, tmp_path / "vectors"), model.encode)

    monkeypatch.setattr("router_training.embedding.open_embedding", opened)
    file = tmp_path / "experts.yaml"
    file.write_text(
        "version: 1\n"
        'servers: {s: {engine: openai, url: "http://127.0.0.1:9/v1", model: m}}\n'
        "experts:\n"
        "  algebra: {server: s, context_window: 9, description: sum root prime integral}\n"
        "  poems: {server: s, context_window: 9, description: sonnet rhyme stanza ballad}\n"
        "  cheap: {server: s, context_window: 9, description: hello weather}\n"
        "policies: {auto: {router: {name: neighbours}, strategy: {name: single}}}\n"
    )
    data = write_table(tmp_path / "t.csv", table())
    status, out, err = run(
        "select", "--data", data, "--keep", "1", "--category", "maths", "--registry", file,
        "--json", "-",
    )  # fmt: skip
    assert status == 0, err
    assert '"kept": [\n    "algebra"\n  ]' in out


def test_select_within_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    data = write_table(tmp_path / "t.csv", table())
    sizes = write_csv(
        tmp_path / "sizes.csv", "expert,memory_gb", "algebra,16", "poems,16", "cheap,4"
    )
    status, out, err = run("select", "--data", data, "--memory-gb", "20", "--measured", sizes)
    assert status == 0, err
    assert "kept: " in out
    assert "20 GB" in out
    status, _, err = run("select", "--data", data, "--memory-gb", "20")
    assert status == 2
    assert "--measured" in err
    wrong = write_csv(tmp_path / "wrong.csv", "expert,size", "algebra,16")
    status, _, err = run("select", "--data", data, "--memory-gb", "20", "--measured", wrong)
    assert status == 2
    assert "memory_gb or latency_ms" in err
