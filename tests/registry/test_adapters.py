"""What a sound adapter becomes: scaling, digest, base names and shapes; the cache of verdicts."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from composer.adapters import cache as cache_module
from composer.adapters.base_model import BaseModelInfo, read_base_model
from composer.adapters.cache import FileCache, verify_cached
from composer.adapters.tensors import RawTensor, read_tensors
from composer.adapters.verify import verify_adapter
from composer.errors import AdapterError, CatalogError
from composer.types import Adapter
from tests.registry.world import (
    BASE_NAME,
    RANK,
    VOCABULARY,
    WIDTH,
    adapter_config,
    adapter_tensors,
    write_adapter,
    write_base,
)


@pytest.fixture
def base(tmp_path: Path) -> BaseModelInfo:
    write_base(tmp_path / "base")
    return read_base_model(tmp_path / "base", [BASE_NAME])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_adapter(tmp_path / "fox")
    return tmp_path / "fox"


def verify(folder: Path, base: BaseModelInfo | None, **arguments: Any) -> Adapter:
    return verify_adapter(folder, base, roots=[folder.parent], **arguments)


def test_rank_stabilised_scaling_is_folded_into_alpha(tmp_path: Path, base: BaseModelInfo) -> None:
    write_adapter(tmp_path / "plain", adapter_config(lora_alpha=4))
    write_adapter(tmp_path / "stable", adapter_config(lora_alpha=4, use_rslora=True))
    plain, stable = verify(tmp_path / "plain", base), verify(tmp_path / "stable", base)
    assert plain.alpha / plain.rank == pytest.approx(4 / RANK)
    assert stable.alpha / stable.rank == pytest.approx(4 / math.sqrt(RANK))
    assert plain.digest != stable.digest


def test_without_a_base_an_adapter_is_checked_by_itself(folder: Path) -> None:
    assert verify(folder, None).rank == RANK
    write_adapter(folder, adapter_config(r=4))
    with pytest.raises(AdapterError, match=r"its rank is 2, adapter_config\.json says 4"):
        verify(folder, None)


@pytest.mark.parametrize("name", [BASE_NAME, "/models/Tiny_Llama", "mirror/tiny.llama", "base"])
def test_a_base_goes_by_the_last_part_of_its_name(
    name: str, folder: Path, base: BaseModelInfo
) -> None:
    write_adapter(folder, adapter_config(base_model_name_or_path=name))
    assert verify(folder, base)


def test_a_name_alone_is_not_enough(tmp_path: Path, folder: Path) -> None:
    write_base(tmp_path / "wide", width=2 * WIDTH)
    with pytest.raises(AdapterError, match="it fits a layer of width 8, the base's is 16 wide"):
        verify(folder, read_base_model(tmp_path / "wide"))


def test_factors_on_embeddings_and_the_tied_head(folder: Path, base: BaseModelInfo) -> None:
    tensors = adapter_tensors()
    embedding = "base_model.model.model.embed_tokens.lora_embedding_"
    tensors[embedding + "A"] = np.ones((RANK, VOCABULARY), np.float32)
    tensors[embedding + "B"] = np.ones((WIDTH, RANK), np.float32)
    tensors["base_model.model.lm_head.lora_A.weight"] = np.ones((RANK, WIDTH), np.float32)
    tensors["base_model.model.lm_head.lora_B.weight"] = np.ones((VOCABULARY, RANK), np.float32)
    targets = ["q_proj", "v_proj", "embed_tokens", "lm_head"]
    write_adapter(folder, adapter_config(target_modules=targets), tensors)
    assert verify(folder, base).target_modules == tuple(sorted(targets))


def test_layers_can_be_chosen(folder: Path, base: BaseModelInfo) -> None:
    tensors = {name: value for name, value in adapter_tensors().items() if ".layers.1." in name}
    write_adapter(folder, adapter_config(layers_to_transform=[1]), tensors)
    assert verify(folder, base)
    write_adapter(folder, adapter_config(layers_to_transform=0), tensors)
    with pytest.raises(AdapterError, match="does not target it") as refused:
        verify(folder, base)
    assert "but its tensors are missing" in str(refused.value)


def test_rank_patterns_set_single_modules_ranks(folder: Path, base: BaseModelInfo) -> None:
    tensors = adapter_tensors()
    for name, value in adapter_tensors(rank=1).items():
        if "layers.1" in name and "v_proj" in name:
            tensors[name] = value
    pattern = {r"layers\.1\..*v_proj": 1}
    write_adapter(folder, adapter_config(rank_pattern=pattern), tensors)
    assert verify(folder, base, features={"rank_pattern"}).rank == RANK
    write_adapter(folder, adapter_config(rank_pattern={"v_proj": 1}), tensors)
    with pytest.raises(AdapterError, match=r"layers\.0.*its rank is 2, .* says 1"):
        verify(folder, base, features={"rank_pattern"})


def test_targets_as_a_regular_expression(folder: Path, base: BaseModelInfo) -> None:
    write_adapter(folder, adapter_config(target_modules=r".*\.(q|v)_proj"))
    assert verify(folder, base).target_modules == ("q_proj", "v_proj")


# --- base models -----------------------------------------------------------------------------


def test_a_sharded_base_is_read_by_its_index(tmp_path: Path, folder: Path) -> None:
    write_base(tmp_path / "base")
    single = tmp_path / "base" / "model.safetensors"
    tensors = {
        name: np.frombuffer(raw.data, np.float32).reshape(raw.shape)
        for name, raw in read_tensors(single).items()
    }
    single.unlink()
    shards: dict[str, dict[str, Any]] = {"model-1.safetensors": {}, "model-2.safetensors": {}}
    weight_map = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        file = f"model-{1 + number % 2}.safetensors"
        shards[file][name] = tensor
        weight_map[name] = file
    for file, part in shards.items():
        save_file(part, tmp_path / "base" / file)
    index = tmp_path / "base" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert verify(folder, read_base_model(tmp_path / "base"))

    (tmp_path / "base" / "model-2.safetensors").unlink()
    with pytest.raises(CatalogError, match=r"model-2\.safetensors"):
        read_base_model(tmp_path / "base")


def test_what_is_known_of_a_base(base: BaseModelInfo) -> None:
    assert base.context_window == 512
    assert base.names == (BASE_NAME, "base")
    assert base.shapes["model.layers.0.self_attn.q_proj"] == (WIDTH, WIDTH)
    assert base.shapes["lm_head"] == (VOCABULARY, WIDTH)


def test_a_quantised_bases_packed_shapes_are_not_compared(tmp_path: Path, folder: Path) -> None:
    write_base(tmp_path / "packed", width=3)
    config = tmp_path / "packed" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": {}}))
    assert verify(folder, read_base_model(tmp_path / "packed"))


# --- numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "finite"),
    [
        (0x3F80, True),
        (0x7F7F, True),
        (0xFF7F, True),
        (0x7F80, False),
        (0xFF80, False),
        (0x7FC0, False),
    ],
)
def test_bfloat16_is_judged_by_its_bits(bits: int, finite: bool) -> None:
    data = np.array([0, bits], np.uint16).tobytes()
    assert RawTensor("BF16", (2,), data).is_finite() is finite


@given(values=st.lists(st.floats(width=32), max_size=20))
def test_float32_is_judged_as_numpy_does(values: list[float]) -> None:
    array = np.array(values, np.float32)
    raw = RawTensor("F32", array.shape, array.tobytes())
    assert raw.is_finite() is bool(np.isfinite(array).all())


# --- digest ----------------------------------------------------------------------------------


def test_the_digest_is_that_of_the_content(folder: Path, base: BaseModelInfo) -> None:
    before = verify(folder, base).digest
    config = adapter_config(
        target_modules=["v_proj", "q_proj"], inference_mode=True, peft_version="9"
    )
    tensors = dict(reversed(adapter_tensors().items()))
    (folder / "adapter_config.json").write_text(
        json.dumps(dict(reversed(config.items())), indent=3)
    )
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"by": "someone else"})
    assert verify(folder, base).digest == before

    name = next(iter(tensors))
    tensors[name] = np.nextafter(tensors[name], np.float32(np.inf))
    save_file(tensors, folder / "adapter_model.safetensors")
    assert verify(folder, base).digest != before


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_another_adapter(
    data: st.DataObject, folder: Path, base: BaseModelInfo
) -> None:
    """Never any other error, and never the sound adapter's digest for other bytes of tensors."""
    write_adapter(folder)
    sound = verify(folder, base).digest
    file = folder / data.draw(st.sampled_from(["adapter_model.safetensors", "adapter_config.json"]))
    content = bytearray(file.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= data.draw(st.integers(1, 255))
    length = data.draw(st.integers(0, len(content)) | st.just(len(content)))
    file.write_bytes(content[:length])
    try:
        digest = verify(folder, base).digest
    except AdapterError:
        return
    start = 8 + int.from_bytes(content[:8], "little")
    if file.suffix == ".safetensors" and position >= start:
        assert digest != sound


# --- cache -----------------------------------------------------------------------------------


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders whose files were read, in order."""
    folders: list[Path] = []
    verify = cache_module.verify_adapter

    def counting(folder: Path, *args: Any, **kwargs: Any) -> Adapter:
        folders.append(folder)
        return verify(folder, *args, **kwargs)

    monkeypatch.setattr(cache_module, "verify_adapter", counting)
    return folders


def age(folder: Path, seconds: float = 10) -> None:
    for file in folder.iterdir():
        os.utime(file, (time.time() - seconds,) * 2)


def test_an_unchanged_adapter_is_read_once(
    folder: Path, base: BaseModelInfo, read: list[Path]
) -> None:
    age(folder)
    cache = FileCache()
    first = verify_cached(cache, folder, base, roots=[folder.parent])
    assert verify_cached(cache, folder, base, roots=[folder.parent]) is first
    assert len(read) == 1
    write_adapter(folder, seed=3)
    assert verify_cached(cache, folder, base, roots=[folder.parent]).digest != first.digest
    assert len(read) == 2


def test_another_base_limit_or_pin_is_another_question(
    folder: Path, tmp_path: Path, base: BaseModelInfo
) -> None:
    age(folder)
    cache = FileCache()
    verify_cached(cache, folder, base, roots=[folder.parent])
    write_base(tmp_path / "other", name="acme/other", width=2 * WIDTH)
    with pytest.raises(AdapterError, match="it was trained on"):
        verify_cached(cache, folder, read_base_model(tmp_path / "other"), roots=[folder.parent])
    with pytest.raises(AdapterError, match="exceeds the server's 1"):
        verify_cached(cache, folder, base, roots=[folder.parent], max_rank=1)
    with pytest.raises(AdapterError, match="not the pinned"):
        verify_cached(cache, folder, base, roots=[folder.parent], digest="sha256:" + "0" * 64)


def test_where_a_known_adapter_lies_is_asked_each_time(folder: Path, base: BaseModelInfo) -> None:
    age(folder)
    cache = FileCache()
    verify_cached(cache, folder, base, roots=[folder.parent])
    with pytest.raises(AdapterError, match="outside the allowed folders"):
        verify_cached(cache, folder, base, roots=[folder.parent / "elsewhere"])


def test_a_file_just_written_is_not_remembered(
    folder: Path, base: BaseModelInfo, read: list[Path]
) -> None:
    """It may be written once more within the clock's grain, and would look unchanged."""
    age(folder, -10)  # as new as can be, whatever the machine's pace
    cache = FileCache()
    verify_cached(cache, folder, base, roots=[folder.parent])
    verify_cached(cache, folder, base, roots=[folder.parent])
    assert len(read) == 2


def test_the_cache_forgets_the_oldest(
    tmp_path: Path, base: BaseModelInfo, read: list[Path]
) -> None:
    cache = FileCache(size=2)
    for name in ("a", "b", "c", "a"):
        if not (tmp_path / name).exists():
            write_adapter(tmp_path / name)
            age(tmp_path / name)
        verify_cached(cache, tmp_path / name, base, roots=[tmp_path])
    assert [folder.name for folder in read] == ["a", "b", "c", "a"]
