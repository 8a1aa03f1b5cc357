"""A gate in one of vLLM's linear layers: which modules it packs, what of their tensors belongs on
this rank, and the linear method that adds the delta. Knows no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)

from composer.adapters.gates.files import GatedModule
from composer.adapters.gates.projection import Normalise
from composer.adapters.gates.selection import Selection
from composer.vllm_plugin.layer import GatedLinear, Matrix, Part


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of the layer's output that is sharded by itself. `rank` is the shard that this
    process holds, of `shards`; k and v have fewer shards than processes where heads are few."""

    width: int
    rank: int
    shards: int

    @property
    def full(self) -> int:
        return self.width * self.shards

    def own(self, b: Tensor) -> Tensor:
        return b.narrow(0, self.rank * self.width, self.width)


class VllmMatrix(Matrix):
    """A matrix that vLLM packs and multiplies as it does its own."""

    def __init__(self, d_out: int, d_in: int, dtype: torch.dtype) -> None:
        super().__init__(d_out, d_in, dtype)
        self.quant_method: Any = UnquantizedLinearMethod()

    def times(self, x: Tensor) -> Tensor:
        out: Tensor = self.quant_method.apply(self, x, None)
        return out


class GatedLinearMethod(LinearMethodBase):  # type: ignore[misc]  # vLLM has no types here
    """The layer's own method, and the gate's delta on what it gives. A method and not a wrapper of
    the layer, for vLLM's LoRA layers call the method and not the layer."""

    def __init__(self, base: Any) -> None:
        self.base = base

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["base"], name)

    def create_weights(self, *args: Any, **kwargs: Any) -> None:
        self.base.create_weights(*args, **kwargs)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.base.process_weights_after_loading(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        out: Tensor = layer.gated(x, self.base.apply(layer, x, bias))
        return out


def pieces_of(layer: Any) -> list[Piece]:
    """The layer's output, stretch by stretch, as this process holds it."""
    rank, size = layer.tp_rank, layer.tp_size
    if not isinstance(layer, ColumnParallelLinear):
        return [Piece(width, 0, 1) for width in layer.output_partition_sizes]
    pieces = [Piece(width, rank, size) for width in layer.output_partition_sizes]
    if isinstance(layer, QKVParallelLinear):
        copies = layer.num_kv_head_replicas
        pieces[1:] = [Piece(p.width, rank // copies, size // copies) for p in pieces[1:]]
    return pieces


@dataclass(frozen=True, slots=True)
class Gated:
    """A layer with its gate. `modules` are those of the checkpoint that have one, in the order of
    its output, `pieces` the stretches of each."""

    layer: Any
    modules: tuple[str, ...]
    pieces: tuple[tuple[Piece, ...], ...]

    @property
    def names(self) -> list[str]:
        """Of its parameters, below the layer."""
        return [f"gated.{name}" for name, _ in self.layer.gated.named_parameters()]

    def load(self, module: str, part: str, tensor: Tensor) -> None:
        """Raises ValueError for a tensor of another shape than the layer's."""
        index = self.modules.index(module)
        pieces, layer = self.pieces[index], self.layer
        row = isinstance(layer, RowParallelLinear) and layer.tp_size > 1
        want = list(layer.gated.shapes(index)[part])
        if part == "b":
            want[0] = sum(piece.full for piece in pieces)
        elif part in ("a", "rows") and row:
            want[1] *= layer.tp_size
        if list(tensor.shape) != want:
            raise ValueError(
                f"{module}: {part} is {list(tensor.shape)}, and the layer asks for {want}; compose "
                "the gate with the model that it was made for"
            )
        if part == "b":
            stretches = torch.split(tensor, [piece.full for piece in pieces])
            tensor = torch.cat([p.own(s) for p, s in zip(pieces, stretches, strict=True)])
        elif part in ("a", "rows") and row:
            width = want[1] // layer.tp_size
            tensor = tensor.narrow(1, layer.tp_rank * width, width)
        layer.gated.fill(index, part, tensor)


def attach(
    name: str,
    layer: Any,
    packed: Sequence[str],
    gates: Mapping[str, GatedModule],
    normalise: Normalise,
    selection: Selection,
) -> Gated:
    """Gives the layer called `name` its part of the gate, still empty. `packed`: the last names of
    the modules that it packs, empty for one that stands for itself; `gates`: module → gate, of
    those that it packs. Raises ValueError for a layer that no gate can be put on."""
    if not isinstance(layer, LinearBase):
        raise ValueError(
            f"{name} is a {type(layer).__name__}, and gates are for linear layers; leave it out"
        )
    pieces = pieces_of(layer)
    parent = name.rpartition(".")[0]
    own = [f"{parent}.{last}" if parent else last for last in packed] or [name]
    if packed and len(packed) != len(pieces):
        raise ValueError(f"{name} packs its modules in a way that is not known here; leave it out")
    stretches = [(piece,) for piece in pieces] if packed else [tuple(pieces)]
    parts = [
        Part(sum(piece.width for piece in some), gates.get(module))
        for module, some in zip(own, stretches, strict=True)
    ]
    row = isinstance(layer, RowParallelLinear) and layer.tp_size > 1
    layer.gated = GatedLinear(
        layer.input_size_per_partition if row else layer.input_size,
        parts,
        normalise,
        layer.params_dtype,
        selection=selection,
        full=layer.input_size,
        reduce=tensor_model_parallel_all_reduce if row else None,
        matrix=VllmMatrix,
    )
    layer.quant_method = GatedLinearMethod(layer.quant_method)
    chosen = [(m, s) for m, s in zip(own, stretches, strict=True) if m in gates]
    return Gated(layer, tuple(m for m, _ in chosen), tuple(s for _, s in chosen))
