"""Loads of adapters into a real vLLM server: twelve adapters, room for two in a batch.

    python benchmarks/vllm_adapters.py [--orders N] [--json FILE] [--quick]

Needs `make vllm` (or COMPOSER_VLLM_PYTHON). The whole service runs in this process over one server
that it starts, with `max_loras` 2 and `max_cpu_loras` 4: the ten tiny experts and two of them with
noise on their weights. Everything is float32 and greedy, so that an answer does not depend on what
else is in the batch. The same 300 requests, 25 an adapter and shuffled, are sent

- alone: adapter by adapter, which gives the right answers;
- in order: to the server, at most 32 at once with at most two adapters, none overtaking another;
- direct: to the server, 32 at once, which vLLM's own scheduler then reorders;
- service: to the service, 32 at once.

read, moved: loads during those requests as vLLM's log has them, from disk into its memory and from
there into the batch. failed: requests without an answer; other: answers that are not those of their
own adapter alone. span_s: seconds for all of them.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import httpx
import torch
import yaml
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from api.app import create_app
from benchmarks.common import ROOT, Row, add_arguments, progress, show
from benchmarks.vllm_log import AdapterLoads, adapter_loads
from composer.build import make_service
from composer.errors import ComposerError
from composer.service import Service
from composer.settings import Settings
from composer.types import Call, Sampling
from examples.tiny.experts import base_folder, base_name, expert_folder
from examples.tiny.tasks import SKILLS, Skill

SERVER = "tiny"
MAX_LORAS, MAX_CPU_LORAS = 2, 4
AT_ONCE = 32
PER_ADAPTER = 25
MAX_TOKENS = 48
NOISY: dict[str, str] = {"other-reverse": "reverse", "other-caesar": "caesar"}
NOISE = 1.5
"""Of the noise on a weight, in standard deviations of its tensor: a third of the answers differ at
1.5, next to none at 0.5."""
SETTLE_S = 0.5
"""By then a server that has answered has also written its log."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A question for one expert; `number` is its place among all. `answer` is what the expert has
    learnt to say; one with noise need not."""

    number: int
    expert: str
    text: str
    answer: str


Send = Callable[[Ask], Awaitable[str | None]]
"""Gives the answer, or None where there is none."""


@dataclass(frozen=True, slots=True)
class Side:
    """One way of sending the requests, and what came of it. `answers` are by the requests'
    numbers."""

    name: str
    answers: dict[int, str | None]
    loads: AdapterLoads
    span_s: float

    @property
    def read(self) -> int:
        return self.loads.read.total()

    @property
    def moved(self) -> int:
        return self.loads.moved.total()

    @property
    def failed(self) -> int:
        return sum(answer is None for answer in self.answers.values())

    def unlike(self, right: Side) -> list[int]:
        """The requests that got another answer."""
        return [
            number
            for number, answer in self.answers.items()
            if answer is not None and answer != right.answers[number]
        ]

    def row(self, order: int, right: Side) -> Row:
        return {
            "order": order,
            "side": self.name,
            "requests": len(self.answers),
            "failed": self.failed,
            "other": len(self.unlike(right)),
            "read": self.read,
            "moved": self.moved,
            "span_s": self.span_s,
        }


def noisy(source: Path, folder: Path, seed: int) -> Path:
    """A copy of an adapter with noise on its weights."""
    shutil.copytree(source, folder)
    weights = folder / "adapter_model.safetensors"
    drawn = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, tensor in sorted(load_file(weights).items()):
        values = tensor.float()
        noise = torch.randn(values.shape, generator=drawn) * values.std() * NOISE
        tensors[name] = (values + noise).to(tensor.dtype)
    save_file(tensors, weights, metadata={"format": "pt"})
    return folder


def skill_of(expert: str) -> Skill:
    return SKILLS[NOISY.get(expert, expert)]


def adapters(folder: Path) -> dict[str, Path]:
    """Twelve of them by expert; those with noise are made in `folder`."""
    made = {
        expert: noisy(expert_folder("large", skill), folder / expert, seed)
        for seed, (expert, skill) in enumerate(NOISY.items())
    }
    return {skill: expert_folder("large", skill) for skill in SKILLS} | made


def registry(folder: Path, python: Path) -> str:
    """experts.yaml of one vLLM server with the twelve."""
    catalog = {
        "version": 1,
        "servers": {
            SERVER: {
                "engine": "vllm",
                "model": str(base_folder("large")),
                "model_name": base_name("large"),
                "context_window": 512,
                "max_loras": MAX_LORAS,
                "max_cpu_loras": MAX_CPU_LORAS,
                "max_lora_rank": 8,
                "launch": {
                    "python": str(python),
                    "args": {"dtype": "float32", "enforce_eager": True},
                    "env": {
                        "HF_HUB_OFFLINE": "1",
                        "OMP_NUM_THREADS": "1",
                        "VLLM_CPU_KVCACHE_SPACE": "1",
                        "VLLM_LOGGING_LEVEL": "DEBUG",  # what is counted
                    },
                    "log": str(log_of(folder)),
                    "start_timeout_s": 300,
                },
            }
        },
        "experts": {
            expert: {
                "server": SERVER,
                "adapter": str(path),
                "examples": [skill_of(expert).sample("train", 1, seed=0)[0].prompt],
                "sampling": {"temperature": 0, "max_tokens": MAX_TOKENS},
            }
            for expert, path in adapters(folder / "adapters").items()
        },
        # A catalog has one; the requests here name their expert.
        "policies": {"auto": {"router": {"name": "neighbours"}, "strategy": {"name": "single"}}},
    }
    return str(yaml.safe_dump(catalog))


def log_of(folder: Path) -> Path:
    return folder / "server.log"


def asks(per_adapter: int = PER_ADAPTER) -> list[Ask]:
    """Adapter by adapter. One with noise gets the questions of the one without."""
    items = [
        (expert, item)
        for expert in [*SKILLS, *NOISY]
        for item in skill_of(expert).sample("test", per_adapter, seed=3)
    ]
    return [Ask(n, expert, item.prompt, item.answer) for n, (expert, item) in enumerate(items)]


async def all_at_once(asked: Sequence[Ask], send: Send) -> dict[int, str | None]:
    """`AT_ONCE` callers, each of whom sends the next request once the last is answered."""
    answers: dict[int, str | None] = {}
    ahead = iter(asked)

    async def caller() -> None:
        for ask in ahead:
            answers[ask.number] = await send(ask)

    await asyncio.gather(*(caller() for _ in range(AT_ONCE)))
    return answers


async def in_order(asked: Sequence[Ask], send: Send) -> dict[int, str | None]:
    """The same, but a request whose adapter would be one too many waits, and all behind it."""
    answers: dict[int, str | None] = {}
    running: Counter[str] = Counter()
    ended = asyncio.Condition()

    async def one(ask: Ask) -> None:
        answers[ask.number] = await send(ask)
        async with ended:
            running[ask.expert] -= 1
            ended.notify_all()

    def fits(ask: Ask) -> bool:
        using = +running
        return using.total() < AT_ONCE and (ask.expert in using or len(using) < MAX_LORAS)

    async with asyncio.TaskGroup() as tasks:
        for ask in asked:
            async with ended:
                while not fits(ask):
                    await ended.wait()
                running[ask.expert] += 1
            tasks.create_task(one(ask))
    return answers


async def by_adapter(asked: Sequence[Ask], send: Send) -> dict[int, str | None]:
    """No two adapters ever run at the same time."""
    answers: dict[int, str | None] = {}
    for expert in dict.fromkeys(ask.expert for ask in asked):
        answers |= await all_at_once([ask for ask in asked if ask.expert == expert], send)
    return answers


class Bench:
    """The running service, its server and that server's log."""

    def __init__(self, service: Service, client: httpx.AsyncClient, log: Path) -> None:
        self._client = client
        self._log = log
        generation = service.generations.live[-1]
        self._engine = generation.engines[SERVER]
        self._experts = generation.catalog.experts

    async def alone(self, asked: Sequence[Ask]) -> Side:
        return await self._side("alone", by_adapter(asked, self._to_server))

    async def in_order(self, asked: Sequence[Ask]) -> Side:
        return await self._side("in order", in_order(asked, self._to_server))

    async def direct(self, asked: Sequence[Ask]) -> Side:
        return await self._side("direct", all_at_once(asked, self._to_server))

    async def service(self, asked: Sequence[Ask]) -> Side:
        return await self._side("service", all_at_once(asked, self._to_service))

    async def _side(self, name: str, sending: Awaitable[dict[int, str | None]]) -> Side:
        before = await self._loads()
        began = monotonic()
        answers = await sending
        span_s = monotonic() - began
        return Side(name, answers, await self._loads() - before, span_s)

    async def _loads(self) -> AdapterLoads:
        await asyncio.sleep(SETTLE_S)
        return adapter_loads(self._log)

    async def _to_server(self, ask: Ask) -> str | None:
        """By the engine, which sends a call on at once; no scheduler has a say."""
        expert = self._experts[ask.expert]
        call = Call(
            id=f"{ask.number}/0",
            expert=expert.id,
            server=SERVER,
            adapter=expert.adapter,
            messages=({"role": "user", "content": ask.text},),
            prompt=None,
            sampling=Sampling(temperature=0.0, max_tokens=MAX_TOKENS),
            context_window=512,
        )
        try:
            async with aclosing(self._engine.run(call)) as chunks:
                return "".join([chunk.text async for chunk in chunks])
        except ComposerError as error:
            print(f"{ask.expert}: {error}", file=sys.stderr)
            return None

    async def _to_service(self, ask: Ask) -> str | None:
        body = {"model": ask.expert, "messages": [{"role": "user", "content": ask.text}]}
        response = await self._client.post("/v1/chat/completions", json=body)
        if response.status_code != 200:
            print(f"{ask.expert}: {response.status_code} {response.text}", file=sys.stderr)
            return None
        return str(response.json()["choices"][0]["message"]["content"])


@asynccontextmanager
async def serving(folder: Path, python: Path, **settings: Any) -> AsyncIterator[Bench]:
    """The whole service over the twelve, all of them loaded once."""
    (folder / "experts.yaml").write_text(registry(folder, python), encoding="utf-8")
    service = await asyncio.to_thread(
        make_service,
        Settings(
            **{
                "experts": folder / "experts.yaml",
                "adapter_roots": (ROOT / "examples" / "tiny", folder),
                "database_url": f"sqlite+aiosqlite:///{folder}/composer.db",
                "journal": folder / "journal",
                "files_dir": folder / "files",
                "cache_dir": ROOT / ".cache" / "composer",
                **settings,
            }
        ),
    )
    await service.start()
    try:
        transport = httpx.ASGITransport(create_app(service))
        async with httpx.AsyncClient(
            transport=transport, base_url="http://composer", timeout=None
        ) as client:
            yield Bench(service, client, log_of(folder))
    finally:
        await service.close()


def lru_misses(asked: Sequence[Ask], room: int) -> int:
    """Loads that one at a time in this order would cost, from nothing loaded."""
    held: list[str] = []
    misses = 0
    for ask in asked:
        if ask.expert in held:
            held.remove(ask.expert)
        else:
            misses += 1
        held = [*held, ask.expert][-room:]
    return misses


def shuffled(asked: Sequence[Ask], seed: int) -> list[Ask]:
    return random.Random(seed).sample(asked, len(asked))


async def run(python: Path, orders: int, per_adapter: int) -> list[Row]:
    asked = asks(per_adapter)
    rows: list[Row] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        progress("sides", 1 + 3 * orders) as step,
    ):
        async with serving(Path(folder), python) as bench:
            right = await bench.alone(asked)
            rows.append(right.row(0, right))
            step()
            for order in range(1, orders + 1):
                mixed = shuffled(asked, order)
                for send in (bench.in_order, bench.direct, bench.service):
                    rows.append((await send(mixed)).row(order, right))
                    step()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser, quick="one shuffle of ten requests an adapter")
    parser.add_argument("--orders", type=int, default=3, help="shuffles, each sent three ways")
    args = parser.parse_args()
    python = Path(os.environ.get("COMPOSER_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
    if not python.exists():
        parser.error(f"there is no {python}; make vllm")
    orders, per_adapter = (1, 10) if args.quick else (args.orders, PER_ADAPTER)
    rows = asyncio.run(run(python, orders, per_adapter))
    show(rows, args, title=f"{len(asks(per_adapter))} requests for twelve adapters, room for two")


if __name__ == "__main__":
    main()
