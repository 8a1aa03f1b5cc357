"""Run by vLLM's interpreter: what the model class refuses, on a model of one linear layer. Prints
"equal" when each refusal was that which was expected.

    python refusals.py FOLDER
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.layers.linear import ReplicatedLinear

from composer.adapters.gates.files import GatedModule, Manifest, members_of
from composer.adapters.gates.selection import Selection
from composer.vllm_plugin import check_version
from composer.vllm_plugin.model import GatedModel


class Base(nn.Module):
    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        self.up = ReplicatedLinear(8, 6, bias=False, disable_tp=True)
        self.norm = nn.LayerNorm(8)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return {name for name, _ in weights}


class Gated(GatedModel, Base):
    pass


def config(module: str = "up", **changes: Any) -> Any:
    manifest = Manifest(
        kind="softmax",
        base=None,
        members=members_of(["x", "y"], ["1", "2"]),
        normalise="none",
        selection=Selection(top_k=1),
        modules={module: GatedModule(ranks=(2, 1))},
    )
    told = {"gated_adapter": manifest.model_dump(mode="json")} | changes.pop("told", {})
    model = SimpleNamespace(
        hf_config=SimpleNamespace(to_dict=lambda: told), model="folder", revision=None
    )
    return SimpleNamespace(model_config=model, quant_config=None, **changes)


def tensors(**changes: Tensor | None) -> list[tuple[str, Tensor]]:
    own = {"a": torch.ones(3, 8), "b": torch.ones(6, 3), "rows": torch.ones(2, 8)} | changes
    found = [(f"gated_adapter.up.gate.{k}", v) for k, v in own.items() if v is not None]
    return [("up.weight", torch.ones(6, 8)), *found]


def refused(message: str, what: Any, error: type[Exception] = ValueError) -> None:
    said = ""
    try:
        what()
    except error as raised:
        said = str(raised)
    assert message in said, (message, said or "nothing was raised")


def main() -> None:
    model = Gated(vllm_config=config())
    loaded = model.load_weights(tensors())
    assert loaded == {"up.weight", *(n for n, _ in model.named_parameters() if "gated" in n)}
    assert [source.subfolder for source in model.secondary_weights] == ["gate"]

    for part in ("a", "b", "rows"):
        refused("1 of the gate's tensors did not arrive", lambda p=part: load(**{p: None}))
    refused("3 of the gate's tensors did not arrive", lambda: load(a=None, b=None, rows=None))
    refused("the layer asks for [3, 8]", lambda: load(a=torch.ones(4, 8)))
    stray = [*tensors(), ("gated_adapter.down.gate.a", torch.ones(1))]
    refused("of no gated layer", lambda: model.load_weights(stray))
    refused("no linear layer", lambda: Gated(vllm_config=config("elsewhere")))
    refused("gates are for linear layers", lambda: Gated(vllm_config=config("norm")))
    refused(
        "has no 'gated_adapter'", lambda: Gated(vllm_config=config(told={"gated_adapter": None}))
    )
    refused(
        "compose the folder again", lambda: Gated(vllm_config=config(told={"gated_adapter": {}}))
    )
    quantised = config()
    quantised.quant_config = "fp8"
    refused("never tested", lambda: Gated(vllm_config=quantised))
    refused("tested with vLLM 0.32 to 0.32", lambda: check_version("0.33.0"), RuntimeError)
    check_version("0.32.1rc1")
    print("equal")


def load(**changes: Tensor | None) -> None:
    Gated(vllm_config=config()).load_weights(tensors(**changes))


if __name__ == "__main__":
    os.environ["VLLM_DIST_IDENT"] = Path(sys.argv[1]).name
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{sys.argv[1]}/meet", 0, "gloo")
        initialize_model_parallel(1)
        main()
