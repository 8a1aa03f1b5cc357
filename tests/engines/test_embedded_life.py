"""Adapters that come and go, failures, and the engine's own life."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from composer.engines.local import EmbeddedEngine, EmbeddedSettings
from composer.errors import EngineError, EngineUnavailable
from composer.types import Adapter
from tests.engines.conftest import make_call, reference, save_adapter, text


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
    return dataclasses.replace(adapter, path=folder, digest=f"sha256:{kind}")


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
    assert await bare.healthy()


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
    assert await bare.healthy()


# --- life -------------------------------------------------------------------------------


async def test_close_fails_what_runs_and_may_be_called_twice(base: Path) -> None:
    engine = EmbeddedEngine("tiny", EmbeddedSettings(model=str(base), max_batch=1))
    with pytest.raises(EngineUnavailable, match="not started"):
        await text(engine, make_call())
    await engine.start()
    assert await engine.healthy()
    stream = engine.run(make_call(max_tokens=90))
    await anext(stream)
    waiting = asyncio.create_task(text(engine, make_call()))
    await asyncio.sleep(0)
    await engine.close()
    await engine.close()
    with pytest.raises(EngineUnavailable, match="closed"):
        [c async for c in stream]
    with pytest.raises(EngineUnavailable, match="closed"):
        await waiting
    with pytest.raises(EngineUnavailable, match="closed"):
        await engine.prepare(())
    assert not await engine.healthy()
    assert not [t for t in threading.enumerate() if t.name == "embedded-tiny"]


@pytest.mark.parametrize("problem", ["nowhere", "weights", "tokenizer"])
async def test_a_base_that_cannot_be_loaded_names_the_remedy(
    base: Path, tmp_path: Path, problem: str
) -> None:
    folder = tmp_path / "base"
    if problem != "nowhere":
        shutil.copytree(base, folder)
        if problem == "weights":
            (folder / "model.safetensors").write_bytes(b"no")
        else:
            (folder / "tokenizer.json").unlink()
    engine = EmbeddedEngine("tiny", EmbeddedSettings(model=str(folder)))
    with pytest.raises(EngineUnavailable, match="`model` must be a folder with config"):
        await engine.start()
    assert not await engine.healthy()
    await engine.close()


def test_importing_the_engine_imports_no_torch() -> None:
    code = "import sys, composer.engines.local; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
