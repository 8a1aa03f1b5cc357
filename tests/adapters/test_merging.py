"""Ways of merging against what they promise, on small random adapters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from composer.adapters.factors import Factors, Modules
from composer.adapters.merging import METHODS
from composer.adapters.merging.arithmetic import Arithmetic, ArithmeticSettings
from composer.adapters.merging.base import Weights
from composer.adapters.merging.cat import Cat, CatSettings
from composer.adapters.merging.lego import Lego, LegoSettings
from composer.adapters.merging.subtraction import subtracted
from composer.adapters.merging.svd import Svd, SvdSettings
from composer.adapters.merging.truncation import spectrum, truncated
from composer.adapters.merging.twin import Twin, TwinSettings

SHAPES = {"up": (12, 7), "down": (7, 12)}


def adapter(seed: int, rank: int = 3, modules: Sequence[str] = ("up", "down")) -> Modules:
    make = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make)

    return {
        m: Factors(normal(rank, SHAPES[m][1]), normal(SHAPES[m][0], rank), 0.5 + seed % 3)
        for m in modules
    }


def total(members: Sequence[Modules], weights: Sequence[float], module: str) -> Tensor:
    parts = zip(members, weights, strict=True)
    return sum((w * m[module].delta() for m, w in parts if module in m), torch.zeros(()))


def near(got: Modules, want: Mapping[str, Tensor], tolerance: float = 1e-5) -> None:
    assert got.keys() == want.keys()
    for module, tensor in want.items():
        assert torch.allclose(got[module].delta(), tensor, atol=tolerance, rtol=tolerance), module


@given(
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    weights=st.lists(st.floats(-2, 2).map(lambda w: round(w, 3)), min_size=4, max_size=4),
)
@settings(deadline=None, max_examples=40)
def test_cat_is_the_weighted_sum(ranks: list[int], weights: list[float]) -> None:
    own = [w or 1.0 for w in weights[: len(ranks)]]
    members = [adapter(seed, rank) for seed, rank in enumerate(ranks)]
    merged = Cat.merge(members, Weights(tuple(own)), CatSettings()).modules
    near(merged, {m: total(members, own, m) for m in SHAPES})
    assert merged["up"].rank == sum(ranks)


def test_a_module_may_be_missing_in_some_and_have_weights_of_its_own() -> None:
    members = [adapter(0), adapter(1, modules=["up"])]
    weights = Weights((1.0, 0.5), {"up": (0.25, 2.0)})
    merged = Cat.merge(members, weights, CatSettings()).modules
    near(
        merged,
        {"up": total(members, (0.25, 2.0), "up"), "down": members[0]["down"].delta()},
    )


def test_subtraction_is_that_of_the_products_and_not_pefts() -> None:
    skill, general = adapter(0), adapter(1)  # of scales 0.5 and 1.5
    want = {m: skill[m].delta() - general[m].delta() for m in SHAPES}
    near(subtracted(skill, general), want, 1e-6)
    near(Cat.merge([skill, general], Weights((1.0, -1.0)), CatSettings()).modules, want, 1e-6)
    # peft's `use_gks`, which subtracts A and B apart, is off by more than what is wanted itself:
    # it has the cross terms −(B A_g + B_g A), and adds what it should take away (+B_g A_g).
    alike = {m: Factors(f.a, f.b, 0.5) for m, f in general.items()}
    for module, own in skill.items():
        other = alike[module]
        exact = own.delta() - other.delta()
        apart = 0.5 * (own.b - other.b) @ (own.a - other.a)
        wrong = 2 * other.delta() - 0.5 * (own.b @ other.a + other.b @ own.a)
        assert torch.allclose(apart - exact, wrong, atol=1e-5)
        assert float((apart - exact).norm() / exact.norm()) > 1


@given(rank=st.integers(1, 6), own=st.integers(1, 9))
@settings(deadline=None, max_examples=30)
def test_truncation_is_the_best_of_its_rank(rank: int, own: int) -> None:
    factors = adapter(own, own)["up"]
    cut, kept = truncated(factors, rank)
    u, sigma, vt = torch.linalg.svd(factors.delta().double(), full_matrices=False)
    best = (u[:, :rank] * sigma[:rank]) @ vt[:rank]
    assert torch.allclose(cut.delta().double(), best, atol=1e-4)
    share = float(sigma[:rank].square().sum() / sigma.square().sum())
    assert kept == pytest.approx(share if own > rank else 1.0, abs=1e-5)
    assert torch.allclose(spectrum(factors)[1][: min(own, 7)], sigma[: min(own, 7)], atol=1e-4)


def test_svd_reports_what_it_kept() -> None:
    members = [adapter(0), adapter(1)]
    merged = Svd.merge(members, Weights((1.0, 1.0)), SvdSettings(rank=2))
    assert {f.rank for f in merged.modules.values()} == {2}
    lost = []
    for module in SHAPES:
        whole = total(members, (1, 1), module)
        off = whole - merged.modules[module].delta()
        lost.append(float(off.square().sum() / whole.square().sum()))
    assert 1 - merged.report["energy"] == pytest.approx(max(lost), abs=1e-4)


def test_linear_is_not_the_weighted_sum_but_has_the_cross_terms() -> None:
    members = [adapter(3), adapter(6)]  # of scale 0.5
    got = Arithmetic.merge(members, Weights((0.7, 0.3)), ArithmeticSettings()).modules["up"]
    one, two = (member["up"] for member in members)
    scale = 0.5
    cross = scale * (0.7 * 0.3) ** 0.5 * (one.b @ two.a + two.b @ one.a)
    exact = total(members, (0.7, 0.3), "up")
    assert torch.allclose(got.delta(), exact + cross, atol=1e-5)
    assert float((got.delta() - exact).norm() / exact.norm()) > 0.3


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(7, 12, bias=False)
        self.down = torch.nn.Linear(12, 7, bias=False)


def same_draws() -> Callable[[Tensor], Tensor]:
    """In place of `torch.bernoulli`: the n-th draw of a shape is always the same, whatever else is
    drawn between, and in whatever order modules are merged."""
    turns: Counter[tuple[int, ...]] = Counter()

    def drawn(share: Tensor) -> Tensor:
        turns[tuple(share.shape)] += 1
        seed = 100 * turns[tuple(share.shape)] + share.shape[0]
        draws = torch.rand(share.shape, generator=torch.Generator().manual_seed(seed))
        return (draws < share).to(share.dtype)

    return drawn


@pytest.mark.parametrize("kind", ["linear", "ties", "magnitude_prune", "dare_linear", "dare_ties"])
def test_arithmetic_on_factors_is_pefts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    members = [adapter(3), adapter(6)]
    config = LoraConfig(r=3, lora_alpha=1.5, target_modules=["up", "down"])
    model: Any = get_peft_model(Small(), config, "m0")  # type: ignore[arg-type]
    assert isinstance(model, PeftModel)
    model.add_adapter("m1", config)
    for number, member in enumerate(members):
        for module, factors in member.items():
            layer: Any = getattr(model.base_model.model, module)
            layer.lora_A[f"m{number}"].weight.data = factors.a
            layer.lora_B[f"m{number}"].weight.data = factors.b
    more = {} if kind == "linear" else {"density": 0.5}
    monkeypatch.setattr(torch, "bernoulli", same_draws())
    model.base_model.add_weighted_adapter(
        ["m0", "m1"], [0.7, -0.3], "merged", combination_type=kind, **more
    )
    chosen = ArithmeticSettings.model_validate({"kind": kind, **more})
    monkeypatch.setattr(torch, "bernoulli", same_draws())
    got = Arithmetic.merge(members, Weights((0.7, -0.3)), chosen).modules
    for module in SHAPES:
        layer = getattr(model.base_model.model, module)
        scale = layer.scaling["merged"]
        want = scale * layer.lora_B["merged"].weight @ layer.lora_A["merged"].weight
        assert torch.allclose(got[module].delta(), want, atol=1e-5)
        assert float(want.norm()) > 0.1


@given(density=st.floats(0.1, 0.95), seed=st.integers(0, 2**32), weight=st.floats(0.25, 2))
@settings(deadline=None, max_examples=40)
def test_dare_keeps_its_share_and_scales_it_to_the_same_mean(
    density: float, seed: int, weight: float
) -> None:
    """Of each number either nothing or 1 / density of it (DARE, section 3.2), by its own seed."""
    make = torch.Generator().manual_seed(7)
    size = 40
    factors = Factors(torch.eye(size), 1 + torch.rand(size, size, generator=make))
    chosen = ArithmeticSettings(
        kind="dare_linear", density=density, of="product", rank=size, seed=seed
    )
    got, again, other = (
        Arithmetic.merge([{"up": factors}], Weights((weight,)), one).modules["up"].delta()
        for one in (chosen, chosen, chosen.model_copy(update={"seed": seed + 1}))
    )
    assert torch.equal(got, again)
    assert not torch.equal(got, other)
    whole = weight * factors.delta()
    kept = got.abs() > 0.5 * whole
    assert torch.allclose(got, torch.where(kept, whole / density, 0.0), atol=1e-3, rtol=1e-3)
    # Five standard deviations of so many draws: 6e-7 of the examples fail by chance.
    spread = 5 * (density * (1 - density)) ** 0.5 / size
    assert abs(float(kept.float().mean()) - density) < spread
    assert abs(float((got.sum() / whole.sum()) - 1)) < 1.1 * spread / density


def test_arithmetic_on_the_product_forms_no_cross_terms() -> None:
    members = [adapter(0, 2), adapter(1, 4)]  # ranks may differ
    chosen = ArithmeticSettings(of="product", rank=6)
    merged = Arithmetic.merge(members, Weights((0.7, 0.3)), chosen)
    near(merged.modules, {m: total(members, (0.7, 0.3), m) for m in SHAPES}, 1e-4)
    assert merged.report["energy"] == pytest.approx(1)


def test_breadcrumbs_drops_the_largest_and_the_smallest() -> None:
    a = torch.arange(1.0, 11.0).reshape(1, 10)
    members = [{"up": Factors(a, torch.ones(1, 1))}]
    chosen = ArithmeticSettings(kind="breadcrumbs", density=0.5, outliers=0.2, of="product", rank=1)
    got = Arithmetic.merge(members, Weights((1.0,)), chosen).modules["up"].delta()
    assert torch.allclose(got, torch.tensor([[0, 0, 0, 4, 5, 6, 7, 8, 0, 0.0]]), atol=1e-5)


def test_lego_with_a_cluster_for_each_unit_is_cat_rescaled() -> None:
    members = [adapter(0, 2), adapter(1, 2)]
    merged = Lego.merge(members, Weights((1.0, 0.5)), LegoSettings(rank=4)).modules
    want = {m: total(members, (1.0, 0.5), m) * (2 / 4) ** 0.5 for m in SHAPES}
    near(merged, want, 1e-4)


def test_lego_keeps_the_norm_of_units_that_are_alike() -> None:
    one = adapter(0, 1)
    merged = Lego.merge([one, one, one], Weights((1.0, 1.0, 1.0)), LegoSettings(rank=1)).modules
    near(merged, {m: one[m].delta() for m in SHAPES}, 1e-4)


def test_twin_with_whole_own_parts_is_shared_and_weighed_rests() -> None:
    members = [adapter(0, 2), adapter(1, 2)]
    merged = Twin.merge(members, Weights((0.8, 0.0)), TwinSettings(shared=0.3, rank=7))
    want = {}
    for m in SHAPES:
        shared = total(members, (0.3, 0.3), m)
        want[m] = shared + 0.8 * (members[0][m].delta() - shared)
    near(merged.modules, want, 1e-4)
    assert merged.report["energy"] == pytest.approx(1)
    cut = Twin.merge(members, Weights((0.8, 0.2)), TwinSettings(shared=0.3, rank=1))
    assert 0 < cut.energy == cut.report["energy"] < 1


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_deterministic_and_refuses_what_cannot_be_merged(name: str) -> None:
    method = METHODS[name]
    chosen = method.settings()
    members = [adapter(0), adapter(1)]
    weights = Weights((0.6, 0.4))
    once, again = (method.merge(members, weights, chosen).modules for _ in range(2))
    for module in once:
        assert torch.equal(once[module].a, again[module].a)
        assert torch.equal(once[module].b, again[module].b)
    wider = {"up": Factors(torch.ones(3, 8), torch.ones(12, 3))}
    with pytest.raises(ValueError, match="up is"):
        method.merge([members[0], wider], weights, chosen)
    with pytest.raises(ValueError, match="weights for 2 adapters"):
        method.merge(members, Weights((1.0,)), chosen)
    if name != "twin":  # what the members share has a weight of its own
        with pytest.raises(ValueError, match="every weight is 0"):
            method.merge(members, Weights((0.0, 0.0)), chosen)


def test_factors_of_different_ranks_are_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match="of: product"):
        Arithmetic.merge([adapter(0, 2), adapter(1, 4)], Weights((1, 1)), ArithmeticSettings())
