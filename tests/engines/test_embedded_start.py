"""The embedded engine's life: start, cancelled and failed starts, the end."""

from __future__ import annotations

import asyncio
import gc
import shutil
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from composer.engines import model as model_module
from composer.engines.local import EmbeddedEngine, EmbeddedSettings
from composer.engines.model import LocalModel
from composer.engines.worker import Worker
from composer.errors import EngineError, EngineUnavailable
from composer.types import Adapter, Placement
from tests.engines.conftest import make_call, reference, text


async def test_close_fails_what_runs_and_may_be_called_twice(base: Path) -> None:
    engine = EmbeddedEngine("tiny", EmbeddedSettings(model=str(base), max_batch=1))
    with pytest.raises(EngineUnavailable, match="not running"):
        await text(engine, make_call())
    await engine.start()
    assert (await engine.health()).ok
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
    assert not (await engine.health()).ok
    assert not [t for t in threading.enumerate() if t.name == "embedded-tiny"]


@pytest.fixture
def slow_load(monkeypatch: pytest.MonkeyPatch) -> SlowLoad:
    slow = SlowLoad()
    monkeypatch.setattr("composer.engines.worker.LocalModel", slow.load)
    return slow


class SlowLoad:
    """Loading as it is, but begun and ended when the test says so."""

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.loaded: weakref.ref[LocalModel] | None = None

    def load(self, settings: EmbeddedSettings) -> LocalModel:
        self.begun.set()
        assert self.go_on.wait(30)
        model = LocalModel(settings)
        self.loaded = weakref.ref(model)
        return model


async def test_a_start_cancelled_before_there_is_a_worker_leaves_none(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Worker] = []

    def make(server: str, settings: EmbeddedSettings) -> Worker:
        made.append(Worker(server, settings))
        return made[-1]

    monkeypatch.setattr("composer.engines.worker.Worker", make)
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    engine = EmbeddedEngine("tiny", EmbeddedSettings(model=str(base)))
    starting = asyncio.create_task(engine.start())
    await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    await asyncio.to_thread(lambda: None)  # the one thread of the executor is through with it
    for worker in made:
        worker._thread.join(5)
    assert not any(worker._thread.is_alive() for worker in made)
    await engine.close()


async def test_a_start_cancelled_while_loading_ends_the_worker_and_frees_the_model(
    base: Path, slow_load: SlowLoad
) -> None:
    engine = EmbeddedEngine("tiny", EmbeddedSettings(model=str(base)))
    starting = asyncio.create_task(engine.start())
    assert await asyncio.to_thread(slow_load.begun.wait, 30)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not (await engine.health()).ok
    slow_load.go_on.set()
    await engine.close()
    assert not [t for t in threading.enumerate() if t.name == "embedded-tiny"]
    gc.collect()
    assert slow_load.loaded is not None
    assert slow_load.loaded() is None


async def test_closing_while_it_loads_fails_the_start(base: Path, slow_load: SlowLoad) -> None:
    engine = EmbeddedEngine("tiny", EmbeddedSettings(model=str(base)))
    starting = asyncio.create_task(engine.start())
    assert await asyncio.to_thread(slow_load.begun.wait, 30)
    assert (await engine.health()).state == "starting"
    with pytest.raises(EngineUnavailable, match="not running"):
        await text(engine, make_call())
    closing = asyncio.create_task(engine.close())
    await asyncio.sleep(0)
    slow_load.go_on.set()
    await closing
    with pytest.raises(EngineUnavailable, match="closed"):
        await starting
    assert not [t for t in threading.enumerate() if t.name == "embedded-tiny"]


async def test_stopped_it_is_healthy_keeps_its_adapters_and_comes_back(
    base: Path, adapters: tuple[Adapter, ...]
) -> None:
    expected = reference(base, adapters[0], "hello", 12)
    engine = EmbeddedEngine("tiny", EmbeddedSettings(model=str(base), max_adapters=2))
    await engine.prepare(adapters[:1])  # before it has a model: remembered
    await engine.start()
    assert await text(engine, make_call(adapter=adapters[0])) == expected
    running = engine.run(make_call(max_tokens=80))
    await anext(running)
    await engine.stop()
    with pytest.raises(EngineUnavailable):
        [chunk async for chunk in running]
    assert (await engine.health()).ok
    assert not [t for t in threading.enumerate() if t.name == "embedded-tiny"]
    with pytest.raises(EngineUnavailable, match="not running"):
        await text(engine, make_call())
    await engine.prepare(adapters[1:2])
    with pytest.raises(EngineError, match="max_adapters"):
        await engine.prepare(adapters[2:3])
    await asyncio.gather(engine.start(), engine.start())
    assert len([t for t in threading.enumerate() if t.name == "embedded-tiny"]) == 1
    assert await text(engine, make_call(adapter=adapters[0])) == expected
    assert await text(engine, make_call(adapter=adapters[1])) != expected
    await engine.close()
    assert not (await engine.health()).ok


async def test_a_start_can_be_tried_again_after_it_was_cancelled(
    base: Path, slow_load: SlowLoad
) -> None:
    expected = reference(base, None, "hello", 12)  # loads a model, so before the others do
    engine = EmbeddedEngine("tiny", EmbeddedSettings(model=str(base)))
    starting = asyncio.create_task(engine.start())
    assert await asyncio.to_thread(slow_load.begun.wait, 30)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    slow_load.go_on.set()
    await engine.start()
    assert (await engine.health()).ok
    assert await text(engine, make_call()) == expected
    await engine.close()


async def test_an_engine_whose_thread_died_is_not_healthy_and_fails_its_calls(
    bare: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = bare._worker
    assert worker is not None

    def die() -> None:
        raise SystemExit("a bug outside every call")

    monkeypatch.setattr(worker, "_step", die)
    with pytest.raises(EngineUnavailable):
        await text(bare, make_call())
    await asyncio.to_thread(worker.join)
    assert not (await bare.health()).ok
    with pytest.raises(EngineUnavailable):
        await text(bare, make_call())


async def test_the_model_has_run_once_before_the_first_call(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []
    forward = LocalModel.forward

    def watched(self: LocalModel, ids: torch.Tensor, **rest: object) -> torch.Tensor:
        shapes.append(tuple(ids.shape))
        return forward(self, ids, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(LocalModel, "forward", watched)
    engine = EmbeddedEngine("tiny", EmbeddedSettings(model=str(base)))
    await engine.start()
    assert shapes == [(1, 1), (1, 1)]
    assert engine._worker._batch.lengths == []  # type: ignore[union-attr]
    await engine.close()


async def test_a_model_that_cannot_run_is_not_started(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken_forward(*args: object, **kwargs: object) -> torch.Tensor:
        raise RuntimeError("no kernel for this device")

    monkeypatch.setattr(LocalModel, "forward", broken_forward)
    engine = EmbeddedEngine("tiny", EmbeddedSettings(model=str(base)))
    with pytest.raises(EngineUnavailable, match=r"cannot run .*no kernel for this device"):
        await engine.start()
    assert not (await engine.health()).ok
    await engine.close()


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
    assert not (await engine.health()).ok
    await engine.close()


def test_importing_the_engine_imports_no_torch() -> None:
    code = "import sys, composer.engines.local; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


async def test_models_loaded_at_once_do_not_disturb_each_other(
    base: Path, adapters: tuple[Adapter, ...]
) -> None:
    """Unguarded, some of these loads fail, and so does every load after them."""
    called = (None, *adapters)
    expected = [reference(base, adapter, "hello", 12) for adapter in called]
    engines = [
        EmbeddedEngine(f"s{i}", EmbeddedSettings(model=str(base)), placement=Placement("box", 1))
        for i in range(6)
    ]
    for engine in engines:
        await engine.prepare(adapters)  # loaded at the start
    await asyncio.gather(*(engine.start() for engine in engines))
    for engine in engines:
        assert [await text(engine, make_call(adapter=a)) for a in called] == expected
        await engine.close()


def test_an_adapters_tensors_are_put_in_while_nothing_else_loads(
    base: Path, adapters: tuple[Adapter, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While peft builds a model, all parameters of the process are registered without data."""
    guarded: list[bool] = []
    put_in = model_module.set_peft_model_state_dict

    def watched(*args: Any, **kwargs: Any) -> Any:
        guarded.append(model_module.LOADING.locked())
        return put_in(*args, **kwargs)

    monkeypatch.setattr(model_module, "set_peft_model_state_dict", watched)
    LocalModel(EmbeddedSettings(model=str(base))).load(adapters)
    assert guarded == [True] * len(adapters)
    assert not model_module.LOADING.locked()
