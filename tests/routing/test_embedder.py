"""The embedder's batching, cache, cancellation and end, over an encoder that waits to be told."""

from __future__ import annotations

import asyncio
import threading
import tracemalloc
from collections.abc import AsyncIterator

import numpy as np
import pytest

from composer.embedder import BATCH, CHARS_PER_TOKEN, TextEmbedder
from composer.errors import EngineUnavailable
from tests.routing.helpers import GatedEncoder


@pytest.fixture
def encoder() -> GatedEncoder:
    return GatedEncoder()


@pytest.fixture
async def embedder(encoder: GatedEncoder) -> AsyncIterator[TextEmbedder]:
    made = TextEmbedder(encoder, cache_size=100)
    yield made
    encoder.gate.set()
    await made.close()


async def busy(encoder: GatedEncoder, embedder: TextEmbedder) -> asyncio.Task[object]:
    """The worker inside a batch of one text, and held there."""
    encoder.gate.clear()
    encoder.entered.clear()
    task: asyncio.Task[object] = asyncio.create_task(embedder.embed("first"))
    await asyncio.to_thread(encoder.entered.wait, 10)
    return task


async def test_a_text_alone_starts_at_once(encoder: GatedEncoder, embedder: TextEmbedder) -> None:
    vector = await embedder.embed("alone")
    assert encoder.batches == [["alone"]]
    assert vector.shape == (3,)
    assert np.linalg.norm(vector) == pytest.approx(1)


async def test_arrivals_while_busy_share_one_batch(
    encoder: GatedEncoder, embedder: TextEmbedder
) -> None:
    first = await busy(encoder, embedder)
    others = [asyncio.create_task(embedder.embed(f"text {i}")) for i in range(5)]
    await asyncio.sleep(0)
    encoder.gate.set()
    await asyncio.gather(first, *others)
    assert encoder.batches == [["first"], [f"text {i}" for i in range(5)]]


async def test_a_batch_is_bounded(encoder: GatedEncoder, embedder: TextEmbedder) -> None:
    first = await busy(encoder, embedder)
    others = [asyncio.create_task(embedder.embed(f"{i}")) for i in range(BATCH + 3)]
    await asyncio.sleep(0)
    encoder.gate.set()
    await asyncio.gather(first, *others)
    assert [len(batch) for batch in encoder.batches] == [1, BATCH, 3]


async def test_equal_texts_are_one_row_even_of_a_running_batch(
    encoder: GatedEncoder, embedder: TextEmbedder
) -> None:
    first = await busy(encoder, embedder)
    same = [asyncio.create_task(embedder.embed(text)) for text in ("first", "again", "again")]
    await asyncio.sleep(0)
    encoder.gate.set()
    vectors = await asyncio.gather(first, *same)
    assert encoder.batches == [["first"], ["again"]]
    assert np.array_equal(vectors[0], vectors[1])  # type: ignore[arg-type]


async def test_known_texts_cost_nothing(encoder: GatedEncoder, embedder: TextEmbedder) -> None:
    assert embedder.cached("text") is None
    vector = await embedder.embed("text")
    assert await embedder.embed("text") is vector
    assert embedder.cached("text") is vector
    assert len(encoder.batches) == 1
    with pytest.raises(ValueError, match="read-only"):
        vector[0] = 5


async def test_the_cache_forgets_the_least_recently_used(encoder: GatedEncoder) -> None:
    embedder = TextEmbedder(encoder, cache_size=2)
    for text in ("a", "b", "a", "c"):
        await embedder.embed(text)
    assert [embedder.cached(text) is not None for text in "abc"] == [True, False, True]
    await embedder.close()


async def test_without_a_cache_every_text_is_embedded(encoder: GatedEncoder) -> None:
    embedder = TextEmbedder(encoder, cache_size=0)
    await embedder.embed("a")
    await embedder.embed("a")
    assert encoder.batches == [["a"], ["a"]]
    await embedder.close()


async def test_one_caller_leaving_does_not_harm_the_others(
    encoder: GatedEncoder, embedder: TextEmbedder
) -> None:
    first = await busy(encoder, embedder)
    leaving, staying = (asyncio.create_task(embedder.embed("shared")) for _ in range(2))
    await asyncio.sleep(0)
    leaving.cancel()
    encoder.gate.set()
    assert (await staying).shape == (3,)
    with pytest.raises(asyncio.CancelledError):
        await leaving
    await first


async def test_a_text_nobody_waits_for_any_more_is_not_embedded(
    encoder: GatedEncoder, embedder: TextEmbedder
) -> None:
    first = await busy(encoder, embedder)
    leaving = [asyncio.create_task(embedder.embed("unwanted")) for _ in range(2)]
    await asyncio.sleep(0)
    for task in leaving:
        task.cancel()
    await asyncio.gather(*leaving, return_exceptions=True)
    encoder.gate.set()
    await first
    await embedder.embed("next")
    assert encoder.batches == [["first"], ["next"]]


async def test_an_error_reaches_every_caller_of_its_batch_and_no_other(
    encoder: GatedEncoder, embedder: TextEmbedder
) -> None:
    encoder.error = ValueError("broken")
    first = await busy(encoder, embedder)
    others = [asyncio.create_task(embedder.embed(text)) for text in ("a", "b", "b")]
    await asyncio.sleep(0)
    encoder.gate.set()
    results = await asyncio.gather(first, *others, return_exceptions=True)
    assert [str(result) for result in results] == ["broken"] * 4
    encoder.error = None
    assert (await embedder.embed("a")).shape == (3,)  # and it was not cached


async def test_the_event_loop_runs_on_meanwhile(
    encoder: GatedEncoder, embedder: TextEmbedder
) -> None:
    first = await busy(encoder, embedder)
    for _ in range(50):
        await asyncio.sleep(0)
    assert not first.done()
    encoder.gate.set()
    await first


def test_event_loops_may_follow_each_other(encoder: GatedEncoder) -> None:
    embedder = TextEmbedder(encoder)
    for text in ("a", "b"):
        asyncio.run(embedder.embed(text))
    asyncio.run(embedder.close())
    assert encoder.batches == [["a"], ["b"]]


async def test_closing_fails_those_who_wait_and_those_who_come(
    encoder: GatedEncoder, embedder: TextEmbedder
) -> None:
    first = await busy(encoder, embedder)
    waiting = asyncio.create_task(embedder.embed("waiting"))
    await asyncio.sleep(0)
    closing = asyncio.create_task(embedder.close())
    with pytest.raises(EngineUnavailable, match="closed"):
        await waiting
    encoder.gate.set()
    await closing
    await first  # what already ran is still answered
    with pytest.raises(EngineUnavailable, match="closed"):
        await embedder.embed("late")
    await embedder.close()
    assert not any(t.name.startswith("embedder") for t in threading.enumerate() if t.is_alive())


async def test_no_more_of_a_text_is_read_than_the_model_can_use(
    encoder: GatedEncoder, embedder: TextEmbedder
) -> None:
    most = CHARS_PER_TOKEN * encoder.max_tokens
    vector = await embedder.embed("x" * most + "a tail")
    embedder.encode(["y" * (most + 1), "y" * (most + 2), "y" * (most - 1)])
    assert encoder.batches == [["x" * most], ["y" * most, "y" * (most - 1)]]
    assert embedder.cached("x" * most + "another tail") is vector
    assert await embedder.embed("x" * most) is vector
    assert embedder.count_tokens(["x " * 5 * most]) == [5 * most + 2]  # of the whole text


async def test_what_is_kept_of_a_text_does_not_grow_with_it(encoder: GatedEncoder) -> None:
    encoder.max_tokens = 10_000
    embedder = TextEmbedder(encoder)
    tracemalloc.start()
    for i in range(5):
        await embedder.embed(f"{i}" * 100_000)
        embedder.encode([f"{i}" * 100_000])
    encoder.batches.clear()
    await embedder.embed("nothing")  # the worker lets go of its last batch
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 100_000  # one text alone would be as much
    await embedder.close()


async def test_a_text_that_is_no_unicode_has_a_vector_too(embedder: TextEmbedder) -> None:
    vector = await embedder.embed("\ud800")
    assert embedder.cached("\ud800") is vector
    assert embedder.cached("\ud801") is None


def test_rows_are_embedded_once_and_kept_apart_from_queries(encoder: GatedEncoder) -> None:
    embedder = TextEmbedder(encoder, cache_size=1)
    first = embedder.encode(["a", "bb", "a"])
    again = embedder.encode(["bb", "ccc"])
    assert encoder.batches == [["a", "bb"], ["ccc"]]
    assert np.array_equal(first[1], again[0])
    assert embedder.cached("a") is None
    assert embedder.encode([]).shape == (0, 3)
