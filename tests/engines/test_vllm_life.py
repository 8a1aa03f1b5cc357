"""Death on real vLLM servers: of the server under load, and of the whole service.

The service is complete; nothing below the API is replaced.
"""

from __future__ import annotations

import asyncio
import collections
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from tests.engines.managed import running, until
from tests.tiny import ASKED, ROOT, TINY, chat, registry, serving
from tests.vllm import ENVIRONMENT, LARGE, python, vllm_marks

pytestmark = vllm_marks

PATIENT_S, HASTY_S = 600.0, 2.0
"""How long a call may wait: for any restart, and for none."""
RUN_S = 60.0
"""What an answer of 24 tokens itself may take on a machine that is busy with a start."""
STARTED_S = 300.0


def vllm_registry(folder: Path) -> str:
    """The four skills of `ASKED` on a vLLM server of ours."""
    catalog = yaml.safe_load(registry(*ASKED))
    catalog["servers"] = {
        "tiny": {
            "engine": "vllm",
            "model": str(LARGE),
            "model_name": "composer/tiny-large",
            "context_window": 512,
            "max_loras": 2,
            "max_cpu_loras": 4,
            "max_lora_rank": 8,
            "launch": {
                "python": python(),
                "args": {"dtype": "bfloat16", "enforce_eager": True},
                "env": ENVIRONMENT,
                "log": str(folder / "tiny.log"),
                "start_timeout_s": STARTED_S,
                "restarts": {"first_s": 0.5, "most_s": 1.0},
            },
        }
    }
    return yaml.safe_dump(catalog)


def vllm_processes(service: int | None = None) -> list[psutil.Process]:
    """The server's own first, then its engine's, of a service; none where there is no server."""
    for child in psutil.Process(service).children():
        try:
            if any(part.endswith("guardian.py") for part in child.cmdline()):
                return child.children(recursive=True)
        except psutil.NoSuchProcess:  # it ended as we looked
            continue
    return []


def engine_core(processes: list[psutil.Process]) -> psutil.Process:
    return next(process for process in processes if "EngineCore" in process.name())


@dataclass(frozen=True, slots=True)
class Asked:
    """One question and what became of it. Times in seconds."""

    skill: str
    bound: float
    status: int
    took: float
    said: str
    code: str | None

    @property
    def right(self) -> bool:
        return self.status == 200 and self.said == ASKED[self.skill][1]


async def ask(client: httpx.AsyncClient, skill: str, bound: float) -> Asked:
    body: dict[str, Any] = chat(ASKED[skill][0], model=skill) | {"composer": {"max_wait_s": bound}}
    began = time.monotonic()
    async with asyncio.timeout(bound + RUN_S):  # beyond it, the call hangs
        reply = await client.post("/v1/chat/completions", json=body)
    took = time.monotonic() - began
    if reply.status_code != 200:
        error = reply.json()["error"]
        return Asked(skill, bound, reply.status_code, took, error["message"], error["code"])
    said = reply.json()["choices"][0]["message"]["content"]
    return Asked(skill, bound, 200, took, said, None)


@pytest.mark.slow
async def test_kill_9_of_the_server_under_load_three_times(tmp_path: Path) -> None:
    answers: list[Asked] = []
    ended = asyncio.Event()

    async def keep_asking(client: httpx.AsyncClient, skills: Iterator[str], bound: float) -> None:
        while not ended.is_set():
            answers.append(await ask(client, next(skills), bound))
            if answers[-1].status != 200:
                await asyncio.sleep(0.5)

    async def until_all_skills_answer() -> None:
        """By calls that were made after now: the adapters are there."""
        since = len(answers)
        await until(
            lambda: {one.skill for one in answers[since:] if one.right} == set(ASKED), STARTED_S
        )

    killed: list[int] = []

    async def until_another_than(processes: list[psutil.Process]) -> None:
        await until(lambda: not any(running(process.pid) for process in processes), 60)
        await until(lambda: bool(vllm_processes()), STARTED_S)

    text = vllm_registry(tmp_path)
    async with serving(tmp_path, text, max_wait_s=PATIENT_S) as (client, _):
        for skill in ASKED:
            assert (await ask(client, skill, PATIENT_S)).right
        workers = [
            asyncio.create_task(
                keep_asking(
                    client,
                    itertools.cycle([*list(ASKED)[i % 4 :], *list(ASKED)[: i % 4]]),
                    HASTY_S if i >= 6 else PATIENT_S,
                )
            )
            for i in range(8)
        ]
        try:
            for victim in ("server", "engine", "server"):
                await until_all_skills_answer()
                processes = vllm_processes()
                killed.append(processes[0].pid)
                target = processes[0] if victim == "server" else engine_core(processes)
                target.kill()
                await until_another_than(processes)
            await until_all_skills_answer()
            killed.append(vllm_processes()[0].pid)
            ended.set()
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.wait(workers)
    assert not vllm_processes()
    assert len(set(killed)) == 4  # one, and three after it

    counts = collections.Counter(
        "wrong" if one.status == 200 and not one.right
        else f"{one.status} {one.code}" if one.status != 200
        else "answered" if one.took < HASTY_S
        else "answered late"
        for one in answers
    )  # fmt: skip
    print(dict(counts), f"slowest {max(one.took for one in answers):.0f} s")
    refused = {"503 overloaded", "503 engine_unavailable"}
    assert set(counts) <= {"answered", "answered late", *refused}, counts
    patient = [one for one in answers if one.bound == PATIENT_S]
    assert not [one for one in patient if one.status != 200]
    assert counts["answered late"] >= 3  # one at least waited for each restart
    assert sum(counts[name] for name in refused) >= 3  # and one at least did not want to
    assert all(one.took <= one.bound + RUN_S for one in answers)


async def test_kill_9_of_the_service_leaves_no_vllm_process(tmp_path: Path) -> None:
    (tmp_path / "experts.yaml").write_text(vllm_registry(tmp_path))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (tmp_path / "service.log").open("wb") as log:
        service = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "composer.cli", "serve", str(tmp_path / "experts.yaml")),
            *("--port", str(port)),
            cwd=ROOT,
            env={
                **os.environ,
                "COMPOSER_ADAPTER_ROOTS": f'["{TINY}"]',
                "COMPOSER_DATABASE_URL": f"sqlite+aiosqlite:///{tmp_path}/composer.db",
                "COMPOSER_JOURNAL": str(tmp_path / "journal"),
                "COMPOSER_FILES_DIR": str(tmp_path / "files"),
            },
            stdout=subprocess.DEVNULL,
            stderr=log,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=STARTED_S) as client:
            async with asyncio.timeout(STARTED_S):
                while True:
                    try:
                        answer = await ask(client, "uppercase", PATIENT_S)
                        break
                    except httpx.ConnectError:
                        assert service.returncode is None, (tmp_path / "service.log").read_text()
                        await asyncio.sleep(0.5)
            assert answer.right
            descendants = psutil.Process(service.pid).children(recursive=True)
            assert len(descendants) >= 3  # guardian, API server, engine
            load = [asyncio.create_task(ask(client, skill, PATIENT_S)) for skill in ASKED]
            await asyncio.sleep(0.05)
            began = time.monotonic()
            service.send_signal(signal.SIGKILL)
            await asyncio.gather(*load, return_exceptions=True)
            await until(lambda: not any(running(process.pid) for process in descendants), 60)
            print(f"{len(descendants)} processes gone {time.monotonic() - began:.1f} s after it")
    finally:
        if service.returncode is None:
            service.kill()
        await service.wait()


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    assert not vllm_processes()
