"""Gates made of adapters alone, in a small model: held to peft, to the formulas, and to what they
were before a member came or went."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import ArrowConfig, PeftModel
from peft.tuners.lora import create_arrow_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from composer.adapters.factors import Factors, Lora, read_lora, write_lora
from composer.adapters.gates.build import without
from composer.adapters.gates.files import Gate, read_gate, write_gate
from composer.adapters.gates.hooks import Installed
from composer.adapters.gates.stacked import GatedLayer
from composer.adapters.gates.untrained import arrow, arrow_joined, fixed
from composer.adapters.merging.base import Weights
from composer.adapters.merging.cat import Cat
from composer.adapters.merging.subtraction import less, subtracted

WIDTH, HIDDEN, RANK = 16, 24, 3
SHAPES = {"self_attn.q_proj": (WIDTH, WIDTH), "mlp.down_proj": (WIDTH, HIDDEN)}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def adapter(seed: int, rank: int = RANK, modules: tuple[str, ...] = tuple(SHAPES)) -> Lora:
    """With a singular value far above the others: peft finds prototypes by 15 power iterations,
    which are exact for such alone."""
    falling = torch.tensor([0.2**i for i in range(rank)])
    made = {}
    for layer in range(2):
        for j, name in enumerate(modules):
            outs, ins = SHAPES[name]
            at = 1000 * seed + 10 * layer + j
            a = torch.linalg.qr(normal(at, ins, rank)).Q.T
            b = torch.linalg.qr(normal(at + 5, outs, rank)).Q * falling * 2
            made[f"model.layers.{layer}.{name}"] = Factors(a.contiguous(), b.contiguous())
    return Lora(made, "test/base", f"sha256:{seed}")


MEMBERS = {name: adapter(seed) for seed, name in enumerate("wxyz")}
IDS = torch.arange(40).reshape(4, 10) % 30


def logits(gate: Gate) -> Tensor:
    model = base()
    with Installed(model, gate.layers):
        out: Tensor = model(input_ids=IDS).logits
    return out


def saved(folder: Path, lora: Lora) -> str:
    folder.mkdir()
    write_lora(folder, lora)
    return str(folder)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_peft_and_we_agree_on_arrow(tmp_path: Path, top_k: int) -> None:
    paths = [saved(tmp_path / name, lora) for name, lora in MEMBERS.items()]
    config = ArrowConfig(top_k=top_k, router_temperature=0.5)
    theirs = create_arrow_model(base(), paths, config)(input_ids=IDS).logits
    ours = logits(arrow(MEMBERS, top_k=top_k, temperature=0.5))
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(ours, base()(input_ids=IDS).logits, atol=1e-2)


def test_a_uniform_gate_is_the_exact_mean_of_its_members(tmp_path: Path) -> None:
    weights = Weights((0.25,) * 4)
    merged = Cat.merge([lora.modules for lora in MEMBERS.values()], weights, Cat.settings())
    folder = saved(tmp_path / "cat", Lora(merged.modules, "test/base"))
    theirs = PeftModel.from_pretrained(base(), folder)(input_ids=IDS).logits
    assert torch.allclose(logits(fixed(MEMBERS)), theirs, atol=1e-5)


def test_given_weights_are_made_to_add_up_to_one() -> None:
    layer = next(iter(fixed(MEMBERS, (1, 2, 3, 4)).layers.values()))
    got = layer.weights(normal(3, 5, layer.stacked.a.shape[1]))
    assert torch.allclose(got, torch.tensor([0.1, 0.2, 0.3, 0.4]).expand(5, 4))
    with pytest.raises(ValueError, match="above 0"):
        fixed(MEMBERS, (1, 0, 1, 1))


def test_one_hot_weights_are_that_adapter(tmp_path: Path) -> None:
    """What X-LoRA's second pass does when its classifier is sure (as any two-pass gate)."""
    model, gate = base(), arrow(MEMBERS)
    for at, (name, lora) in enumerate(MEMBERS.items()):
        peft = PeftModel.from_pretrained(base(), saved(tmp_path / name, lora))
        only = torch.eye(len(MEMBERS))[at].expand(*IDS.shape, -1)

        def weigh(module: str, layer: GatedLayer, x: Tensor, only: Tensor = only) -> Tensor:
            return only

        with Installed(model, gate.layers, weigh):
            ours = model(input_ids=IDS).logits
        assert torch.allclose(ours, peft(input_ids=IDS).logits, atol=1e-5)


def test_a_removed_gate_leaves_the_model_as_it_was() -> None:
    model = base()
    before = model(input_ids=IDS).logits
    with Installed(model, arrow(MEMBERS).layers) as installed:
        assert not torch.equal(model(input_ids=IDS).logits, before)
        installed.weigh = None
        assert torch.equal(model(input_ids=IDS).logits, before)
    assert torch.equal(model(input_ids=IDS).logits, before)


def test_general_knowledge_is_subtracted_exactly() -> None:
    own, general = MEMBERS["w"], adapter(9, rank=2)
    for module, factors in subtracted(own.modules, general.modules).items():
        want = own.modules[module].delta() - general.modules[module].delta()
        assert torch.allclose(factors.delta(), want, atol=1e-6)
        assert factors.rank == RANK + 2
        apart = (own.modules[module].b[:, :2] - general.modules[module].b) @ (
            own.modules[module].a[:2] - general.modules[module].a
        )
        assert not torch.allclose(apart, want, atol=1e-2)  # factor by factor is another matrix


def test_arrow_points_where_the_subtracted_adapter_does() -> None:
    general = adapter(9)
    plain = arrow({name: less(lora, general) for name, lora in MEMBERS.items()})
    gate = arrow(MEMBERS, general=general)
    assert gate.manifest.settings["general"] == "sha256:9"
    for module, layer in gate.layers.items():
        assert torch.equal(layer.projection.rows, plain.layers[module].projection.rows)


def test_members_of_other_ranks_and_modules_are_mixed(tmp_path: Path) -> None:
    mixed = {"a": adapter(1, rank=1), "b": adapter(2, modules=("mlp.down_proj",))}
    gate = arrow(mixed, top_k=1)
    write_gate(tmp_path, gate)
    assert torch.equal(logits(read_gate(tmp_path)), logits(gate))
    alone = gate.layers["model.layers.0.self_attn.q_proj"]
    assert alone.stacked.ranks == (1, 0)
    assert torch.equal(alone.weights(normal(0, 3, WIDTH))[:, 1], torch.zeros(3))


@pytest.mark.parametrize("gone", "wxyz")
def test_who_leaves_leaves_the_rest_bit_for_bit(tmp_path: Path, gone: str) -> None:
    rest = {name: lora for name, lora in MEMBERS.items() if name != gone}
    left, fresh = without(arrow(MEMBERS), gone), arrow(rest)
    assert left.members == fresh.members
    (tmp_path / "left").mkdir()
    (tmp_path / "fresh").mkdir()
    assert write_gate(tmp_path / "left", left) == write_gate(tmp_path / "fresh", fresh)


def test_who_joins_leaves_the_rest_bit_for_bit(tmp_path: Path) -> None:
    some = {name: MEMBERS[name] for name in "wxy"}
    grown, fresh = arrow_joined(arrow(some), "z", MEMBERS["z"]), arrow(MEMBERS)
    (tmp_path / "grown").mkdir()
    (tmp_path / "fresh").mkdir()
    assert write_gate(tmp_path / "grown", grown) == write_gate(tmp_path / "fresh", fresh)


def test_a_module_that_only_the_new_member_has_is_gated_too() -> None:
    some = {
        "a": adapter(1, modules=("mlp.down_proj",)),
        "b": adapter(2, modules=("mlp.down_proj",)),
    }
    new = adapter(3)
    grown, fresh = arrow_joined(arrow(some), "c", new), arrow({**some, "c": new})
    assert torch.allclose(logits(grown), logits(fresh), atol=1e-6)
    assert torch.equal(logits(without(grown, "c")), logits(arrow(some)))


@pytest.mark.parametrize(
    ("name", "base_name", "told"),
    [("w", "test/base", "is a member already"), ("v", "other/base", "adapters of one base model")],
)
def test_who_cannot_join_is_refused(name: str, base_name: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        arrow_joined(arrow(MEMBERS), name, Lora(adapter(5).modules, base_name, "sha256:5"))


def test_who_cannot_leave_is_refused() -> None:
    with pytest.raises(ValueError, match="its members are w, x, y, z"):
        without(arrow(MEMBERS), "v")
    with pytest.raises(ValueError, match="only member"):
        without(arrow({"w": MEMBERS["w"]}), "w")


def test_another_model_is_refused() -> None:
    wide = {
        "w": Lora({"model.layers.0.mlp.down_proj": Factors(normal(0, 2, 7), normal(1, 5, 2))}, "")
    }
    with pytest.raises(ValueError, match="use the gate's own base model"):
        Installed(base(), fixed(wide).layers)


def test_scales_are_folded_without_rounding(tmp_path: Path) -> None:
    half = {m: Factors(f.a.bfloat16(), f.b.bfloat16(), 0.3) for m, f in adapter(1).modules.items()}
    lora = Lora(half, "test/base", "sha256:1")
    for module, layer in fixed({"a": lora}).layers.items():
        assert torch.equal(layer.stacked.b, half[module].b.float() * 0.3)
    folder = tmp_path / "w"
    saved(folder, Lora({m: f.times(2 / 0.3) for m, f in half.items()}, "test/base"))
    again = fixed({"a": read_lora(folder)})
    assert next(iter(again.layers.values())).stacked.b.dtype == torch.bfloat16
