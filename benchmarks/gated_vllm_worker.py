"""Run by vLLM's interpreter for `gated_vllm.py`: one model in this process, timed on demand. Reads
a JSON object a line and answers with one after `RESULT `. Knows no other model and no comparison.
"""

from __future__ import annotations

import json
import statistics
import sys
from time import perf_counter
from typing import Any

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

WARM_UP = 4
"""Tokens of an answer before anything is timed."""


def main() -> None:
    told = json.loads(sys.argv[1])
    llm = LLM(**told["llm"])
    lora = LoRARequest("one", 1, told["lora"]) if told.get("lora") else None
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    steps = _watched(runner.model)
    generate(llm, lora, 1, WARM_UP)
    generate(llm, lora, 16, WARM_UP)
    _say({"ready": True})
    for line in sys.stdin:
        asked = json.loads(line)
        steps.clear()
        began = perf_counter()
        generate(llm, lora, asked["at_once"], asked["tokens"])
        seconds = perf_counter() - began
        decoding = steps[1:]  # the first reads the prompts
        _say(
            {
                "tokens_per_s": asked["at_once"] * asked["tokens"] / seconds,
                "forward_ms": 1000 * statistics.median(decoding),
            }
        )


def generate(llm: LLM, lora: LoRARequest | None, at_once: int, tokens: int) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True)
    prompts = [{"prompt_token_ids": [10 + i + j for j in range(16)]} for i in range(at_once)]
    answers = llm.generate(prompts, params, lora_request=lora, use_tqdm=False)
    assert all(len(answer.outputs[0].token_ids) == tokens for answer in answers)


def _watched(model: Any) -> list[float]:
    """The seconds of each forward pass, as they are made."""
    seconds: list[float] = []
    forward = model.forward

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = perf_counter()
        out = forward(*args, **kwargs)
        seconds.append(perf_counter() - began)
        return out

    model.forward = timed
    return seconds


def _say(told: dict[str, Any]) -> None:
    print(f"RESULT {json.dumps(told)}", flush=True)


if __name__ == "__main__":
    main()
