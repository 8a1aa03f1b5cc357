"""Adapters compressed for storage: written, restored, refused, and served from a registry."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from composer.adapters.compression import PROVENANCE, compress_folder, expand
from composer.adapters.factors import Factors, read_lora, write_lora
from composer.adapters.files import CARD, TERNARY, WEIGHTS
from composer.adapters.ternary import compress, restored
from composer.cli import app
from composer.errors import AdapterError
from tests.tiny import ASKED, TINY, chat, registry, serving

REVERSE = TINY / "experts" / "large" / "reverse"


def test_an_adapter_is_compressed_with_what_was_lost_and_expanded_once(tmp_path: Path) -> None:
    made = compress_folder(REVERSE, tmp_path / "small", density=0.3, alpha=1.5)
    lora = read_lora(REVERSE)
    folder = expand(tmp_path / "small", tmp_path / "cache")
    served = read_lora(folder)
    assert (made.original, made.adapter) == (lora.digest, served.digest)
    assert served.base == lora.base
    assert served.dtype == lora.dtype
    assert served.modules.keys() == lora.modules.keys()
    away = total = 0.0
    for module, factors in lora.modules.items():
        want = factors.delta()
        away += float((served.modules[module].delta() - want).square().sum())
        total += float(want.square().sum())
    assert made.error == pytest.approx((away / total) ** 0.5, rel=1e-3)

    small = tmp_path / "small" / TERNARY
    assert made.bytes_after == small.stat().st_size
    assert made.ratio == (REVERSE / WEIGHTS).stat().st_size / small.stat().st_size > 3
    told = json.loads((tmp_path / "small" / PROVENANCE).read_text())
    assert told["original"] == lora.digest
    assert (tmp_path / "small" / CARD).read_bytes() == (REVERSE / CARD).read_bytes()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["cache", "small"]

    written = (folder / WEIGHTS).stat().st_mtime_ns
    assert expand(tmp_path / "small", tmp_path / "cache") == folder
    assert (folder / WEIGHTS).stat().st_mtime_ns == written
    (folder / WEIGHTS).write_bytes(b"damaged")
    again = expand(tmp_path / "small", tmp_path / "cache")
    assert (again, read_lora(again).digest) == (folder, made.adapter)
    with pytest.raises(AdapterError, match="there is something of this name already"):
        compress_folder(REVERSE, tmp_path / "small")


def test_of_a_factor_of_real_size_two_bits_a_number_are_left(tmp_path: Path) -> None:
    torch.manual_seed(0)
    lora = read_lora(REVERSE)
    wide = Factors(torch.randn(16, 2048), torch.randn(2048, 16), 1.0)
    (tmp_path / "wide").mkdir()
    made = type(lora)({"model.layers.0.self_attn.q_proj": wide}, lora.base)
    write_lora(tmp_path / "wide", made, dtype=torch.float16)
    told = compress_folder(tmp_path / "wide", tmp_path / "small")
    assert told.ratio == pytest.approx(8, rel=0.05)


def spoil(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if name.endswith(".A.shape"))
    tensors[name] = torch.tensor([2**20, 2**20])


def halve(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(name for name in tensors if name.endswith(".B.signs"))]


@pytest.mark.parametrize("damage", [spoil, halve])
def test_a_damaged_one_is_refused_before_memory_is_taken(tmp_path: Path, damage: Any) -> None:
    compress_folder(REVERSE, tmp_path / "small")
    file = tmp_path / "small" / TERNARY
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file, metadata={"base": "null", "dtype": "float32"})
    with pytest.raises(AdapterError, match="it cannot be read"):
        expand(tmp_path / "small", tmp_path / "cache")
    with pytest.raises((ValueError, KeyError)):
        restored(tensors, None)


def run(*words: str) -> Any:
    return CliRunner().invoke(app, [*words], env={"COLUMNS": "200"})


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_by_default_their_size_is_the_nearest(tmp_path: Path, density: float) -> None:
    lora = read_lora(REVERSE)
    near = restored(compress(lora, density=density), None)
    for module, factors in lora.modules.items():
        a, back = factors.a.float(), near.modules[module].a
        for other in (0.95, 1.05):
            assert (a - back).norm() <= (a - other * back).norm()


def test_the_commands_compress_and_expand(tmp_path: Path) -> None:
    small = str(tmp_path / "small")
    told = run("compress", str(REVERSE), "--out", small, "--density", "0.3", "--json")
    assert told.exit_code == 0, told.output
    made = json.loads(told.stdout)
    assert made["ratio"] > 3
    expanded = run("expand", small, "--out", str(tmp_path / "full"))
    assert read_lora(Path(expanded.stdout.strip())).digest == made["adapter"]
    for words, message in {
        ("compress", str(REVERSE), "--out", f"{small}2", "--density", "0"): "density is 0.0",
        ("compress", str(REVERSE), "--out", f"{small}2", "--alpha", "-1"): "--alpha is -1.0",
        ("expand", str(REVERSE), "--out", small): f"holds no {TERNARY}",
    }.items():
        refused = run(*words)
        assert refused.exit_code == 1
        assert message in refused.output
    assert not (tmp_path / "small2").exists()


async def test_a_registry_serves_a_compressed_adapter_as_an_ordinary_one(tmp_path: Path) -> None:
    made = compress_folder(REVERSE, tmp_path / "small")
    data = yaml.safe_load(registry("uppercase", "reverse"))
    data["experts"]["reverse"] |= {"adapter": str(tmp_path / "small"), "digest": made.adapter}
    roots = (TINY, tmp_path)
    async with serving(
        tmp_path, yaml.safe_dump(data), adapter_roots=roots, cache_dir=tmp_path / "cache"
    ) as (client, service):
        question, right = ASKED["reverse"]
        answer = (await client.post("/v1/chat/completions", json=chat(question))).json()
        assert answer["composer"]["expert"] == "reverse"
        assert answer["choices"][0]["message"]["content"] == right
        shown = (await client.get("/v1/experts/reverse")).json()["adapter"]
        assert shown["digest"] == made.adapter

        # It is watched where it lies: another one there is another adapter.
        shutil.rmtree(tmp_path / "small")
        other = compress_folder(TINY / "experts" / "large" / "plural", tmp_path / "small")
        del data["experts"]["reverse"]["digest"]
        (tmp_path / "experts.yaml").write_text(yaml.safe_dump(data))
        await service.changes.reload()
        shown = (await client.get("/v1/experts/reverse")).json()["adapter"]
        assert shown["digest"] == other.adapter
