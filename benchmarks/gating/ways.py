"""Ways of mixing members, each as the weights that it gives: one for a query, one for a segment, or
a gate's own for every token and module. Knows no question's answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.gating.answering import Read
from composer.adapters.factors import Modules
from composer.adapters.gates.averaging import PromptMeans
from composer.adapters.gates.files import Gate
from composer.adapters.gates.hooks import Installed, Weigh
from composer.adapters.gates.projection import Projection
from composer.adapters.gates.selection import Selection
from composer.adapters.gates.stacked import GatedLayer, Stacked
from composer.adapters.gates.xlora import features


class Nobody:
    """The base model alone."""

    layers: Mapping[str, GatedLayer] = {}
    routes = False

    def weigh(self, model: Any, installed: Installed, read: Read) -> Weigh | None:
        return None


class Merged(Nobody):
    """One adapter, whatever is asked."""

    def __init__(self, modules: Modules) -> None:
        self.layers = {
            module: GatedLayer(
                Stacked.of([factors], torch.float32),
                Projection(torch.zeros(1, factors.a.shape[1])),
                Selection(),
            )
            for module, factors in modules.items()
        }

    def weigh(self, model: Any, installed: Installed, read: Read) -> Weigh | None:
        return lambda module, layer, x: x.new_ones(1)


class PerQuery(Nobody):
    """`weights` (n, E) of each question, in all modules and at all tokens: what a composed adapter
    of the same weights (cat) gives exactly."""

    routes = True

    def __init__(self, layers: Mapping[str, GatedLayer], weights: Tensor) -> None:
        self.layers, self.weights = layers, weights

    def weigh(self, model: Any, installed: Installed, read: Read) -> Weigh | None:
        here = self.weights[read.rows][:, None]  # (B, 1, E)
        return lambda module, layer, x: here


class PerSegment(Nobody):
    """`members` (n, 2): the one of the first segment of each question, and of the second. At most
    what switching adapters at the true boundary can do."""

    routes = True

    def __init__(self, layers: Mapping[str, GatedLayer], members: Tensor, count: int) -> None:
        self.layers, self._members, self._one_hot = layers, members, torch.eye(count)

    def weigh(self, model: Any, installed: Installed, read: Read) -> Weigh | None:
        here = self._one_hot[self._members[read.rows].gather(1, read.segments)]
        return lambda module, layer, x: here


class PerToken(Nobody):
    """A gate as the engines serve it. `prior` (n, E): GLIDER's logits for each question."""

    routes = True

    def __init__(self, gate: Gate, prior: Tensor | None = None) -> None:
        self.layers, self.gate, self._prior = gate.layers, gate, prior

    def weigh(self, model: Any, installed: Installed, read: Read) -> Weigh | None:
        if self.gate.manifest.passes == 2:
            installed.weigh = None
            hidden = model.get_decoder()(input_ids=read.ids).last_hidden_state
            told = features(self.gate, hidden)
            return lambda module, layer, x: layer.weights(told)
        prior = None if self._prior is None else self._prior[read.rows][:, None]
        return lambda module, layer, x: layer.weights(x, prior)


class Averaged(PerToken):
    """A gate's weights averaged over the prompt's tokens, by module: then one composed adapter
    serves the query, which stock vLLM can."""

    def weigh(self, model: Any, installed: Installed, read: Read) -> Weigh | None:
        of_gate = super().weigh(model, installed, read)
        assert of_gate is not None
        means = PromptMeans(read.prompt & read.real)

        def kept(module: str, layer: GatedLayer, x: Tensor) -> Tensor:
            weights = of_gate(module, layer, x)
            means.add(module, weights)
            return weights

        installed.weigh = kept
        model(input_ids=read.ids)
        return lambda module, layer, x: means.of[module][:, None]
