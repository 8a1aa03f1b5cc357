"""Twelve adapters on a real vLLM server with room for two in a batch: mixed requests through the
whole service, and what its order of serving them saves in loads."""

from __future__ import annotations

from pathlib import Path

from benchmarks.vllm_adapters import (
    MAX_CPU_LORAS,
    MAX_LORAS,
    NOISY,
    Ask,
    Side,
    asks,
    lru_misses,
    serving,
    shuffled,
)
from tests.vllm import python, vllm_marks

pytestmark = vllm_marks

EXPERTS = 12
REQUESTS = 300


async def test_300_mixed_requests_for_twelve_adapters(tmp_path: Path) -> None:
    asked = asks()
    mixed = shuffled(asked, seed=1)
    assert (len(asked), len({ask.expert for ask in asked})) == (REQUESTS, EXPERTS)
    async with serving(tmp_path, Path(python())) as bench:
        right = await bench.alone(asked)
        in_order = await bench.in_order(mixed)
        direct = await bench.direct(mixed)
        service = await bench.service(mixed)
    for side in (right, in_order, direct, service):
        print(side.row(1, right))
        assert len(side.answers) == REQUESTS
        assert side.failed == 0
        assert side.unlike(right) == []

    assert_adapters_differ(asked, right)

    # The counts are those of an LRU, but for calls that run side by side.
    expected = lru_misses(mixed, MAX_LORAS)
    assert abs(in_order.moved - expected) <= 0.1 * expected
    expected = lru_misses(mixed, MAX_CPU_LORAS)
    assert abs(in_order.read - expected) <= 0.1 * expected
    assert len(service.loads.moved) == EXPERTS

    assert service.read <= in_order.read / 2
    assert service.moved <= in_order.moved / 2


def assert_adapters_differ(asked: list[Ask], right: Side) -> None:
    """So that an answer by another adapter would show: the trained ones do what they have learnt,
    and those with noise answer the same questions otherwise."""
    learnt = [ask for ask in asked if ask.expert not in NOISY]
    assert sum(right.answers[ask.number] == ask.answer for ask in learnt) > 0.8 * len(learnt)
    for noisy, plain in NOISY.items():
        answers, others = (
            [right.answers[ask.number] for ask in asked if ask.expert == expert]
            for expert in (plain, noisy)
        )
        assert sum(a != b for a, b in zip(answers, others, strict=True)) >= 5
