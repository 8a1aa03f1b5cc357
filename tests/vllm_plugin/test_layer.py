"""The packed layer that vLLM runs against the layers that it packs, one by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from composer.adapters.factors import Factors
from composer.adapters.gates.files import GatedModule, gated_layer
from composer.adapters.gates.projection import Normalise, Projection
from composer.adapters.gates.selection import Selection
from composer.adapters.gates.stacked import GatedLayer, Stacked
from composer.vllm_plugin.layer import GatedLinear, Part
from tests.vllm_gates import SETTINGS

D_IN = 12


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain(
    ranks: tuple[int, ...], width: int, seed: int, normalise: Normalise, selection: Selection
) -> GatedLayer:
    members = [
        Factors(normal(seed + 2 * i, r, D_IN), normal(seed + 2 * i + 1, width, r) / 4)
        if r
        else None
        for i, r in enumerate(ranks)
    ]
    outs = len(ranks) + selection.null
    rows = Projection.of(normal(seed + 50, outs, D_IN), normalise).rows
    stacked = Stacked.of(members, torch.float32)
    return gated_layer(stacked, rows, normal(seed + 51, outs) / 4, normalise, selection)


def packed(
    layers: list[GatedLayer | int], normalise: Normalise, dtype: torch.dtype = torch.float32
) -> GatedLinear:
    """An int is the width of a module without a gate."""
    parts = [
        Part(one, None)
        if isinstance(one, int)
        else Part(
            one.stacked.b.shape[0], GatedModule(ranks=one.stacked.ranks, selection=one.selection)
        )
        for one in layers
    ]
    made = GatedLinear(D_IN, parts, normalise, dtype, selection=Selection(top_k=1))
    for index, one in enumerate(one for one in layers if not isinstance(one, int)):
        made.fill(index, "a", one.stacked.a)
        made.fill(index, "b", one.stacked.b)
        made.fill(index, "rows", one.projection.rows)
        assert one.projection.bias is not None
        made.fill(index, "bias", one.projection.bias.masked_fill(one.projection.bias.isinf(), 0))
    return made


def expected(layers: list[GatedLayer | int], x: Tensor, out: Tensor) -> Tensor:
    deltas = [
        torch.zeros(*x.shape[:-1], one) if isinstance(one, int) else one.delta(x) for one in layers
    ]
    return out + torch.cat(deltas, dim=-1)


ranks = st.lists(st.integers(0, 3), min_size=4, max_size=4).filter(any).map(tuple)


@given(
    q=ranks,
    v=ranks,
    kinds=st.tuples(*[st.sampled_from(sorted(SETTINGS))] * 2),
    normalise=st.sampled_from(["none", "absolute", "standardised"]),
    between=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_a_packed_layer_is_its_modules_side_by_side(
    q: tuple[int, ...],
    v: tuple[int, ...],
    kinds: tuple[str, str],
    normalise: Normalise,
    between: bool,
) -> None:
    first = plain(q, 7, 100, normalise, SETTINGS[kinds[0]][1])
    last = plain(v, 5, 200, normalise, SETTINGS[kinds[1]][1])
    layers: list[GatedLayer | int] = [first, 3, last] if between else [first, last]
    x, out = normal(1, 6, D_IN), normal(2, 6, 12 + 3 * between)
    got = packed(layers, normalise)(x, out.clone())
    torch.testing.assert_close(got, expected(layers, x, out), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", sorted(SETTINGS))
def test_gates_stay_in_float32_where_the_model_does_not(kind: str) -> None:
    """In bfloat16 the members are weighed as a float32 gate weighs them."""
    normalise, selection = SETTINGS[kind]
    layer = plain((2, 2, 0, 2), 9, 300, normalise, selection)
    x = normal(3, 64, D_IN).bfloat16()
    made = packed([layer], normalise, torch.bfloat16)
    assert made.rows is not None
    weights = made.weights(made.rows.times(x.float()), x)
    torch.testing.assert_close(weights, layer.weights(x), atol=1e-6, rtol=1e-5)
    got = made(x, torch.zeros(64, 9, dtype=torch.bfloat16)).float()
    torch.testing.assert_close(got, layer.delta(x.float()), atol=0.1, rtol=0.05)


def test_where_the_base_alone_is_likeliest_nothing_is_added() -> None:
    layer = plain((2, 2, 2, 2), 9, 300, "none", Selection(top_k=1, null=True))
    assert layer.projection.bias is not None
    layer.projection.bias[-1] = 1e6
    x, out = normal(4, 16, D_IN), normal(5, 16, 9)
    assert torch.equal(packed([layer], "none")(x, out.clone()), out)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(SETTINGS))
def test_it_compiles_whole_for_any_number_of_tokens(kind: str) -> None:
    normalise, selection = SETTINGS[kind]
    layers: list[GatedLayer | int] = [
        plain((2, 0, 3, 2), 7, 100, normalise, selection),
        plain((2, 2, 2, 2), 5, 200, normalise, selection),
    ]
    made = packed(layers, normalise)
    torch.compiler.reset()  # one code object for all kinds, and a limit on how often it is compiled
    compiled = torch.compile(made, fullgraph=True, dynamic=True)
    for tokens in (1, 2, 7, 33):
        x, out = normal(1, tokens, D_IN), normal(2, tokens, 12)
        got = compiled(x, out.clone())
        torch.testing.assert_close(got, expected(layers, x, out), atol=1e-4, rtol=1e-4)
