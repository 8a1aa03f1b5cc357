"""The upper layers of the bundled encoder, tuned to who answers which questions. Knows no router
and no file of outcomes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from composer.encoders import BUNDLED, find_model
from composer.types import BoolArray, FloatArray
from router_training.progress import Progress, silent

Objective = Literal["contrast", "ranking"]
"""`contrast`: near are questions that the same experts are unusually good at. `ranking`: a linear
head on the vector tells each expert's chance, and of two experts the better one."""

OBJECTIVES: tuple[Objective, ...] = get_args(Objective)

LAYERS = 2
"""Tuned, of six; what the others make of a text is computed once."""

TOKENS = 96
"""Where texts are cut: one in six or fewer of the questions without options is longer."""

RATE = 1e-4
HEAD_RATE = 5e-3
BATCH: dict[Objective, int] = {"contrast": 128, "ranking": 64}
PASS = 32
"""Texts of like length that go through the layers together."""

OUTCOME_TEMPERATURE = 0.3
VECTOR_TEMPERATURE = 0.05
HEAD_SCALE = 10.0
HEAD_PENALTY = 1e-4
CLOSENESS = 0.1
"""An expert of mean m counts as exp((m − highest mean) / CLOSENESS): decisions fall between the
best few."""


@dataclass(frozen=True, slots=True, eq=False)
class Taught:
    """What (n,) questions teach: `quality` (n, E) with 0 where it is not `known`, `start` (E,) the
    experts' logits before any question is read, `weight` (E,) how much each counts, `special`
    (n, E) unit rows of how far each expert is above its mean and above the others on that
    question, 0 where all are alike."""

    quality: FloatArray
    known: BoolArray
    start: FloatArray
    weight: FloatArray
    special: FloatArray

    @classmethod
    def of(cls, quality: FloatArray) -> Taught:
        """(n, E), NaN where missing."""
        known = ~np.isnan(quality)
        mean = np.nanmean(quality, axis=0)
        weight = np.exp((mean - mean.max()) / CLOSENESS)
        off = np.where(known, quality - mean, 0)
        count = np.maximum(known.sum(axis=1, keepdims=True), 1)
        special = np.where(known, off - off.sum(axis=1, keepdims=True) / count, 0) * np.sqrt(weight)
        length = np.linalg.norm(special, axis=1, keepdims=True)
        special = np.where(length > 1e-6, special / np.maximum(length, 1e-6), 0)
        odds = np.clip(mean, 0.02, 0.98)
        return cls(
            np.nan_to_num(quality).astype(np.float32),
            np.asarray(known, np.bool_),
            np.log(odds / (1 - odds)).astype(np.float32),
            weight.astype(np.float32),
            special.astype(np.float32),
        )


class Tuner:
    """(n,) texts, read once by the frozen layers, whose vectors are then tuned as often as asked:
    one thread, bfloat16 where torch thinks fit, the same for the same seed."""

    def __init__(self, texts: Sequence[str], progress: Progress = silent) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer

        torch.set_num_threads(1)
        self._torch, self._progress = torch, progress
        path = find_model(BUNDLED[0]).path
        tokenizer: Any = AutoTokenizer.from_pretrained(path)
        model: Any = AutoModel.from_pretrained(path).eval()
        tokens = tokenizer(list(texts), truncation=True, max_length=TOKENS)["input_ids"]
        self._size = np.array([len(ids) for ids in tokens])
        self._start = np.concatenate([[0], np.cumsum(self._size)])
        layers = model.encoder.layer
        self._upper = layers[len(layers) - LAYERS :]
        self._states = np.empty((self._start[-1], model.config.hidden_size), np.float16)
        passes = list(self._alike(np.arange(len(texts))))
        with torch.no_grad():
            for done, rows in enumerate(passes):
                ids = np.zeros((len(rows), self._size[rows].max()), np.int64)
                for place, row in enumerate(rows):
                    ids[place, : self._size[row]] = tokens[row]
                with self._half():
                    read = model.embeddings(input_ids=torch.from_numpy(ids))
                    read = self._through(layers[: len(layers) - LAYERS], read, self._mask(rows))
                states = read.float().numpy()
                for place, row in enumerate(rows):
                    own = slice(self._start[row], self._start[row + 1])
                    self._states[own] = states[place, : self._size[row]]
                progress("lower layers", done + 1, len(passes))

    def vectors(
        self,
        quality: FloatArray,
        seen: npt.NDArray[np.intp],
        objective: Objective,
        epochs: int,
        seed: int = 0,
    ) -> FloatArray:
        """(n, d) unit rows of all texts, tuned to the outcomes `quality` (n, E) of the rows `seen`
        alone. By AdamW; the rate rises over a tenth of the steps and falls linearly to 0."""
        torch = self._torch
        torch.manual_seed(seed)
        rng = np.random.default_rng(seed)
        layers = copy.deepcopy(self._upper).train()
        taught = Taught.of(quality[seen])
        head = torch.zeros(self._states.shape[1], quality.shape[1], requires_grad=True)
        bias = torch.from_numpy(taught.start.copy()).requires_grad_()
        body = list(layers.parameters())
        groups = [{"params": body, "lr": RATE, "weight_decay": 0.01}]
        if objective == "ranking":
            groups.append({"params": [head, bias], "lr": HEAD_RATE, "weight_decay": 0.0})
        adam = torch.optim.AdamW(groups)
        size = BATCH[objective]
        steps = [
            batch
            for _ in range(epochs)
            for batch in np.array_split(rng.permutation(len(seen)), -(-len(seen) // size))
        ]
        schedule = torch.optim.lr_scheduler.LambdaLR(
            adam, lambda s: min(1, 10 * (s + 1) / len(steps)) * (1 - s / len(steps))
        )
        for step, batch in enumerate(steps):
            z = self._encoded(layers, seen[batch])
            if objective == "contrast":
                loss = contrast(z, torch.from_numpy(taught.special[batch]))
            else:
                loss = ranking(HEAD_SCALE * z @ head + bias, taught, batch)
                loss = loss + HEAD_PENALTY * ((HEAD_SCALE * head) ** 2).sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(body, 1.0)
            adam.step()
            schedule.step()
            adam.zero_grad(set_to_none=True)
            self._progress(f"{objective}: steps", step + 1, len(steps))
        with torch.no_grad():
            out: FloatArray = self._encoded(layers.eval(), np.arange(len(self._size))).numpy()
        return out

    def _encoded(self, layers: Any, rows: npt.NDArray[np.intp]) -> Any:
        """(b,) rows → (b, d) unit vectors, in passes of like length."""
        torch = self._torch
        out, order = [], []
        for part in self._alike(rows):
            some = rows[part]
            states = np.zeros((len(some), self._size[some].max(), self._states.shape[1]))
            states = states.astype(np.float32)
            for place, row in enumerate(some):
                own = slice(self._start[row], self._start[row + 1])
                states[place, : self._size[row]] = self._states[own]
            mask = self._mask(some)
            with self._half():
                read = self._through(layers, torch.from_numpy(states), mask)
            shown = mask[:, :, None].float()
            mean = (read.float() * shown).sum(1) / shown.sum(1)
            out.append(torch.nn.functional.normalize(mean, dim=1))
            order.append(part)
        return torch.cat(out)[torch.from_numpy(np.argsort(np.concatenate(order)))]

    def _alike(self, rows: npt.NDArray[np.intp]) -> Iterator[npt.NDArray[np.intp]]:
        """Places among `rows`, the short texts first."""
        order = np.argsort(self._size[rows], kind="stable")
        for start in range(0, len(order), PASS):
            yield order[start : start + PASS]

    def _mask(self, rows: npt.NDArray[np.intp]) -> Any:
        size = self._torch.from_numpy(self._size[rows])
        return self._torch.arange(int(size.max()))[None] < size[:, None]

    def _half(self) -> Any:
        return self._torch.autocast("cpu", self._torch.bfloat16)

    def _through(self, layers: Any, states: Any, mask: Any) -> Any:
        away = self._torch.zeros(mask.shape).masked_fill(~mask, -1e4)[:, None, None, :]
        for layer in layers:
            out = layer(states, attention_mask=away)
            states = out[0] if isinstance(out, tuple) else out  # by version of transformers
        return states


def contrast(z: Any, special: Any) -> Any:
    """Soft nearest neighbours: (b, d) unit vectors are to be as near as `special` (b, E) unit rows
    are, both as distributions over the rest of the batch; the mean divergence. Rows that are 0 are
    left out."""
    import torch

    tells = special.abs().sum(1) > 0
    z, special = z[tells], special[tells]
    if len(z) < 3:
        return 0 * z.sum()
    own = torch.eye(len(z), dtype=torch.bool)
    wanted = (special @ special.T / OUTCOME_TEMPERATURE).masked_fill(own, -1e9).softmax(1)
    found = (z @ z.T / VECTOR_TEMPERATURE).masked_fill(own, -1e9).log_softmax(1)
    return torch.nn.functional.kl_div(found, wanted, reduction="batchmean")


def ranking(logits: Any, taught: Taught, batch: npt.NDArray[np.intp]) -> Any:
    """Log loss of (b, E) logits over the known outcomes, and the logistic loss of the difference
    between each two experts that fared differently, who count by their weights."""
    import torch

    quality = torch.from_numpy(taught.quality[batch])
    known = torch.from_numpy(taught.known[batch])
    weight = torch.from_numpy(taught.weight)
    each = torch.nn.functional.binary_cross_entropy_with_logits(logits, quality, reduction="none")
    over = (quality[:, :, None] - quality[:, None]).clamp(min=0)  # (b, E, E)
    over = over * (known[:, :, None] & known[:, None]) * weight[:, None] * weight
    pairs = torch.nn.functional.softplus(logits[:, None] - logits[:, :, None]) * over
    return (each * known).sum() / known.sum() + pairs.sum() / over.sum().clamp(min=1e-6)
