"""The head of a vote: what it computes, when nothing can change its outcome, and its file."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composer.strategies.vote import Vote, VoteSettings
from composer.strategies.voting.head import DOUBTS, STATE, TIE, Groups, Head, log_odds_of
from composer.strategies.voting.learnt import HeadFile, HeadRule, Stop
from tests.strategies.test_strategies import Experts
from tests.strategies.test_waves import rated, told

MOST = 4
small = st.floats(-2, 2, allow_nan=False).map(lambda x: round(x, 3))


@st.composite
def heads(draw: st.DrawFn) -> Head:
    return Head(
        follow=draw(st.floats(0.02, 2)),
        best=draw(small),
        agreement=np.array([draw(small) for _ in range(MOST - 1)]),
        none=np.array([draw(small) for _ in range(DOUBTS)]),
        gain=np.array([[draw(small) for _ in range(STATE + 1)] for _ in range(MOST - 1)]),
    )


answers = st.lists(st.sampled_from([-1, 0, 1, 2]), min_size=1, max_size=MOST)
odds = st.lists(st.floats(-4, 4), min_size=MOST, max_size=MOST)


def after(given_: list[int], log_odds: list[float]) -> Groups:
    return Groups.of(np.array([given_]), np.array([log_odds[: len(given_)]]))


@given(heads(), answers, odds)
def test_probabilities_sum_to_one(head: Head, given_: list[int], log_odds: list[float]) -> None:
    p, none = head.posterior(after(given_, log_odds))
    assert p.sum() + none[0] == pytest.approx(1)
    assert (p >= 0).all()
    assert (p[0] > 0).sum() <= len(set(given_) - {-1})


@given(heads(), answers, odds, st.randoms())
def test_the_order_of_all_but_the_best_does_not_matter(
    head: Head, given_: list[int], log_odds: list[float], chance: Any
) -> None:
    order = list(range(1, len(given_)))
    chance.shuffle(order)
    order = [0, *order]
    p, none = head.posterior(after(given_, log_odds))
    q, other = head.posterior(after([given_[i] for i in order], [log_odds[i] for i in order]))
    assert none == pytest.approx(other)
    assert sorted(p[0]) == pytest.approx(sorted(q[0]))


@given(heads(), answers, odds)
def test_what_an_answer_is_called_does_not_matter(
    head: Head, given_: list[int], log_odds: list[float]
) -> None:
    renamed = [-1 if a < 0 else 7 - a for a in given_]
    one, other = head.posterior(after(given_, log_odds)), head.posterior(after(renamed, log_odds))
    assert np.array_equal(one[0], other[0])
    assert np.array_equal(one[1], other[1])


def test_a_posterior_by_hand() -> None:
    head = Head(0.5, 0.25, np.array([1.0, 2.0]), np.array([0.1, 0, 0, 0.2, 0, 0]), np.zeros((2, 9)))
    groups = Groups.of(np.array([[4, 2, 4]]), np.array([[1.0, 0.4, -0.2]]))
    scores = np.array([0.5 * 0.8 + 1.0 + 0.25, 0.5 * 0.4])
    none = 0.1 + 0.2 * np.log(2)
    total = np.exp(scores).sum() + np.exp(none)
    p, left = head.posterior(groups)
    assert p[0] == pytest.approx([np.exp(scores[0]) / total, np.exp(scores[1]) / total, 0])
    assert left[0] == pytest.approx(np.exp(none) / total)


@settings(max_examples=60)
@given(heads(), odds, st.lists(st.sampled_from(["a", "b", None]), min_size=1, max_size=MOST))
def test_settled_is_exact(head: Head, log_odds: list[float], said: list[str | None]) -> None:
    """Against every way in which the others could answer, new answers included."""
    rule = HeadRule(head, log_odds_of(1 / (1 + np.exp(-np.array(log_odds)))), 0.0)
    keys = dict(enumerate(said))
    open_ranks = range(len(said), MOST)
    if not any(said):
        assert not rule.settled(keys, open_ranks)
        return
    now = said[rule.winner(keys)]
    outcomes = set()
    near = False
    for more in product(["a", "b", "c", "d", "e", None], repeat=len(open_ranks)):
        full = {**keys, **dict(zip(open_ranks, more, strict=True))}
        outcomes.add(full[rule.winner(full)])
        scores = np.sort(head.scores(rule._groups(full))[0])
        near |= bool(scores[-1] - scores[-2] < 2 * TIE)
    if rule.settled(keys, open_ranks):
        assert outcomes == {now}
    elif not near:
        assert outcomes != {now}


# --- the file ---------------------------------------------------------------------------


@given(heads(), st.lists(st.floats(-4, 4), min_size=MOST, max_size=MOST))
def test_a_call_that_was_cut_short_is_no_abstention(head: Head, log_odds: list[float]) -> None:
    """Who was quick does not tell: 0 and 3 agree, and the others were not heard to their end."""
    rule = HeadRule(head, log_odds_of(1 / (1 + np.exp(-np.array(log_odds)))), 0.0)
    cut = {0: "a", 3: "a"}
    two = HeadRule(head, log_odds_of(1 / (1 + np.exp(-np.array(log_odds)[[0, 3]]))), 0.0)
    assert rule.probability(cut) == pytest.approx(two.probability({0: "a", 1: "a"}))
    assert rule.winner({3: "a", 2: "b", 0: None}) in (2, 3)
    assert rule.winner({3: "a", 1: None}) == 3


def file_of(head: Head, **changed: Any) -> HeadFile:
    stops = tuple(
        Stop(calls=calls, bound=bound, accuracy=0.5)
        for calls, bound in ((2.0, 0.2), (3.0, 0.1), (4.0, -0.1))
    )
    rest: dict[str, Any] = {
        "experts": ("e0", "e1", "e2", "e3"),
        "extractor": "exact",
        "curves": {1: (Stop(calls=1.0, bound=0.4, accuracy=0.4), *stops), 2: stops},
    }
    return HeadFile.of(head, **{**rest, **changed})


@given(heads())
def test_a_file_gives_the_same_head_back(head: Head) -> None:
    again = HeadFile.model_validate_json(file_of(head).text()).head
    assert (again.follow, again.best) == (head.follow, head.best)
    for part in ("agreement", "none", "gain"):
        assert np.array_equal(getattr(again, part), getattr(head, part))


def plain(constant_gain: float = 0.0) -> Head:
    gain = np.zeros((MOST - 1, STATE + 1))
    gain[:, -1] = constant_gain
    return Head(1.0, 0.0, np.array([0.5, 0.7, 0.8]), np.zeros(DOUBTS), gain)


@pytest.fixture
def head_at(tmp_path: Path) -> Any:
    def write(file: HeadFile) -> Path:
        path = tmp_path / "head.json"
        path.write_text(file.text())
        return path

    return write


async def test_a_head_stops_where_little_is_to_be_gained(head_at: Any) -> None:
    ask = Experts({"e0": "a", "e1": "b", "e2": "a", "e3": "c"})
    gain = plain().gain
    gain[:, 5] = -1.0  # all agree: nothing to gain
    gain[:, -1] = 0.15
    path = head_at(file_of(Head(1.0, 0.0, np.array([0.5, 0.7, 0.8]), np.zeros(DOUBTS), gain)))
    text, details = await told(ask, rated(0.6, 0.55, 0.5, 0.5), head=path, first=2, mean_calls=2.5)
    assert ask.asked == ["e0", "e1"]  # the bound is .15: between .2 and .1
    text, details = await told(ask, rated(0.6, 0.55, 0.5, 0.5), head=path, first=2, mean_calls=3)
    assert text == "a"
    assert 0 < details["probability"] < 1


async def test_it_agrees_with_its_arrays(head_at: Any) -> None:
    head = plain(0.0)
    head.gain[:, 0] = -0.3  # of the leader's probability
    head.gain[:, -1] = 0.2
    quality = (0.7, 0.6, 0.5, 0.4)
    said = ["a", "b", "b", None]
    answers_ = {f"e{i}": s or " " for i, s in enumerate(said)}
    for bound in (-1.0, 0.0, 0.05, 0.1):
        log_odds = log_odds_of(np.array(quality))[None]
        numbers = np.array([[0, 1, 1, -1]])
        k = 1
        while (
            k < MOST
            and head.expected_gain(Groups.of(numbers[:, :k], log_odds[:, :k]), log_odds[:, k])[0]
            >= bound
        ):
            k += 1
        groups = Groups.of(numbers[:, :k], log_odds[:, :k])
        ask = Experts(dict(answers_))
        path = head_at(file_of(head))
        text, details = await told(ask, rated(*quality), head=path, first=1, bound=bound)
        assert text == said[int(head.posterior(groups)[0][0].argmax())]
        if details["stopped"] != "cannot_change":
            assert details["asked"] == k
            expected = float(head.posterior(groups)[0].max())
            assert details["probability"] == pytest.approx(expected, abs=1e-4)


async def test_no_more_are_asked_than_it_was_fitted_for(head_at: Any) -> None:
    ask = Experts({f"e{i}": f"a{i}" for i in range(6)})
    names = {"e4": "e3", "e5": "e3"}
    settings_: dict[str, Any] = {"head": head_at(file_of(plain())), "names": names}
    _, details = await told(ask, rated(0.6, *[0.5] * 5), **settings_)
    assert (len(ask.asked), details["asked"]) == (MOST, MOST)


@pytest.mark.parametrize(
    ("experts", "wanted", "message"),
    [
        (["e0", "x"], {}, "not fitted for 'x'; .* give its name there in `names`"),
        (["e0"], {"extractor": "number"}, "compared otherwise; write `extractor: exact`"),
        (["e0"], {"first": 2, "mean_calls": 1.5}, "the least is 2.00.; raise `mean_calls`"),
    ],
)
def test_a_head_for_others_is_refused(
    head_at: Any, experts: list[str], wanted: dict[str, Any], message: str
) -> None:
    own = VoteSettings(head=head_at(file_of(plain())), **wanted)
    with pytest.raises(ValueError, match=message):
        Vote.check_experts(own, experts, MOST)


def test_mean_calls_hold_with_as_many_as_the_head_may_ask(head_at: Any) -> None:
    path, experts = head_at(file_of(plain())), ["e0", "e1", "e2", "e3"]
    wanted = VoteSettings(head=path, first=2, mean_calls=2.5)
    Vote.check_experts(wanted, experts, MOST)
    for few, k in ((experts, MOST - 1), (experts[:-1], MOST)):
        with pytest.raises(ValueError, match=r"up to 4 experts .* at most 3 are; set the policy's"):
            Vote.check_experts(wanted, few, k)
    Vote.check_experts(VoteSettings(head=path, first=2, bound=0.1), experts, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no head at .*; make one with `router-training votes"),
        ("{", "is no head of a vote .*; make it again"),
        ('{"format": 2}', "is no head of a vote .format"),
        (file_of(plain()).text().replace('"gain"', '"gains"'), "is no head of a vote"),
    ],
)
def test_a_broken_file_is_told(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "head.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Vote.check_experts(VoteSettings(head=path), ["e0"], 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"bound": 0.1},
        {"mean_calls": 3},
        {"head": "h.json", "weights": "majority"},
        {"head": "h.json", "bound": 0.1},
        {"head": "h.json", "first": 2, "bound": 0.1, "mean_calls": 3},
        {"head": "h.json", "first": 2, "step": 2, "mean_calls": 3},
    ],
)
def test_settings_that_contradict_each_other_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="; "):
        VoteSettings(**wrong)
