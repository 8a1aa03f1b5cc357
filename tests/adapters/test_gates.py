"""Gates against the formulas of their papers, and the stacked form against the loop it replaces."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from torch import Tensor
from torch.nn.functional import layer_norm

from composer.adapters.factors import Factors
from composer.adapters.gates.arrow import prototype
from composer.adapters.gates.projection import Normalise, Projection
from composer.adapters.gates.selection import Selection, Tsallis
from composer.adapters.gates.stacked import GatedLayer, Stacked


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def members(ranks: list[int], d_in: int = 9, d_out: int = 11) -> list[Factors | None]:
    return [
        Factors(normal(2 * i, r, d_in), normal(2 * i + 1, d_out, r), 0.5 + i) if r else None
        for i, r in enumerate(ranks)
    ]


@given(
    ranks=st.lists(st.integers(0, 4), min_size=1, max_size=5).filter(any),
    top_k=st.none() | st.integers(1, 6),
    normalise=st.sampled_from(["none", "absolute", "standardised"]),
)
@settings(deadline=None, max_examples=40)
def test_the_stacked_form_is_the_loop_over_members(
    ranks: list[int], top_k: int | None, normalise: Normalise
) -> None:
    own = members(ranks)
    x = normal(99, 2, 5, 9)
    gate = Projection.of(normal(7, len(ranks), 9), normalise)
    layer = GatedLayer(Stacked.of(own, torch.float32), gate, Selection(top_k=top_k))
    weights = layer.weights(x)
    loop = torch.zeros(2, 5, 11)
    for i, factors in enumerate(own):
        if factors is not None:
            loop += weights[..., i : i + 1] * (x @ factors.delta().T)
    assert torch.allclose(layer.delta(x), loop, atol=1e-4)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 5), atol=1e-5)


def test_phatgoose_is_the_product_of_two_layer_norms() -> None:
    x, v = normal(1, 6, 16) * 3 + 2, normal(2, 4, 16) + 1
    want = layer_norm(x, (16,)) @ layer_norm(v, (16,)).T / 16**0.5
    assert torch.allclose(Projection.of(v, "standardised").logits(x), want, atol=1e-4)


def test_top_two_is_the_softmax_of_the_two_kept() -> None:
    logits = normal(3, 8, 5)
    got = Selection(top_k=2).weights(logits)
    kept = logits.topk(2, dim=-1)
    want = torch.zeros_like(logits).scatter(-1, kept.indices, kept.values.softmax(-1))
    assert torch.allclose(got, want, atol=1e-6)


def test_arrow_does_not_care_which_way_a_prototype_points() -> None:
    x, v = normal(4, 6, 16), normal(5, 3, 16)
    turned = v * torch.tensor([[1.0], [-1.0], [-1.0]])
    chosen = Selection(top_k=2, temperature=0.7)
    one, other = (chosen.weights(Projection.of(w, "absolute").logits(x)) for w in (v, turned))
    assert torch.equal(one, other)


@given(rank=st.integers(1, 5), d_in=st.integers(1, 8), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_a_prototype_is_the_direction_moved_most(rank: int, d_in: int, seed: int) -> None:
    factors = Factors(normal(seed, rank, d_in), normal(seed + 1, 7, rank), 2.0)
    p = prototype(factors)
    delta = factors.delta()
    assert torch.allclose(p.norm(), torch.ones(()), atol=1e-5)
    most = torch.linalg.matrix_norm(delta, 2)
    assert torch.allclose((delta @ p).norm(), most, rtol=1e-4)


def test_the_prototype_of_an_adapter_that_does_nothing_is_no_direction() -> None:
    assert not prototype(Factors(normal(1, 2, 5), torch.zeros(4, 2))).any()


@given(seed=st.integers(0, 999), p=st.floats(0.05, 1), experts=st.integers(1, 6))
@settings(deadline=None, max_examples=60)
def test_top_p_keeps_the_fewest_that_reach_the_mass(seed: int, p: float, experts: int) -> None:
    logits = normal(seed, experts) * 2
    whole = logits.softmax(-1)
    got = Selection(top_p=p).weights(logits)
    kept = got > 0
    assert whole[kept].sum() >= p - 1e-5
    least = whole[kept].min()
    assert whole[kept].sum() - least < p  # without the last one it is not reached
    assert torch.allclose(got[kept], whole[kept] / whole[kept].sum(), atol=1e-5)


def test_the_null_expert_takes_its_share_to_nobody() -> None:
    logits = torch.tensor([[0.0, 0.0, 20.0], [20.0, 0.0, 0.0]])
    got = Selection(top_k=1, null=True).weights(logits)
    assert torch.allclose(got, torch.tensor([[0.0, 0.0], [1.0, 0.0]]))


def test_an_uncertain_token_is_routed_softly_and_a_certain_one_sparsely() -> None:
    chosen = Selection(top_k=1, tsallis=Tsallis(q=1.5, above=0.5))
    flat, sharp = torch.zeros(4), torch.tensor([9.0, 0, 0, 0])
    assert torch.allclose(chosen.weights(flat), torch.full((4,), 0.25))
    assert torch.allclose(chosen.weights(sharp), torch.tensor([1.0, 0, 0, 0]))


@pytest.mark.parametrize(
    ("model", "given"),
    [
        (Tsallis, {"q": 1}),
        (Tsallis, {"q": 1.0001}),
        (Tsallis, {"above": float("inf")}),
        (Selection, {"temperature": float("inf")}),
    ],
)
def test_a_selection_that_would_give_no_numbers_is_refused(
    model: type[BaseModel], given: dict[str, float]
) -> None:
    with pytest.raises(ValidationError):
        model.model_validate(given)


@pytest.mark.parametrize("q", [0.5, 1.001, 1.1, 2.0])
def test_no_entropy_is_above_that_of_equal_shares(q: float) -> None:
    most = Tsallis(q=q).highest(3)
    even = torch.zeros(3)
    soft = Selection(top_k=1, tsallis=Tsallis(q=q, above=most - 1e-3)).weights(even)
    assert torch.allclose(soft, torch.full((3,), 1 / 3))
    hard = Selection(top_k=1, tsallis=Tsallis(q=q, above=most + 1e-3)).weights(even)
    assert torch.equal(hard, torch.tensor([1.0, 0, 0]))


def test_members_of_two_bases_are_refused() -> None:
    odd = Factors(normal(0, 2, 8), normal(1, 11, 2))
    with pytest.raises(ValueError, match="one base"):
        Stacked.of([*members([2]), odd], torch.float32)
    with pytest.raises(ValueError, match="no member has factors"):
        Stacked.of([None], torch.float32)
