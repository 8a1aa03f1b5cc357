"""Adapters that come and go, and failures that must stay where they happen."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from composer.adapters.verify import adapter_digest
from composer.engines.local import EmbeddedEngine, EmbeddedSettings
from composer.errors import EngineError
from composer.types import Adapter
from tests.engines.conftest import make_call, reference, save_adapter, text, with_own_digest


async def test_adapters_come_and_go_while_calls_run(
    bare: EmbeddedEngine, adapters: tuple[Adapter, ...]
) -> None:
    plain = await text(bare, make_call(max_tokens=80))
    running = asyncio.create_task(text(bare, make_call(max_tokens=80)))
    await bare.prepare(adapters[:2])
    await bare.prepare(adapters[1:3])  # one known, one new
    first = await text(bare, make_call(adapter=adapters[0]))
    assert await running == plain
    await bare.retain(adapters[:1])
    assert await text(bare, make_call(adapter=adapters[0])) == first
    assert await text(bare, make_call(max_tokens=80)) == plain
    with pytest.raises(EngineError, match="not loaded"):
        await text(bare, make_call(adapter=adapters[1]))
    await bare.retain(())
    await bare.prepare(adapters)
    assert await text(bare, make_call(adapter=adapters[0])) == first


def broken(kind: str, adapter: Adapter, base: Path, folder: Path) -> Adapter:
    """A copy of an adapter with one thing wrong."""
    shutil.copytree(adapter.path, folder)
    weights = folder / "adapter_model.safetensors"
    config = folder / "adapter_config.json"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "missing":
        weights.unlink()
    elif kind == "rank":
        config.write_text(config.read_text().replace('"r": 4', '"r": 8'))
    elif kind == "modules":
        config.write_text(config.read_text().replace('"q_proj"', '"k_proj"'))
    elif kind == "no such module":
        for module in ("q_proj", "v_proj", "down_proj"):
            config.write_text(config.read_text().replace(f'"{module}"', f'"no_{module}"'))
    else:
        raise AssertionError(kind)
    moved = dataclasses.replace(adapter, path=folder, digest=f"sha256:{kind}")
    return moved if kind in ("truncated", "missing") else with_own_digest(moved)


@pytest.mark.parametrize("held", [0, 1])
@pytest.mark.parametrize("kind", ["truncated", "missing", "rank", "modules", "no such module"])
async def test_a_load_that_fails_adds_nothing_and_breaks_nothing(
    bare: EmbeddedEngine,
    base: Path,
    adapters: tuple[Adapter, ...],
    tmp_path: Path,
    kind: str,
    held: int,
) -> None:
    await bare.prepare(adapters[:held])
    calls = [make_call(), *(make_call(adapter=a) for a in adapters[:held])]
    before = [await text(bare, call) for call in calls]
    bad = broken(kind, adapters[3], base, tmp_path / "bad")
    with pytest.raises(EngineError, match="cannot be loaded"):
        await bare.prepare([adapters[1], bad, adapters[2]])
    assert [await text(bare, call) for call in calls] == before
    for absent in (adapters[1], adapters[2], bad):
        with pytest.raises(EngineError, match="not loaded"):
            await text(bare, make_call(adapter=absent))
    await bare.prepare(adapters)
    assert await text(bare, make_call("2+2=", adapters[2])) == reference(
        base, adapters[2], "2+2=", 12
    )


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
async def test_an_adapter_that_changed_since_it_was_verified_is_not_served(
    bare: EmbeddedEngine, base: Path, adapters: tuple[Adapter, ...], tmp_path: Path, file: str
) -> None:
    checked = save_adapter(base, tmp_path / "checked", 21)
    other = save_adapter(base, tmp_path / "other", 22, lora_alpha=64)
    shutil.copy(other.path / file, checked.path / file)
    with pytest.raises(EngineError, match=r"changed on disk.*reload the registry") as refused:
        await bare.prepare([adapters[0], checked])
    assert str(checked.path) in str(refused.value)
    for absent in (adapters[0], checked):
        with pytest.raises(EngineError, match="not loaded"):
            await text(bare, make_call(adapter=absent))
    as_now = with_own_digest(checked)
    await bare.prepare([as_now])
    assert await text(bare, make_call(adapter=as_now)) == reference(base, as_now, "hello", 12)


async def test_the_bytes_served_are_those_that_were_digested(
    bare: EmbeddedEngine, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Swapped after the digest was taken: nothing reads the file again."""
    checked = save_adapter(base, tmp_path / "checked", 21)
    other = save_adapter(base, tmp_path / "other", 22, lora_alpha=64)
    expected = reference(base, checked, "hello", 12)

    def swap_then_digest(*args: object) -> str:
        shutil.copytree(other.path, checked.path, dirs_exist_ok=True)
        return adapter_digest(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("composer.engines.model.adapter_digest", swap_then_digest)
    await bare.prepare([checked])
    assert reference(base, checked, "hello", 12) != expected
    assert await text(bare, make_call(adapter=checked)) == expected


@pytest.mark.parametrize("saved_in", [torch.bfloat16, torch.float16])
async def test_an_adapter_saved_in_half_precision_is_loaded(
    bare: EmbeddedEngine, base: Path, tmp_path: Path, saved_in: torch.dtype
) -> None:
    adapter = save_adapter(base, tmp_path / "half", 23)
    weights = adapter.path / "adapter_model.safetensors"
    save_file({k: v.to(saved_in) for k, v in load_file(weights).items()}, weights)
    adapter = with_own_digest(adapter)
    await bare.prepare([adapter])
    assert await text(bare, make_call("2+2=", adapter)) == reference(base, adapter, "2+2=", 12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
async def test_adapters_take_the_bases_precision(
    base: Path, adapters: tuple[Adapter, ...], dtype: str
) -> None:
    settings = EmbeddedSettings(model=str(base), dtype=dtype)  # type: ignore[arg-type]
    engine = EmbeddedEngine("tiny", settings)
    await engine.start()
    await engine.prepare(adapters)
    calls = [make_call("2+2=", adapter, max_tokens=1) for adapter in (None, *adapters)]
    together = await asyncio.gather(*(text(engine, call) for call in calls))
    assert together == [reference(base, call.adapter, "2+2=", 1) for call in calls]
    await engine.close()


async def test_too_many_adapters_are_refused(base: Path, adapters: tuple[Adapter, ...]) -> None:
    engine = EmbeddedEngine("tiny", EmbeddedSettings(model=str(base), max_adapters=2))
    await engine.start()
    await engine.prepare(adapters[:2])
    with pytest.raises(EngineError, match="would hold 3 adapters; its max_adapters is 2"):
        await engine.prepare(adapters[:3])
    await engine.close()


async def test_a_poisoned_adapter_fails_its_own_calls_only(
    engine: EmbeddedEngine, base: Path, tmp_path: Path
) -> None:
    poison = save_adapter(base, tmp_path / "poison", 9)
    await engine.prepare([poison])
    name = engine._worker._model._names[poison.digest]  # type: ignore[union-attr]
    for key, parameter in engine._worker._model._base.named_parameters():  # type: ignore[union-attr]
        if name in key:
            parameter.data.fill_(torch.nan)
    fine = make_call("2+2=", max_tokens=20)
    expected = await text(engine, fine)
    good, bad = await asyncio.gather(
        text(engine, fine), text(engine, make_call(adapter=poison)), return_exceptions=True
    )
    assert good == expected
    assert isinstance(bad, EngineError)
    assert "not finite" in str(bad)


async def test_a_step_that_fails_fails_its_rows_and_the_engine_goes_on(
    bare: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = await text(bare, make_call())
    model = bare._worker._model  # type: ignore[union-attr]
    forward, calls = model.forward, 0

    def flaky(*args: object, **kwargs: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls in (3, 6):  # a step of the first call, the prefill of the second
            raise RuntimeError("out of memory")
        return forward(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "forward", flaky)
    with pytest.raises(EngineError, match="out of memory"):
        await text(bare, make_call())
    monkeypatch.setattr(model, "forward", forward)
    calls = 5
    monkeypatch.setattr(model, "forward", flaky)
    with pytest.raises(EngineError, match="out of memory"):
        await text(bare, make_call())
    assert await text(bare, make_call()) == expected
    assert (await bare.health()).ok


async def test_a_cache_that_cannot_be_cut_fails_its_rows_and_the_engine_goes_on(
    bare: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = bare._worker._batch  # type: ignore[union-attr]

    def broken_keep(rows: list[int]) -> None:
        monkeypatch.undo()
        raise RuntimeError("out of memory")

    left = bare.run(make_call(max_tokens=90))
    stays = asyncio.create_task(text(bare, make_call(max_tokens=80)))
    await anext(left)
    while len(batch.lengths) < 2:
        await asyncio.sleep(0.001)
    monkeypatch.setattr(batch, "keep", broken_keep)
    await left.aclose()
    with pytest.raises(EngineError, match="out of memory"):
        await stays
    assert await text(bare, make_call())
    assert (await bare.health()).ok
