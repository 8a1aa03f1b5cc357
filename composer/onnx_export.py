"""Makes a sentence-transformers model's ONNX file, once, and checks it against torch. Knows
nothing of how either is used."""

from __future__ import annotations

import json
import logging
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from composer.encoders import (
    Manifest,
    ModelFiles,
    OnnxEncoder,
    max_tokens_of,
    sentence_transformer,
    sha256,
    unit_rows,
)

log = logging.getLogger(__name__)

MIN_COSINE = 0.9999
"""An export whose vector of any check text is further from torch's than this is refused."""

FORMAT = 1
"""Of the folder an export is kept in; counts up when its contents change meaning."""


class ExportRefused(Exception):
    """The exported graph does not compute what the model computes."""


def exported(files: ModelFiles, cache_dir: Path, threads: int) -> tuple[Path, Manifest]:
    """The folder of this model's export and its manifest, made now if it is not there or broken.

    Written beside its place and renamed, so that a killed process leaves nothing half-made and
    two processes at once do not disturb each other.
    """
    folder = cache_dir / "embedder" / f"{files.digest[:16]}-{FORMAT}"
    manifest = _read_manifest(folder, files)
    if manifest is not None:
        return folder, manifest
    if folder.exists():
        log.warning("the ONNX export in %s is incomplete or altered; making it again", folder)
        shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    log.info("exporting embedder %r to ONNX, once; it is kept in %s", files.id, folder)
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".export-"))
    try:
        _export(files, draft, threads)
        try:
            draft.rename(folder)
        except OSError:  # another process was first
            if _read_manifest(folder, files) is None:
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    manifest = _read_manifest(folder, files)
    if manifest is None:
        raise OSError(f"{folder} changed while it was read")
    return folder, manifest


def _read_manifest(folder: Path, files: ModelFiles) -> Manifest | None:
    """None unless the folder is whole and made from this very model."""
    try:
        manifest = Manifest(**json.loads((folder / "manifest.json").read_text("utf-8")))
        whole = (
            manifest.format == FORMAT
            and manifest.digest == files.digest
            and manifest.onnx_sha256 == sha256(folder / "model.onnx")
            and manifest.tokenizer_sha256 == sha256(folder / "tokenizer.json")
        )
    except (OSError, TypeError, ValueError):
        return None
    return manifest if whole else None


def _export(files: ModelFiles, folder: Path, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    # Eager attention exports as plain matrix products, which onnxruntime runs faster on a CPU
    # than its fused attention (measured: 8.6 against 8.9 ms at 32 tokens).
    model = sentence_transformer(files.path, attn_implementation="eager")

    class Graph(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            features = self.model({"input_ids": input_ids, "attention_mask": attention_mask})
            vectors: torch.Tensor = features["sentence_embedding"]  # (b, d)
            return torch.nn.functional.normalize(vectors, dim=-1)

    tokenizer = model.tokenizer
    sample = tokenizer(["two texts", "of different length"], padding=True, return_tensors="pt")
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    axes = {0: "batch", 1: "tokens"}
    with warnings.catch_warnings(), torch.no_grad():
        # The TorchScript exporter is deprecated, yet its graph runs 4 to 8 % faster here than
        # the new one's and takes 2 s instead of 10. Its tracing is why every export is checked.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Graph().eval(),
            (sample["input_ids"], sample["attention_mask"]),
            str(folder / "model.onnx"),
            dynamo=False,
            opset_version=17,
            input_names=["input_ids", "attention_mask"],
            output_names=["sentence_embedding"],
            dynamic_axes={
                "input_ids": axes,
                "attention_mask": axes,
                "sentence_embedding": {0: "batch"},
            },
        )
    manifest = Manifest(
        format=FORMAT,
        model=files.id,
        digest=files.digest,
        onnx_sha256=sha256(folder / "model.onnx"),
        tokenizer_sha256=sha256(folder / "tokenizer.json"),
        dim=int(unit_rows(model, ["dimension"]).shape[1]),
        max_tokens=max_tokens_of(model),
        pad_id=int(tokenizer.pad_token_id or 0),
        prompt=str((model.prompts or {}).get(model.default_prompt_name or "") or ""),
        min_cosine=0.0,
        torch_ms=0.0,
        onnx_ms=0.0,
    )
    onnx = OnnxEncoder(files, folder, manifest, threads)
    measured = asdict(manifest) | _compare(sentence_transformer(files.path), onnx)
    with (folder / "manifest.json").open("w", encoding="utf-8") as file:
        json.dump(measured, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


CHECK_TEXTS = (
    "",
    "fox",
    "please write fox in capital letters",
    "PLEASE Write Fox In CAPITAL letters!",
    "¿Cuánto cuesta el café — 3,50 € o más? 日本語",
    "def f(x):\n    return x ** 2  # squares\n",
    "how much money do I have in my account, and is it enough for the rent that is due today? " * 2,
    "a text that is longer than the model reads, so that both must cut it at one place " * 40,
)


def _compare(model: Any, onnx: OnnxEncoder) -> dict[str, float]:
    """Cosine and milliseconds of both sides. Raises ExportRefused when the vectors differ."""
    expected = unit_rows(model, CHECK_TEXTS)  # (n, d)
    together = onnx.encode(CHECK_TEXTS)
    alone = np.concatenate([onnx.encode([text]) for text in CHECK_TEXTS])
    cosine = float(min((expected * together).sum(1).min(), (expected * alone).sum(1).min()))
    if not cosine >= MIN_COSINE:  # NaN fails, too
        raise ExportRefused(
            f"the exported graph's vectors differ from torch's (lowest cosine {cosine:.6f}, "
            f"needed {MIN_COSINE})"
        )
    text = "please tell me how much money is left in my account today and what I can do with it"
    onnx_ms, torch_ms = [], []
    for _ in range(15):  # interleaved: a busy neighbour slows both
        onnx_ms.append(_milliseconds(lambda: onnx.encode([text])))
        torch_ms.append(_milliseconds(lambda: unit_rows(model, [text])))
    return {
        "min_cosine": cosine,
        "onnx_ms": statistics.median(onnx_ms),
        "torch_ms": statistics.median(torch_ms),
    }


def _milliseconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3
