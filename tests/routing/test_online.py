"""Learning while serving: corrections that follow what is observed, kept and taken up again."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save as save_arrays

from composer.errors import Misfits
from composer.routing.artefact import MANIFEST
from composer.routing.base import Demands, Query
from composer.routing.learners import BanditLearner, FullLearner, Observed
from composer.routing.online import OnlineRouter, OnlineSettings
from tests.routing.helpers import WordEmbedder, expert, queries

EXPERTS = ("a", "b", "c")
M = 9


def learner(kind: str) -> BanditLearner | FullLearner:
    if kind == "full":
        return FullLearner.new(EXPERTS, M, rate=0.1, decay=0.003)
    return BanditLearner.new(EXPERTS, M, half_life=300, noise=0.5, prior=0.15)


def contexts(n: int, seed: int = 0) -> np.ndarray:
    return np.hstack([np.ones((n, 1)), queries(n, seed=seed, dim=M - 1)]).astype(np.float32)


def stream(truth: Any, n: int, seed: int, *, full: bool = True) -> list[Observed]:
    """Outcomes of success rates `truth(x)` (E,), where the base expects 0.5 of everyone."""
    rng = np.random.default_rng(seed)
    observed = []
    for x in contexts(n, seed):
        outcome = (rng.random(3) < truth(x)).astype(np.float32)
        if not full:
            outcome[np.arange(3) != rng.integers(3)] = np.nan
        observed.append(Observed(x, np.full(3, 0.5, np.float32), outcome))
    return observed


@pytest.mark.parametrize("kind", ["bandit", "full"])
def test_before_any_outcome_it_is_the_base(kind: str) -> None:
    base = np.array([0.2, 0.5, 0.9], np.float32)
    quality, _ = learner(kind).quality(contexts(1)[0], base)
    assert quality == pytest.approx(base, abs=1e-6)


@pytest.mark.parametrize("kind", ["bandit", "full"])
def test_it_follows_two_experts_that_exchange_quality(kind: str) -> None:
    before, after = np.array([0.9, 0.2, 0.5]), np.array([0.2, 0.9, 0.5])
    full = kind == "full"
    taught = learner(kind).learned(stream(lambda x: before, 1500, 1, full=full))
    turned = taught.learned(stream(lambda x: after, 1500, 2, full=full))
    base = np.full(3, 0.5, np.float32)
    for one, best in ((taught, 0), (turned, 1)):
        picks = [int(one.quality(x, base)[0].argmax()) for x in contexts(50, 9)]
        assert picks == [best] * 50
    assert learner(kind).seen == 0
    assert turned.seen == 2 * 1500 * (3 if full else 1)


@pytest.mark.parametrize("kind", ["bandit", "full"])
def test_it_learns_which_queries_an_expert_is_good_at(kind: str) -> None:
    def truth(x: np.ndarray) -> np.ndarray:
        return np.array([0.9, 0.1, 0.0]) if x[1] > 0 else np.array([0.1, 0.9, 0.0])

    taught = learner(kind).learned(stream(truth, 3000, 3))
    base = np.full(3, 0.5, np.float32)
    clear = [x for x in contexts(200, 8) if abs(x[1]) > 0.3]
    right = [int(taught.quality(x, base)[0].argmax()) == int(x[1] < 0) for x in clear]
    assert np.mean(right) > 0.9


def test_an_expert_not_asked_for_long_becomes_uncertain_again() -> None:
    x, base = contexts(1)[0], np.full(3, 0.5, np.float32)
    only = [np.array(row, np.float32) for row in ([1, np.nan, np.nan], [np.nan, 1, np.nan])]
    first = learner("bandit").learned([Observed(x, base, only[0])] * 300)
    later = first.learned([Observed(x, base, only[1])] * 2000)
    fresh, known, forgotten = (one.quality(x, base)[1] for one in (learner("bandit"), first, later))
    assert fresh is not None
    assert known is not None
    assert forgotten is not None
    assert known[0] < forgotten[0] < fresh[0]
    assert forgotten[0] == pytest.approx(fresh[0], rel=0.2)


@pytest.mark.parametrize("kind", ["bandit", "full"])
def test_what_has_no_base_or_no_outcome_teaches_nothing(kind: str) -> None:
    nan = np.full(3, np.nan, np.float32)
    half = np.full(3, 0.5, np.float32)
    x = contexts(1)[0]
    taught = learner(kind).learned([Observed(x, nan, half), Observed(x, half, nan)])
    assert taught.seen == 0
    assert taught.quality(x, half)[0] == pytest.approx(half)


# --- the router ------------------------------------------------------------------------------

POOL = [expert("a", "the sea and the shore"), expert("b", "a proof of the theorem")]
TEXT = "waves on the sea"


def router(**settings: Any) -> OnlineRouter:
    return OnlineRouter.build(POOL, OnlineSettings(dim=8, **settings), WordEmbedder())


async def scored(one: OnlineRouter, text: str = TEXT) -> Any:
    return await one.score(Query(text), np.ones(2, np.bool_))


@pytest.mark.parametrize("kind", ["bandit", "full"])
async def test_a_decision_and_its_feedback_move_the_scores(kind: str) -> None:
    one = router(feedback=kind)
    first = await scored(one)
    noted = first.exploration.learning
    assert set(noted["base"]) == {"a", "b"}
    one.use(one.after([one.observed(noted, {"a": 0.0})] * 30))
    second = await scored(one)
    assert second.quality[0] < first.quality[0] - 0.1
    assert second.quality[1] == pytest.approx(first.quality[1], abs=1e-6)
    drawn = 0.2 if kind == "bandit" else 0.0
    assert (second.exploration.thompson, second.exploration.floor) == (drawn, 0.005)


async def test_a_decision_that_fails_leaves_nothing_running() -> None:
    """The base may be asking an LLM, in a call that takes a lease and costs."""
    one, ended = router(), list[str]()

    async def never(*_: Any) -> Any:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("base")

    async def fails(_: str) -> Any:
        await asyncio.sleep(0)  # so that both are under way
        raise RuntimeError("no embedding")

    one.base.score = never  # type: ignore[method-assign]
    one._embedder.embed = fails  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="no embedding"):
        await scored(one)
    assert ended == ["base"]


@pytest.mark.parametrize("kind", ["bandit", "full"])
async def test_a_kept_state_decides_the_same_to_the_last_bit(kind: str) -> None:
    one, other = router(feedback=kind), router(feedback=kind)
    noted = (await scored(one)).exploration.learning
    one.use(one.after([one.observed(noted, {"a": 0.3, "b": 1.0})] * 5))
    other.use(other.unpacked(one.packed(one.learner)))
    assert one.fingerprint == other.fingerprint
    for before, after in zip(
        one.learner.state().arrays.values(), other.learner.state().arrays.values(), strict=True
    ):
        assert np.array_equal(before, after)
    assert np.array_equal((await scored(one)).quality, (await scored(other)).quality)
    assert other.learner.seen == 10


async def test_a_state_is_taken_up_by_a_router_with_other_experts() -> None:
    one = router()
    noted = (await scored(one)).exploration.learning
    one.use(one.after([one.observed(noted, {"b": 0.0})] * 40))
    more = [expert("new", "cooking a soup"), *POOL[1:]]
    other = OnlineRouter.build(more, OnlineSettings(dim=8), WordEmbedder())
    other.use(other.unpacked(one.packed(one.learner)))
    learner = other.learner
    assert isinstance(learner, BanditLearner)
    assert not learner.gram[0].any()
    assert learner.gram[1].any()


def test_another_kind_of_state_or_context_is_refused() -> None:
    one, other = router(), router(feedback="full")
    assert one.fingerprint != other.fingerprint
    with pytest.raises(ValueError, match="not a state"):
        one.unpacked(other.packed(other.learner))
    with pytest.raises(ValueError, match="noted 2 numbers"):
        one.observed({"context": [1.0, 2.0]}, {"a": 1.0})


@pytest.mark.parametrize("cut", [0, 7, 8, 40, -1])
def test_a_state_that_is_cut_short_is_refused(cut: int) -> None:
    one = router()
    whole = one.packed(one.learner)
    with pytest.raises(ValueError):  # noqa: PT011  (json's own where not even the header is whole)
        one.unpacked(whole[:cut])


def test_a_state_that_names_more_experts_than_it_has_is_refused() -> None:
    one = router()
    state = one.learner.state()
    few = {name: array[:1] for name, array in state.arrays.items()}
    data = save_arrays(few, {"values": json.dumps(state.values)})
    with pytest.raises(ValueError, match="not a state"):
        one.unpacked(data)


def test_what_was_learnt_of_another_base_is_not_taken_up(tmp_path: Path) -> None:
    embedder = WordEmbedder()
    base = router().base

    def fingerprint(of: dict[str, Any]) -> str:
        return OnlineRouter(base, OnlineSettings.model_validate({"base": of}), embedder).fingerprint

    for folder, content in (("x", "1"), ("same", "1"), ("y", "2")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / MANIFEST).write_text(content)
    x, same, y = ({"artefact": tmp_path / folder} for folder in ("x", "same", "y"))
    named = x | {"names": {"a": "b"}}
    assert fingerprint(x) == fingerprint(same)
    assert len({fingerprint(of) for of in ({}, {"m": 3}, x, y, named)}) == 5


def test_a_policy_that_aims_by_a_curve_cannot_learn_online() -> None:
    with pytest.raises(ValueError, match="goes on learning; use"):
        OnlineRouter.check(POOL, OnlineSettings(), Demands(curve=True))


def test_all_that_is_wrong_with_it_is_told_at_once(tmp_path: Path) -> None:
    base = {"artefact": tmp_path / "gone", "shadow": {"artefact": tmp_path}, "draw": "distinct"}
    settings = OnlineSettings.model_validate({"base": base})
    with pytest.raises(Misfits) as told:
        OnlineRouter.check(POOL, settings, Demands(curve=True))
    says = ("goes on learning", "cannot have a `shadow`", "cannot `draw`", "no artefact in")
    assert len(told.value.errors) == len(says)
    for error, words in zip(told.value.errors, says, strict=True):
        assert words in str(error)


def test_the_base_is_told_by_its_settings() -> None:
    read = OnlineSettings.model_validate({"base": {"artefact": "x"}})
    assert read.base.model_fields_set == {"artefact"}
    assert OnlineSettings.model_validate({"base": {"m": 3}}).base.m == 3  # type: ignore[union-attr]
