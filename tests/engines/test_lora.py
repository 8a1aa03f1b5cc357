"""Stacked LoRA against peft's own mixed batches, layer for layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from transformers import DynamicCache, LlamaForCausalLM

from composer.engines.gated import Use
from composer.engines.local import EmbeddedSettings
from composer.engines.model import LocalModel, adapter_name
from composer.errors import EngineError
from composer.types import Adapter
from tests.engines.conftest import save_adapter


@pytest.fixture(scope="module")
def many(
    base: Path, adapters: tuple[Adapter, ...], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Adapter, ...]:
    """The four, one with rank-stabilised scaling, one that also adapts the
    embeddings, and one whose rank and alpha differ by module."""
    folder = tmp_path_factory.mktemp("more")
    return (
        *adapters,
        save_adapter(base, folder / "rs", 5, use_rslora=True),
        save_adapter(base, folder / "emb", 6, target_modules=["embed_tokens", "q_proj"]),
        save_adapter(
            base, folder / "pat", 7, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}
        ),
    )


@pytest.fixture(scope="module")
def ours(base: Path, many: tuple[Adapter, ...]) -> LocalModel:
    model = LocalModel(EmbeddedSettings(model=str(base)))
    model.load(many)
    return model


@pytest.fixture(scope="module")
def theirs(base: Path, many: tuple[Adapter, ...]) -> PeftModel:
    model: PeftModel | None = None
    for adapter in many:
        name = adapter_name(adapter.digest)
        if model is None:
            llama = LlamaForCausalLM.from_pretrained(base)
            model = PeftModel.from_pretrained(llama, adapter.path, name)
        else:
            model.load_adapter(adapter.path, name)
    assert model is not None
    return model.eval()


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rows=st.lists(st.integers(-1, 5), min_size=1, max_size=10))
@torch.inference_mode()
def test_logits_are_those_of_peft(
    ours: LocalModel, theirs: PeftModel, many: tuple[Adapter, ...], rows: list[int]
) -> None:
    torch.manual_seed(len(rows))
    width = 7
    ids = torch.randint(2, 90, (len(rows), width))
    digests = [None if row < 0 else many[row].digest for row in rows]
    found = ours.forward(
        ids,
        lengths=torch.full((len(rows),), width),
        positions=torch.arange(width).expand(len(rows), -1),
        cache=DynamicCache(),
        uses=[Use(digest) for digest in digests],
    ).logits
    names = ["__base__" if digest is None else adapter_name(digest) for digest in digests]
    expected = theirs(input_ids=ids, adapter_names=names).logits[:, -1]
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))


def test_weights_are_held_once(ours: LocalModel, many: tuple[Adapter, ...]) -> None:
    """What peft keeps are views into the stacks, so a second adapter costs its own size alone."""
    layer = next(
        m for n, m in ours._base.named_modules() if n.endswith("layers.0.self_attn.q_proj")
    )
    weights = [layer.lora_A[name].weight for name in layer.lora_A]
    assert len(weights) == 6  # all but the one that adapts other modules
    assert len({w.untyped_storage().data_ptr() for w in weights}) == 1


def test_a_model_that_regroups_rows_is_refused_rather_than_wrong(
    ours: LocalModel, many: tuple[Adapter, ...]
) -> None:
    """Mixture-of-experts layers flatten rows; then no row can be given its adapter."""
    ours._lora.assign([adapter_name(many[0].digest), "__base__"], ours.device)
    layer = next(
        m for n, m in ours._base.named_modules() if n.endswith("layers.0.self_attn.q_proj")
    )
    with pytest.raises(ValueError, match="sees 14 rows of a batch of 2"):
        layer(torch.zeros(14, 1, 32))


def test_a_batch_names_only_loaded_adapters(base: Path, many: tuple[Adapter, ...]) -> None:
    model = LocalModel(EmbeddedSettings(model=str(base)))
    with pytest.raises(EngineError, match="cannot be loaded"):
        model.load([Adapter(base, "sha256:0", 4, 4.0, ())])
    assert model.digests == frozenset()
