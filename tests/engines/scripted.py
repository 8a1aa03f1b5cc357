"""A server whose model says what a function of the prompt's last message tells it to: for what only
a capable LLM could write. Over real HTTP on loopback, as `upstream.py`, whose faults it has."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.engines.upstream import FakeVllm, Seen, serve

__all__ = ["Scripted", "chooses", "expert_of", "serve", "text_of"]

Script = Callable[[str], str]


def _nothing(text: str) -> str:
    return ""


@dataclass
class Scripted(FakeVllm):
    """`script` is handed the last message's text."""

    enable_lora: bool = False
    max_model_len: int = 8192
    script: Script = _nothing

    def words(self, seen: Seen) -> list[str]:
        """The answer's tokens: words with the space before them."""
        return re.findall(r"\s*\S+", self.script(text_of(seen)))[: self.limit(seen.body)]

    @property
    def server(self) -> dict[str, Any]:
        """An entry of `servers`."""
        return {"engine": "openai", "url": self.url, "model": self.served_name}


def text_of(seen: Seen) -> str:
    return str(seen.body["messages"][-1]["content"])


def chooses(*best: str, instruction: str = "") -> Script:
    """Writes this instruction where it is asked for one, and where it is asked for the worst expert
    names the first that is none of `best`, else the last of these that is there."""

    def script(text: str) -> str:
        listed = re.findall(r"^(\d+)\. ([\w-]+):", text, re.MULTILINE)
        if not listed:
            return instruction
        for number, expert in listed:
            if expert not in best:
                return str(number)
        return max(listed, key=lambda entry: best.index(entry[1]))[0]

    return script


def expert_of(text: str, number: int) -> str:
    """Whom a number of an elimination's prompt stands for."""
    return dict(re.findall(r"^(\d+)\. ([\w-]+):", text, re.MULTILINE))[str(number)]
