"""Cross-fitting: nobody is told of what they are asked, and luck does not choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel

from composer.routing.families import FAMILIES
from composer.routing.family import Predicted
from composer.routing.outcomes import Outcomes
from composer.routing.views import Features, Views
from composer.types import FloatArray
from router_training.criterion import Criterion
from router_training.crossfit import (
    CrossFit,
    by_stem,
    calibrated_apart,
    folds_by_stem,
    out_of_fold,
    standard_error,
)
from router_training.errors import TrainingError
from tests.router_training.helpers import outcomes as made
from tests.router_training.synthetic import table
from tests.routing.helpers import WordEmbedder


class Noise(BaseModel):
    spread: float = 0.0
    refuses: bool = False


@dataclass
class Fake:
    """Predicts what it was fitted on, row by row, so that a leak would be perfect; else the means
    with noise. `seen` are the groups of each fit."""

    name = "fake"
    settings = Noise
    rows: dict[bytes, FloatArray]
    mean: FloatArray
    spread: float
    seen = []  # type: ignore[var-annotated]  # noqa: RUF012

    @classmethod
    def grid(cls) -> Sequence[Noise]:
        return [Noise(spread=0.0), Noise(spread=0.01), Noise(spread=3.0)]

    @classmethod
    def views(cls, settings: Noise) -> frozenset[Any]:
        return frozenset({"embedding"})

    @classmethod
    def fit(cls, features: Features, outcomes: Outcomes, settings: Noise, seed: int) -> Fake:
        if settings.refuses:
            raise ValueError("there is too little; give more")
        cls.seen.append(set(outcomes.group.tolist()))
        keys = [row.tobytes() for row in features["embedding"]]
        rows = dict(zip(keys, outcomes.quality, strict=True))
        return cls(rows, np.nanmean(outcomes.quality, axis=0), settings.spread)

    def predict(self, features: Features) -> FloatArray:
        rng = np.random.default_rng(0)
        return np.stack(
            [
                self.rows.get(
                    row.tobytes(), self.mean + self.spread * rng.normal(size=len(self.mean))
                )
                for row in features["embedding"]
            ]
        )


@pytest.fixture
def _fake(monkeypatch: pytest.MonkeyPatch) -> None:
    Fake.seen = []
    monkeypatch.setattr("router_training.crossfit.FAMILIES", {**FAMILIES, "fake": Fake})


def ready(outcomes: Outcomes) -> tuple[Features, Outcomes, Any]:
    outcomes = by_stem(outcomes)
    features = Views.fit(outcomes.text).transform(outcomes.text, WordEmbedder().encode)
    return features, outcomes, folds_by_stem(outcomes, 0)


@pytest.mark.usefixtures("_fake")
def test_predictions_come_from_fits_that_had_not_seen_the_question() -> None:
    features, outcomes, fold = ready(table(100))
    said = out_of_fold(Fake, [Noise()], features, outcomes, fold, 0)  # type: ignore[type-abstract]
    assert said[0].signs is None
    for held, seen in zip(np.unique(fold), Fake.seen, strict=True):
        assert not seen & set(outcomes.group[fold == held].tolist())
        mean = np.nanmean(outcomes.quality[fold != held], axis=0)
        np.testing.assert_allclose(
            said[0].quality[fold == held], np.broadcast_to(mean, (sum(fold == held), 3))
        )


@pytest.mark.usefixtures("_fake")
def test_the_default_stays_unless_it_is_significantly_worse() -> None:
    features, outcomes, fold = ready(table(200))
    crossfit = CrossFit(features, outcomes, criterion=Criterion(), fold=fold)
    chosen = crossfit.choose("fake")
    assert chosen.settings == Noise(spread=0.0)
    assert crossfit.choose("fake") is chosen
    by_value = max(chosen.trials, key=lambda t: t.value)
    assert by_value.behind == 0
    assert by_value.error == 0
    first = chosen.trials[0]
    assert first.behind <= first.error
    worst = chosen.trials[2]
    assert worst.behind > worst.error


def test_options_alone_do_not_part_a_question() -> None:
    texts = ("Which is it?\nA. one\nB. two", "Which is it?\nA. three\nB. four", "Another one?")
    outcomes = replace(made(np.ones((3, 2))), text=texts)
    assert by_stem(outcomes).group.tolist() == [0, 0, 1]


def test_an_expert_asked_in_one_fold_alone_is_given_the_others_mean() -> None:
    features, outcomes, fold = ready(table(100))
    quality = outcomes.quality.copy()
    quality[fold != 2, 1] = np.nan
    outcomes = replace(outcomes, quality=quality)
    kind = FAMILIES["category"]
    raw = out_of_fold(kind, list(kind.grid())[:1], features, outcomes, fold, 0)[0].quality
    assert np.isfinite(raw).all()
    seen = quality[fold != 2]
    np.testing.assert_allclose(raw[fold == 2, 1], np.nanmean(seen), rtol=1e-6)


def test_calibration_leaves_decisions_alone_and_knows_nothing_of_its_own_fold() -> None:
    _, outcomes, fold = ready(table(200))
    noise = np.random.default_rng(0).uniform(0.05, 0.6, outcomes.quality.shape)
    raw = np.asarray(noise + 0.3 * outcomes.quality, np.float32)
    said = Predicted(raw, None)
    before = calibrated_apart(said, outcomes, fold)
    changed = outcomes.quality.copy()
    changed[fold == 1] = 1 - changed[fold == 1]
    after = calibrated_apart(said, replace(outcomes, quality=changed), fold)
    np.testing.assert_array_equal(before[fold == 1], after[fold == 1])
    assert (before[fold == 0] != after[fold == 0]).any()
    np.testing.assert_array_equal(before.argmax(axis=1), raw.argmax(axis=1))


@pytest.mark.usefixtures("_fake")
def test_what_a_family_refuses_is_told_in_its_words() -> None:
    features, outcomes, fold = ready(table(50))
    with pytest.raises(TrainingError, match="fake: there is too little; give more"):
        out_of_fold(Fake, [Noise(refuses=True)], features, outcomes, fold, 0)  # type: ignore[type-abstract]


@pytest.mark.usefixtures("short_grids")
def test_the_blend_follows_the_members_with_their_own_settings() -> None:
    features, outcomes, fold = ready(table(150))
    crossfit = CrossFit(features, outcomes, criterion=Criterion(), fold=fold)
    blend = crossfit.choose("blend")
    assert [m.family for m in blend.members] == [
        m.family
        for m in blend.settings.members  # type: ignore[attr-defined]
    ]
    for member, said in zip(blend.members, blend.settings.members, strict=True):  # type: ignore[attr-defined]
        assert member is crossfit.choose(member.family)
        assert dict(said.settings) == member.settings.model_dump(mode="json")
    assert blend.values.mean() > outcomes.quality.mean(axis=0).max()


def test_the_standard_error_counts_copies_once() -> None:
    rng = np.random.default_rng(0)
    values, group = rng.normal(size=400), np.arange(400)
    once = standard_error(values, group)
    np.testing.assert_allclose(once, values.std() / 20)
    twice = standard_error(np.repeat(values, 2), np.repeat(group, 2))
    np.testing.assert_allclose(once, twice)
