"""A gate at work in a torch model: forward hooks on its linear layers add what the members say. For
training and for measuring; knows no cache, no request and no file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn

from composer.adapters.gates.stacked import GatedLayer

Weigh = Callable[[str, GatedLayer, Tensor], Tensor]
"""(module, its layer, x (…, d_in)) → weights (…, E) of the members."""


def by_gate(module: str, layer: GatedLayer, x: Tensor) -> Tensor:
    """The weights that each layer's own gate gives to its input."""
    return layer.weights(x)


class Installed:
    """The layers of a gate, added to those of `model` until `remove`, or the end of a `with`. The
    model itself is not changed; the members' factors are taken in its dtype. `weigh` decides the
    weights of each layer; None: the base model alone, as in the first pass of X-LoRA. Autograd goes
    through."""

    def __init__(
        self, model: nn.Module, layers: Mapping[str, GatedLayer], weigh: Weigh | None = by_gate
    ) -> None:
        """Raises ValueError where the model lacks a layer, or has it in another size."""
        found = dict(model.named_modules())
        here: dict[str, GatedLayer] = {}
        for module, layer in layers.items():
            size = getattr(found.get(module), "weight", None)
            want = (layer.stacked.b.shape[0], layer.stacked.a.shape[1])
            if size is None or tuple(size.shape) != want:
                has = "no such layer" if size is None else f"one of {tuple(size.shape)}"
                raise ValueError(
                    f"the gate has a layer {module} of {want}, the model {has}; use the gate's own "
                    "base model"
                )
            here[module] = layer.to(size.device, size.dtype)
        self.layers = here
        self.weigh = weigh
        self._hooks = [
            found[module].register_forward_hook(self._adding(module)) for module in self.layers
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def _adding(self, module: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
        def add(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if self.weigh is None:
                return None
            x: Tensor = args[0]
            layer = self.layers[module]
            return output + layer.stacked.delta(x, self.weigh(module, layer, x)).to(output.dtype)

        return add
