"""Measures `workload.TOKENS_PER_S`: tokens a second of one answer while others run beside it.

    python benchmarks/swapping/speed.py [--json FILE] [--quick]

The embedded engine with examples/tiny/bases/large, one thread, answers of up to 100 tokens at
temperature 1.5, `workload.IN_FLIGHT` at once. Prompts are read in the same time.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from benchmarks.common import ROOT, add_arguments, show
from benchmarks.swapping.workload import IN_FLIGHT
from composer.engines.local import EmbeddedEngine, EmbeddedSettings
from composer.types import Call, Sampling


async def measure(engine: EmbeddedEngine, calls: int, at_once: int) -> float:
    places = asyncio.Semaphore(at_once)
    seconds, tokens = 0.0, 0

    async def run(number: int) -> None:
        nonlocal seconds, tokens
        call = Call(
            id=str(number),
            expert="base",
            server="tiny",
            adapter=None,
            messages=(),
            prompt="reverse fox ; sort 31",
            sampling=Sampling(max_tokens=100, temperature=1.5, seed=number),
            context_window=160,
        )
        async with places:
            began = perf_counter()
            async for chunk in engine.run(call):
                if chunk.usage is not None:
                    tokens += chunk.usage.completion_tokens
            seconds += perf_counter() - began

    await asyncio.gather(*(run(number) for number in range(calls)))
    return tokens / seconds


async def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_arguments(parser)
    args = parser.parse_args()
    settings = EmbeddedSettings(model=str(ROOT / "examples/tiny/bases/large"), threads=1)
    engine = EmbeddedEngine("tiny", settings)
    await engine.start()
    try:
        await measure(engine, 8, 8)  # the first steps are slower
        rows = []
        for at_once in (1, IN_FLIGHT, 2 * IN_FLIGHT):
            rate = await measure(engine, 16 if args.quick else 96, at_once)
            rows.append({"at once": at_once, "tokens/s of one answer": rate})
    finally:
        await engine.close()
    show(rows, args, title="Speed of the embedded engine")


if __name__ == "__main__":
    asyncio.run(main())
