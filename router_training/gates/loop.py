"""The one loop that trains every gate: the model and its adapters stay as they are. Knows no kind
of gate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from router_training.errors import TrainingError
from router_training.gates.batches import IGNORED, Batch
from router_training.progress import Progress, silent

WARM_UP, DECAY_FROM = 0.05, 0.6
"""Shares of the steps: the rate rises until the first, and falls from the second on."""


class Steps(BaseModel):
    """How long and how fast a gate is trained."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(300, ge=1)
    learning_rate: float = Field(5e-3, gt=0)
    tokens: int = Field(1500, ge=1, description="Of a batch, padding included.")


def answer_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The mean cross-entropy of the answers' tokens, in float32."""
    logits = model(input_ids=batch.ids).logits[:, :-1]  # (rows, columns - 1, vocabulary)
    return nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), batch.labels[:, 1:].flatten(), ignore_index=IGNORED
    )


def fit(
    parameters: Sequence[nn.Parameter],
    loss_of: Callable[[Batch], Tensor],
    stream: Iterator[Batch],
    how: Steps,
    progress: Progress = silent,
    label: str = "steps",
) -> dict[str, Any]:
    """Moves `parameters` by Adam for `how.steps` batches of `stream`; gives the loss of the first
    batch and the mean of the last tenth. Raises TrainingError where the loss is no number."""
    optimiser = torch.optim.Adam(parameters, lr=how.learning_rate, betas=(0.9, 0.98))
    losses: list[float] = []
    for step in range(how.steps):
        for group in optimiser.param_groups:
            group["lr"] = how.learning_rate * _rate(step / how.steps)
        loss = loss_of(next(stream))
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise TrainingError(
                f"the loss is {losses[-1]} at step {step}; lower `learning_rate`, or look for "
                "questions without an answer"
            )
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        progress(label, step + 1, how.steps)
    tail = losses[-max(1, len(losses) // 10) :]
    return {"first_loss": losses[0], "last_loss": sum(tail) / len(tail)}


def _rate(done: float) -> float:
    rising = min(1.0, (done + 1e-3) / WARM_UP)
    falling = min(1.0, (1.0 - done) / (1.0 - DECAY_FROM))
    return max(0.02, rising * falling)
