"""Draws: whole-array, row by row independent, with the right frequencies."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from composer.engines.sampling import Knobs, sample, top_logprobs


def knobs(rows: int, temperature: float, top_p: float, uniform: torch.Tensor) -> Knobs:
    return Knobs(torch.full((rows,), temperature), torch.full((rows,), top_p), uniform)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.7)])
def test_frequencies_are_the_distribution(temperature: float, top_p: float) -> None:
    logits = torch.tensor([2.0, -1.0, 1.0, 0.0, 1.5])
    n = 20_000
    uniform = (torch.arange(n) + 0.5) / n  # every quantile once
    drawn = sample(logits.expand(n, -1), knobs(n, temperature, top_p, uniform))
    expected = torch.softmax(logits / temperature, 0)
    if top_p < 1:
        order = expected.argsort(descending=True)
        mass = expected[order].cumsum(0)
        outside = order[mass - expected[order] >= top_p]
        expected[outside] = 0
        expected /= expected.sum()
    found = torch.bincount(drawn, minlength=5) / n
    assert torch.allclose(found, expected, atol=2 / n)


@settings(deadline=None)
@given(st.data())
def test_a_row_does_not_see_its_neighbours(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 6))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    logits = torch.randn(rows, 9) * 3
    unit = st.floats(0, 1, exclude_max=True, width=32)
    temperature = torch.tensor(
        [data.draw(st.sampled_from([0.0, 1e-6, 0.7, 2.0])) for _ in range(rows)]
    )
    top_p = torch.tensor([data.draw(st.sampled_from([0.0, 0.3, 0.9, 1.0])) for _ in range(rows)])
    uniform = torch.tensor([data.draw(unit) for _ in range(rows)])
    together = sample(logits, Knobs(temperature, top_p, uniform))
    alone = [
        int(
            sample(logits[i : i + 1], Knobs(temperature[i, None], top_p[i, None], uniform[i, None]))
        )
        for i in range(rows)
    ]
    assert together.tolist() == alone


def test_zero_temperature_and_empty_nucleus_are_greedy() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]]).expand(2, -1)
    made = sample(
        logits,
        Knobs(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]), torch.tensor([0.99, 0.99])),
    )
    assert made.tolist() == [1, 1]


def test_a_token_of_no_probability_is_never_drawn() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf]]).expand(3, -1)
    ends = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    for top_p in (1.0, 0.5):
        assert sample(logits, knobs(3, 1.0, top_p, ends)).tolist() == [1, 1, 1]


def test_logprobs_are_of_the_untempered_distribution() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    chosen, best, ids = top_logprobs(logits, torch.tensor([0]), 2)
    reference = torch.log_softmax(logits, -1)[0]
    assert chosen.tolist() == pytest.approx([float(reference[0])])
    assert ids.tolist() == [[2, 1]]
    assert best.tolist()[0] == pytest.approx([float(reference[2]), float(reference[1])])
