"""Rows of every kind in one batch, number by number: against each row alone, and for gates as
training makes them against hooks on the plain model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from composer.adapters.gates.files import Gate, write_gate
from composer.adapters.gates.groups import RANGES, grouped
from composer.adapters.gates.hooks import Installed
from composer.adapters.gates.prior import prior
from composer.adapters.gates.stacked import GatedLayer
from composer.adapters.gates.verify import verify_gate
from composer.adapters.gates.xlora import features
from composer.engines.batch import Batch
from composer.engines.gated import Use
from composer.engines.local import EmbeddedSettings
from composer.engines.model import LocalModel
from composer.types import Adapter
from examples.tiny import experts
from router_training.gates.kinds import KINDS
from router_training.gates.making import make
from tests.engines.conftest import QUERY, save_adapter, save_base
from tests.gated import EVERYTHING, save_gate
from tests.router_training.test_gates import QUICK, bench, embed

PLAIN_QUERY = "uppercase fox"
Choice = tuple[int, int]
"""What a row runs on, and its prompt's length."""


@pytest.fixture(scope="module")
def model(
    base: Path,
    adapters: tuple[Adapter, ...],
    gates: dict[str, Adapter],
) -> LocalModel:
    model = LocalModel(EmbeddedSettings(model=str(base)))
    model.load([*adapters, *gates.values()])
    return model


def uses_of(model: LocalModel, adapters: Sequence[Adapter]) -> list[Use]:
    uses = [Use()]
    for adapter in adapters:
        gate = model._gates.gate(adapter.digest) if adapter.gate is not None else None
        known = prior(gate, QUERY) if gate is not None and gate.manifest.per_request else None
        uses.append(Use(adapter.digest, known))
    return uses


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.lists(st.tuples(st.integers(0, 6), st.integers(1, 9)), min_size=1, max_size=8),
    late=st.lists(st.tuples(st.integers(0, 6), st.integers(1, 9)), min_size=1, max_size=3),
    data=st.data(),
)
def test_a_row_is_what_it_is_alone(
    model: LocalModel,
    adapters: tuple[Adapter, ...],
    gates: dict[str, Adapter],
    rows: list[Choice],
    late: list[Choice],
    data: st.DataObject,
) -> None:
    """Rows that begin together, of which some leave while others join, some of these twice."""
    uses = uses_of(model, [*adapters[:2], *gates.values()])

    def prompt(length: int) -> list[int]:
        return [(5 * n) % 90 + 2 for n in range(length)]

    def alone(choice: Choice, tokens: Sequence[int]) -> list[Tensor]:
        batch = Batch(model)
        first = batch.prefill([prompt(choice[1])], [uses[choice[0]]]).logits
        return [first[0], *(batch.step([token]).logits[0] for token in tokens)]

    def same(found: Tensor, expected: Tensor) -> None:
        assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))

    batch = Batch(model)
    begun = batch.prefill([prompt(n) for _, n in rows], [uses[u] for u, _ in rows]).logits
    first = batch.step([5] * len(rows)).logits
    for i, choice in enumerate(rows):
        expected = alone(choice, [5])
        same(begun[i], expected[0])
        same(first[i], expected[1])

    stays = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    batch.keep([i for i, stay in enumerate(stays) if stay])
    new = Batch(model)
    new.prefill([prompt(n) for _, n in late], [uses[u] for u, _ in late])
    copies = data.draw(st.lists(st.integers(0, 2), min_size=len(late), max_size=len(late)))
    batch.join(new, copies)
    left = [(choice, [5, 9]) for choice, stay in zip(rows, stays, strict=True) if stay]
    left += [(c, [9]) for c, n in zip(late, copies, strict=True) for _ in range(n)]
    if left:
        last = batch.step([9] * len(left)).logits
        for row, (choice, tokens) in zip(last, left, strict=True):
            same(row, alone(choice, tokens)[-1])


@cache
def small() -> tuple[Any, Any]:
    model, tokenizer = experts.load_base("small")
    return model, tokenizer


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_what_training_makes_is_served_as_it_was_trained(kind: str, tmp_path: Path) -> None:
    made = make(kind, bench(), QUICK if KINDS[kind].trained else {})
    write_gate(tmp_path, made)
    adapter = verify_gate(tmp_path, None, features=EVERYTHING)
    plain, tokenizer = small()
    ids = tokenizer(f"{PLAIN_QUERY}<|answer|>", return_tensors="pt").input_ids
    known = prior(made, embed([PLAIN_QUERY])[0].tolist()) if made.manifest.per_request else None
    with torch.inference_mode():
        hidden = plain.get_decoder()(ids).last_hidden_state
        read = features(made, hidden) if made.manifest.passes == 2 else None

        def weigh(module: str, layer: GatedLayer, x: Tensor) -> Tensor:
            return layer.weights(x if read is None else read, known)

        with Installed(plain, made.layers, weigh):
            expected = plain(ids).logits[0]
        served = LocalModel(EmbeddedSettings(model=str(experts.base_folder("small"))))
        served.load([adapter])
        batch = Batch(served)
        tokens = ids[0].tolist()
        found = [batch.prefill([tokens[:3]], [Use(adapter.digest, known)]).logits[0]]
        found += [batch.step([token]).logits[0] for token in tokens[3:]]
    scale = float(expected.abs().max())
    assert torch.allclose(torch.stack(found), expected[2:], atol=1e-5 * scale)


def test_gates_stay_in_float32_where_the_model_is_in_half_precision(
    base: Path, adapters: tuple[Adapter, ...], tmp_path: Path
) -> None:
    half = LocalModel(EmbeddedSettings(model=str(base), dtype="bfloat16"))
    gate = save_gate(tmp_path / "gate", {"a": adapters[0].path, "b": adapters[1].path})
    half.load([adapters[0], gate])
    loaded: Gate = half._gates.gate(gate.digest)
    for layer in loaded.layers.values():
        assert layer.stacked.a.dtype == layer.stacked.b.dtype == torch.bfloat16
        assert layer.projection.rows.dtype == torch.float32
    uses = [Use(), Use(adapters[0].digest), Use(gate.digest)]
    logits = Batch(half).prefill([[5, 6, 7]] * 3, uses).logits
    assert logits.isfinite().all()
    assert len({tuple(row.tolist()) for row in logits}) == 3


def test_a_model_that_regroups_rows_is_refused_rather_than_wrong(
    model: LocalModel,
    gates: dict[str, Adapter],
) -> None:
    model._gates.assign(
        [Use(gates["arrow"].digest), Use()], torch.ones(2, 1, dtype=torch.bool), None, model.device
    )
    layer = model._base.get_submodule("model.layers.0.self_attn.q_proj")
    with pytest.raises(ValueError, match="sees 14 rows of a batch of 2"):
        layer(torch.zeros(14, 1, 32))


@given(layers=st.sets(st.integers(0, 90), min_size=1, max_size=40))
def test_ranges_of_layers_part_the_modules(layers: set[int]) -> None:
    names = frozenset(
        f"model.layers.{layer}.{part}" for layer in layers for part in ("self_attn.q", "mlp.up")
    )
    groups = grouped(names | {"lm_head"}, "layers")
    assert sum(groups.sizes) == len(names)
    assert "lm_head" not in groups.of
    assert len(groups.names) == 2 * min(RANGES, len(layers))
    assert max(groups.sizes) - min(groups.sizes) <= 1
    first = [int(name.split()[1].rstrip(",").split("-")[0]) for name in groups.names]
    assert first == sorted(first)
    whole = grouped(names, "all")
    assert (whole.names, whole.sizes) == (("all",), (len(names),))


def test_the_head_may_be_gated(base: Path, tmp_path: Path) -> None:
    """It sees the last token alone, in a first pass's features too, and is told of in no group."""
    untied = save_base(tmp_path / "base", tie_word_embeddings=False)
    own = save_adapter(untied, tmp_path / "a", 3, target_modules=["lm_head", "q_proj"])
    other = save_adapter(untied, tmp_path / "b", 4, target_modules=["lm_head", "q_proj"])
    members = {"a": own.path, "b": other.path}
    gate = save_gate(
        tmp_path / "gate", members, kind="xlora", seed=2, normalise="none", width=32, passes=2
    )
    model = LocalModel(EmbeddedSettings(model=str(untied)))
    model.load([gate])
    use = Use(gate.digest, groups=grouped(frozenset(model._gates.gate(gate.digest).layers), "all"))
    batch = Batch(model)
    output = batch.prefill([[5, 6, 7, 8], [9, 10]], [use, Use()])
    (told, nothing) = output.gates
    assert nothing is None
    assert told is not None
    assert told.shape == (4, 1, 2)
    assert torch.allclose(told.sum(-1), torch.ones(4, 1))
    short = Batch(model)
    short.prefill([[5, 6]], [use])
    stepped = [short.step([token]).logits[0] for token in (7, 8)]
    assert torch.allclose(stepped[-1], output.logits[0], atol=1e-4)
