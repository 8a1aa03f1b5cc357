"""The weights of a call's gate by token, as they are told: kept within limits, names for columns.
Knows no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from composer.adapters.gates.groups import Groups
from composer.types import GateTrace, TokenGates

MOST_TOKENS = 1024
"""Told of a prompt (its last ones), and of each answer (its first ones)."""

TOP = 4
"""Members told for each token and group."""

DIGITS = 4


class CallTrace:
    """Grows with one call; `piece` is a token's text."""

    def __init__(
        self, members: Sequence[str], groups: Groups, n: int, piece: Callable[[int], str]
    ) -> None:
        self._members = tuple(members)
        self._groups = groups.names
        self._piece = piece
        self._prompt: list[TokenGates] = []
        self._answers: list[list[TokenGates]] = [[] for _ in range(n)]
        self._left_out = 0

    def add_prompt(self, tokens: Sequence[int], weights: Tensor) -> None:
        """tokens (t,), weights (t, G, E)."""
        self._left_out += max(0, len(tokens) - MOST_TOKENS)
        self._prompt = [
            self._token(token, own)
            for token, own in zip(
                tokens[-MOST_TOKENS:], weights[-MOST_TOKENS:].tolist(), strict=True
            )
        ]

    def add(self, index: int, token: int, weights: Tensor) -> None:
        """A token of the answer `index` with the weights (G, E) that it was written with."""
        if len(self._answers[index]) == MOST_TOKENS:
            self._left_out += 1
            return
        self._answers[index].append(self._token(token, weights.tolist()))

    def told(self) -> GateTrace:
        answers = tuple(tuple(answer) for answer in self._answers)
        return GateTrace(self._members, tuple(self._prompt), answers, self._left_out)

    def _token(self, token: int, weights: Sequence[Sequence[float]]) -> TokenGates:
        told = {}
        for group, own in zip(self._groups, weights, strict=True):
            best = sorted(zip(own, self._members, strict=True), key=lambda pair: -pair[0])[:TOP]
            told[group] = {
                name: round(weight, DIGITS) for weight, name in best if weight >= 10**-DIGITS
            }
        return TokenGates(self._piece(token), told)
