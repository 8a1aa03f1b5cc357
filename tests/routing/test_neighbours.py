"""The retrieval router: its aggregates against brute force, and what must hold for any registry."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from composer.embedder import TextEmbedder
from composer.routing.aims import Aim
from composer.routing.base import Embedder, Query, Router
from composer.routing.choose import choose
from composer.routing.neighbours import NeighboursRouter, NeighboursSettings, Texts
from composer.types import Component, Expert, Policy
from tests.routing.helpers import WordEmbedder, clustered, expert, queries, router_of, unit

PLAIN = {"metric": "cosine"}
counts = st.lists(st.integers(0, 7), min_size=2, max_size=8).filter(lambda c: sum(map(bool, c)) > 1)


def build(experts: list[Expert], **changes: object) -> NeighboursRouter:
    return NeighboursRouter.build(experts, NeighboursSettings(**changes), WordEmbedder())


ANIMALS = [
    expert(
        "cats", "the cat purrs", "a cat sleeps", "cat food", description="cats", skills=["purr"]
    ),
    expert("dogs", "the dog barks", "a dog runs", "dog food", description="dogs", skills=["bark"]),
    expert("fish", "the fish swims", "a fish dives", "fish food"),
]


async def test_the_expert_whose_texts_are_near_wins_and_says_why() -> None:
    router = build(ANIMALS)
    found = await router.score(Query("my dog barks"), np.ones(3, np.bool_))
    assert found.experts == ("cats", "dogs", "fish")
    assert found.quality.argmax() == 1
    assert found.quality.shape == found.uncertainty.shape == (3,)
    assert next(iter(found.reasons)) == "dogs"
    assert found.reasons["dogs"]["nearest"] == "the dog barks"
    assert found.reasons["dogs"]["source"] == "examples"
    assert -1 <= found.reasons["dogs"]["similarity"] <= 1


def test_it_is_a_router_and_its_embedder_an_embedder() -> None:
    assert isinstance(WordEmbedder(), Embedder)
    router: type[Router] = NeighboursRouter
    assert router.name == "neighbours"


@pytest.mark.parametrize(
    ("aggregate", "changes"), [("max", {}), ("top_m", {"m": 3}), ("centroid", {}), ("blend", {})]
)
def test_aggregates_by_brute_force(aggregate: str, changes: dict[str, int]) -> None:
    chosen = NeighboursSettings(aggregate=aggregate, **PLAIN, **changes)  # type: ignore[arg-type]
    rows, texts = clustered([5, 1, 9, 2])
    x = queries(6)
    expected = np.empty((6, 4))
    for e in range(4):
        own = rows[texts.start[e] : texts.start[e + 1]]
        centroid = unit(own.mean(axis=0))
        for q in range(6):
            best = np.sort(own @ x[q])[::-1]
            expected[q, e] = {
                "max": best[0],
                "top_m": best[:3].mean(),
                "centroid": centroid @ x[q],
                "blend": 0.65 * best[:2].mean() + 0.35 * centroid @ x[q],
            }[aggregate]
    assert router_of(rows, texts, chosen).similarities(x) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("metric", ["cosine", "discriminant"])
@settings(max_examples=25, deadline=None)
@given(sizes=counts, excluded=st.integers(0, 7), seed=st.integers(0, 99))
def test_opting_out_changes_nothing_for_the_rest(
    metric: str, sizes: list[int], excluded: int, seed: int
) -> None:
    rows, texts = clustered(sizes, seed=seed)
    router = router_of(rows, texts, NeighboursSettings(metric=metric))  # type: ignore[arg-type]
    everyone = np.ones(len(sizes), np.bool_)
    some = everyone.copy()
    some[excluded % len(sizes)] = False
    for x in queries(3, seed=seed):
        whole, part = router._score_one(x, everyone), router._score_one(x, some)
        assert np.isnan(part.quality[~some]).all()
        assert np.array_equal(part.quality[some], whole.quality[some])
        assert f"e{excluded % len(sizes)}" not in part.reasons
        policy = Policy("p", Component("r", None), Component("s", None), router.experts, k=9)
        aim = Aim(0.0, np.zeros(len(sizes), np.float32))
        order = [e for e in choose(whole, aim, policy).calls if some[int(e[1:])]]
        assert list(choose(part, aim, policy).calls) == order


@settings(max_examples=25, deadline=None)
@given(sizes=counts, seed=st.integers(0, 99))
def test_the_order_of_experts_does_not_matter(sizes: list[int], seed: int) -> None:
    rows, texts = clustered(sizes, seed=seed)
    order = np.random.default_rng(seed).permutation(len(sizes))
    parts = [slice(texts.start[e], texts.start[e + 1]) for e in order]
    start = np.concatenate([[0], np.cumsum([sizes[e] for e in order])])
    shuffled = Texts(
        tuple(text for part in parts for text in texts.text[part]),
        tuple(source for part in parts for source in texts.source[part]),
        start,
    )
    x = queries(5, seed=seed)
    there = router_of(rows, texts).similarities(x)
    here = router_of(np.concatenate([rows[part] for part in parts]), shuffled).similarities(x)
    assert here == pytest.approx(there[:, order], abs=1e-4)


@settings(max_examples=25, deadline=None)
@given(sizes=counts, seed=st.integers(0, 99))
def test_quality_orders_experts_as_similarity_does(sizes: list[int], seed: int) -> None:
    rows, texts = clustered(sizes, seed=seed)
    router = router_of(rows, texts)
    x = queries(5, seed=seed)
    similarity, quality = router.similarities(x), router.score_embeddings(x)
    assert ((quality >= 0) & (quality <= 1)).all()
    order = np.argsort(-similarity, axis=1, kind="stable")
    assert (np.diff(np.take_along_axis(quality, order, axis=1), axis=1) <= 1e-6).all()


def test_queries_like_its_rows_are_sure_and_strangers_are_not() -> None:
    rows, texts = clustered([40] * 8, spread=0.5)
    fresh, _ = clustered([50] * 8, spread=0.5)  # the same centres, and the same noise at first
    router = router_of(rows, texts)
    known = router.score_embeddings(fresh).max(axis=1)
    strange = router.score_embeddings(queries(200, seed=5)).max(axis=1)
    assert np.median(known) > 0.9
    assert np.median(strange) < 0.3


def test_a_rebuild_embeds_only_what_is_new() -> None:
    encoder = WordEmbedder()
    encoder.backend, encoder.max_tokens = "onnx", 8  # type: ignore[attr-defined]
    embedder = TextEmbedder(encoder)  # type: ignore[arg-type]
    NeighboursRouter.build(ANIMALS, NeighboursSettings(), embedder)
    before = len(encoder.encoded)
    more = [*ANIMALS, expert("birds", "the bird sings", "bird food", "cat food")]
    NeighboursRouter.build(more, NeighboursSettings(), embedder)
    assert encoder.encoded[before:] == ["the bird sings", "bird food"]


# --- small and odd registries ----------------------------------------------------------


async def test_one_expert_alone_is_always_scored() -> None:
    for only in (ANIMALS[0], expert("mute")):
        found = await build([only]).score(Query("anything"), np.ones(1, np.bool_))
        assert np.isfinite(found.quality).all()
        assert np.isfinite(found.uncertainty).all()


async def test_an_expert_without_texts_is_never_preferred_and_never_nan() -> None:
    router = build([expert("mute"), *ANIMALS])
    found = await router.score(Query("a cat sleeps"), np.ones(4, np.bool_))
    assert found.quality.argmin() == 0
    assert found.quality[0] < 0.01
    alone = await router.score(Query("a cat"), np.array([True, False, False, False]))
    assert list(alone.reasons) == ["mute"]
    assert "nearest" not in alone.reasons["mute"]


def test_nobody_with_texts_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match="add examples or a description"):
        build([expert("a"), expert("b")])
    with pytest.raises(ValueError, match="none of the experts has any of skills"):
        build([expert("a", "x"), expert("b", "y")], sources=["skills"])


def test_one_description_each() -> None:
    router = build([expert(word, description=f"all about {word}") for word in ("red", "green")])
    x = WordEmbedder().encode(["green", "red"])
    assert np.array_equal(router.metric, np.eye(len(router.metric)))
    assert router.similarities(x).argmax(axis=1).tolist() == [1, 0]


def test_the_same_text_in_two_experts_is_right_for_both() -> None:
    shared = [f"shared {word}" for word in ("one", "two", "three", "four", "five", "six")]
    router = build([expert("a", *shared), expert("b", *shared), expert("c", "other things")])
    quality = router.score_embeddings(WordEmbedder().encode(["shared seven"]))[0]
    assert quality[0] == pytest.approx(quality[1], abs=1e-5)
    assert quality[0] > 5 * quality[2]


def test_texts_are_stripped_counted_once_and_blank_ones_left_out() -> None:
    one = expert("a", "x", " x ", "", "  ", description="x", skills=["y"])
    texts = Texts.of([one, expert("b", "x")], ("examples", "description", "skills"))
    assert texts.text == ("x", "y", "x")
    assert texts.source == ("examples", "skills", "examples")
    assert texts.start.tolist() == [0, 2, 3]


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("examples", ["the cat purrs", "a cat sleeps", "cat food"]),
        ("description", ["cats"]),
        ("skills", ["purr"]),
        ("name", ["cats"]),
    ],
)
def test_sources_say_which_texts_are_rows(source: str, wanted: list[str]) -> None:
    assert list(Texts.of(ANIMALS[:1], (source,)).text) == wanted  # type: ignore[arg-type]


def test_centroids_show_the_text_nearest_to_them() -> None:
    router = build(ANIMALS, aggregate="centroid", **PLAIN)
    found = router._score_one(WordEmbedder().encode(["dog"])[0], np.ones(3, np.bool_))
    assert found.reasons["dogs"]["nearest"] in (*ANIMALS[1].examples, "dogs", "bark")


def test_a_router_of_rows_has_no_reader() -> None:
    rows, texts = clustered([2, 2])
    with pytest.raises(ValueError, match="no embedder"):
        asyncio.run(router_of(rows, texts).score(Query("x"), np.ones(2, np.bool_)))


@pytest.mark.parametrize(
    "wrong", [{"m": 0}, {"pull": 1.5}, {"sources": []}, {"agregate": "max"}, {"metric": "l2"}]
)
def test_settings_refuse_what_they_do_not_know(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        NeighboursSettings(**wrong)  # type: ignore[arg-type]


def test_the_inverted_lists_choose_as_the_exact_index_does() -> None:
    rows, texts = clustered([20] * 300, spread=1.0, dim=48)
    exact = router_of(rows, texts, NeighboursSettings(index="flat"))
    lists = router_of(rows, texts, NeighboursSettings(index="ivf"))
    rng = np.random.default_rng(2)
    x = unit(rows[::20] + rng.standard_normal((300, 48)).astype(np.float32) * 0.05)
    agree = exact.similarities(x).argmax(axis=1) == lists.similarities(x).argmax(axis=1)
    assert agree.mean() >= 0.99
    found = lists._score_one(x[0], np.ones(300, np.bool_))
    assert next(iter(found.reasons)) == f"e{found.quality.argmax()}"
    assert found.reasons[f"e{found.quality.argmax()}"]["nearest"].startswith("row ")
