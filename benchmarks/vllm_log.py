"""How often a vLLM server loaded adapters, out of its log at level DEBUG
(`VLLM_LOGGING_LEVEL=DEBUG` in its environment). Lines as of vLLM 0.32, lora/model_manager.py.
Knows no server."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

_READ = re.compile(r"Adding lora\. Model id: (\d+),")
_MOVED = re.compile(r"Activating LoRA\. int id: (\d+),")


@dataclass(frozen=True, slots=True)
class AdapterLoads:
    """By the server's own number of an adapter: `read`, from disk into its memory
    (`max_cpu_loras`); `moved`, from there into a slot of the batch (`max_loras`)."""

    read: Counter[int]
    moved: Counter[int]

    def __sub__(self, earlier: AdapterLoads) -> AdapterLoads:
        return AdapterLoads(self.read - earlier.read, self.moved - earlier.moved)


def adapter_loads(log: Path) -> AdapterLoads:
    """All since the log began. With several workers each of them counts."""
    text = log.read_text(errors="replace")
    return AdapterLoads(
        read=Counter(map(int, _READ.findall(text))), moved=Counter(map(int, _MOVED.findall(text)))
    )
