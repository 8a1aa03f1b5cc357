"""Swaps of real vLLM processes: two servers, memory for one, and callers who take turns.

    python benchmarks/vllm_swaps.py [--patience SHARE] [--json FILE]

Needs `make vllm` (or COMPOSER_VLLM_PYTHON). The whole service runs in this process over
examples/vllm/experts.yaml: a swap ends one vLLM process and starts the other, with its adapters.
First one swap is measured; then sixty requests come by turns for the one server and the other,
thirty of them in the time of a swap, each with a bound on its wait of three swaps. In order of
arrival every request but the first would need one.

swap_s: the swap measured first; bound_s: three of it; every_s: a thirtieth. late: requests that
waited longer; refused: those the service would not take; wrong: answers that are not right.
swaps, swapping_s: how many, and the seconds of their stops and starts together. in_order_s: the
swaps of arrival order at the mean seconds of these. p50, p95, max: waits for a lease, in seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import httpx
import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from api.app import create_app
from benchmarks.common import ROOT, Row, add_arguments, progress, show
from composer.build import make_service
from composer.settings import Settings

EXAMPLE = ROOT / "examples" / "vllm" / "experts.yaml"
TINY = ROOT / "examples" / "tiny"
DEVICE = "cpu"
REQUESTS = 60
PER_SWAP = 30
BOUND_SWAPS = 3.0
START_S = 300.0
"""How long a start may take, as the example has it."""
GUESS_S = 100.0

ASKED: tuple[tuple[str, str, str], ...] = (
    ("small-uppercase", "please write fox in capital letters", "FOX"),
    ("uppercase", "please write fox in capital letters", "FOX"),
    ("small-sort-digits", "sort the digits 3142 in ascending order", "1234"),
    ("sort-digits", "sort the digits 3142 in ascending order", "1234"),
)
"""Expert, question and right answer, the two servers by turns. The last one's server is that of the
first model loaded, the first one's that of the swap that is measured."""


def example(folder: Path, python: Path) -> str:
    """The example's experts.yaml for another folder, with this interpreter for vLLM and a guess
    of a start's time that also holds on a busy machine, until one has been seen."""
    catalog = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
    for id_, server in catalog["servers"].items():
        server["model"] = str((EXAMPLE.parent / server["model"]).resolve())
        log = str(folder / f"{id_}.log")
        server["launch"] = {**server["launch"], "python": str(python), "log": log}
        server["placement"] = {**server["placement"], "start_s": GUESS_S}
    for found in catalog["adapters_from"]:
        found["path"] = os.path.normpath(EXAMPLE.parent / found["path"])
    return str(yaml.safe_dump(catalog))


@dataclass(frozen=True, slots=True)
class Asked:
    """What became of one request; `queue_s` is how long it waited for its lease."""

    expert: str
    status: int
    said: str
    right: bool
    queue_s: float


@dataclass(frozen=True, slots=True)
class Alternation:
    """A run. `before` and `after` are GET /v1/scheduler's view of the device around it."""

    swap_s: float
    bound_s: float
    every_s: float
    span_s: float
    asked: tuple[Asked, ...]
    before: Mapping[str, Any]
    after: Mapping[str, Any]

    @property
    def swaps(self) -> int:
        return int(self.after["swaps"] - self.before["swaps"])

    @property
    def swapping_s(self) -> float:
        return float(self.after["swap_s"] - self.before["swap_s"])

    @property
    def swaps_in_order(self) -> int:
        """The first request's model is there already."""
        return len(self.asked) - 1

    @property
    def in_order_s(self) -> float:
        each = self.swapping_s / self.swaps if self.swaps else self.swap_s
        return self.swaps_in_order * each

    @property
    def late(self) -> int:
        return sum(one.queue_s > self.bound_s for one in self.asked)

    def row(self, patience: float) -> Row:
        waits = [one.queue_s for one in self.asked if one.status == 200]
        p50, p95, most = np.percentile(waits, [50, 95, 100]) if waits else [float("nan")] * 3
        return {
            "patience": patience,
            "requests": len(self.asked),
            "span_s": self.span_s,
            "swap_s": self.swap_s,
            "bound_s": self.bound_s,
            "every_s": self.every_s,
            "late": self.late,
            "refused": sum(one.status != 200 for one in self.asked),
            "wrong": sum(one.status == 200 and not one.right for one in self.asked),
            "swaps": self.swaps,
            "swapping_s": self.swapping_s,
            "in_order_swaps": self.swaps_in_order,
            "in_order_s": self.in_order_s,
            "p50": float(p50),
            "p95": float(p95),
            "max": float(most),
        }


async def device(client: httpx.AsyncClient) -> dict[str, Any]:
    state: dict[str, Any] = (await client.get("/v1/scheduler")).json()["devices"][DEVICE]
    return state


async def ask(client: httpx.AsyncClient, turn: int, bound_s: float) -> Asked:
    expert, question, answer = ASKED[turn % len(ASKED)]
    body = {
        "model": expert,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 24,
        "composer": {"max_wait_s": bound_s},
    }
    response = await client.post("/v1/chat/completions", json=body)
    told = response.json()
    if response.status_code != 200:
        return Asked(expert, response.status_code, told["error"]["message"], False, 0.0)
    said = told["choices"][0]["message"]["content"]
    return Asked(expert, 200, said, said == answer, told["composer"]["queue_ms"] / 1000)


async def measured_swap(client: httpx.AsyncClient) -> float:
    """Seconds of the one model's stop and the other's start; the first one's model is resident
    afterwards. Raises RuntimeError where one of the two gives no right answer."""
    spent_s, bound_s = 0.0, START_S
    for turn in (-1, 0):
        one = await ask(client, turn, bound_s)
        if not one.right:
            raise RuntimeError(f"{one.expert} gave {one.status}: {one.said!r}")
        before_s, spent_s = spent_s, float((await device(client))["swap_s"])
        bound_s = max(2.5 * spent_s, 1.5 * GUESS_S)  # the less, the sooner the swap begins
    return spent_s - before_s


async def alternate(
    client: httpx.AsyncClient, step: Callable[[], None] = lambda: None
) -> Alternation:
    """Measures a swap, then sends the requests, at their times whatever came of those before."""
    swap_s = await measured_swap(client)
    bound_s, every_s = BOUND_SWAPS * swap_s, swap_s / PER_SWAP
    before = await device(client)
    began = monotonic()

    async def one(turn: int) -> Asked:
        await asyncio.sleep(began + turn * every_s - monotonic())
        asked = await ask(client, turn, bound_s)
        step()
        return asked

    asked = await asyncio.gather(*(one(turn) for turn in range(REQUESTS)))
    span_s = monotonic() - began
    after = await device(client)
    return Alternation(swap_s, bound_s, every_s, span_s, tuple(asked), before, after)


@asynccontextmanager
async def serving(folder: Path, python: Path, patience: float) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the whole service over the example."""
    (folder / "experts.yaml").write_text(example(folder, python), encoding="utf-8")
    service = await asyncio.to_thread(
        make_service,
        Settings(
            experts=folder / "experts.yaml",
            adapter_roots=(TINY,),
            database_url=f"sqlite+aiosqlite:///{folder}/composer.db",
            journal=folder / "journal",
            files_dir=folder / "files",
            cache_dir=ROOT / ".cache" / "composer",
            max_wait_s=3600.0,  # the requests bring their own, which could only be less
            patience=patience,
        ),
    )
    await service.start()
    try:
        transport = httpx.ASGITransport(create_app(service))
        async with httpx.AsyncClient(
            transport=transport, base_url="http://composer", timeout=None
        ) as client:
            yield client
    finally:
        await service.close()


async def run(python: Path, patience: float) -> Alternation:
    with (
        tempfile.TemporaryDirectory() as folder,
        progress(f"patience {patience}", REQUESTS) as step,
    ):
        async with serving(Path(folder), python, patience) as client:
            return await alternate(client, step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser, quick=None)  # three starts of vLLM are the least there can be
    parser.add_argument("--patience", type=float, default=0.1, help="COMPOSER_PATIENCE; 0.1")
    args = parser.parse_args()
    python = Path(os.environ.get("COMPOSER_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
    if not python.exists():
        parser.error(f"there is no {python}; make vllm")
    row = asyncio.run(run(python, args.patience)).row(args.patience)
    show([row], args, title=f"{REQUESTS} requests by turns for two models, room for one")


if __name__ == "__main__":
    main()
