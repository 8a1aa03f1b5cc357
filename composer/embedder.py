"""Texts to unit vectors for many callers at once: a cache, and one batch for those who arrive
together. Knows nothing of routers or experts; how a model runs is `encoders.py`."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from composer.encoders import Backend, Encoder, OnnxEncoder, TorchEncoder, find_model
from composer.errors import EngineUnavailable, SettingsError
from composer.onnx_export import ExportRefused, exported
from composer.types import FloatArray

log = logging.getLogger(__name__)

BATCH = 16
"""Texts of one batch. Past it one core gains nothing, and those who come next wait longer."""

ENCODE_CHUNK = 512

CHARS_PER_TOKEN = 64
"""A text is cut to this many characters for each token that the model reads, and then tokenised.

The tokenizer reads a text whole before it cuts: 4 MB held the one worker for seconds. English has
four or five characters a token, so the vector is that of the whole text, except where tokens are
longer on average, as with words past 64 characters or long runs of spaces.
"""


def load_embedder(
    name: str,
    *,
    backend: Backend = "auto",
    cache_dir: Path = Path(".cache/composer"),
    cache_size: int = 50_000,
    threads: int = 1,
) -> TextEmbedder:
    """The embedder named by the settings. Blocks: under a second when its ONNX file is there,
    about fifteen for the first start on a machine. Raises SettingsError with the remedy."""
    encoder = load_encoder(name, backend=backend, cache_dir=cache_dir, threads=threads)
    return TextEmbedder(encoder, cache_size=cache_size)


def load_encoder(name: str, *, backend: Backend, cache_dir: Path, threads: int = 1) -> Encoder:
    """The model `name` (bundled name, folder, or hub name) on the backend asked for.

    ONNX runs without importing torch once its file exists. `auto` takes it where the export's
    own check found it no slower than torch on one short text and equal to it (cosine at least
    0.9999 on every check text); otherwise torch, and the log says why. Measured with one thread
    of an EPYC, all-MiniLM-L6-v2, sentence-transformers against ONNX: 8 tokens 15 and 4 ms, 32
    tokens 19 and 9 ms, 256 tokens 95 and 65 ms; lowest cosine 0.9999999. int8 weights would take
    4 ms for 32 tokens and are not offered: their cosines go down to 0.96.

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


@dataclass(slots=True)
class _Wanted:
    """A text someone waits for."""

    key: bytes
    text: str
    waiters: int = 0
    vector: Future[FloatArray] = field(default_factory=Future)


class _Cache:
    """The most recently used vectors by the `_key` of their text."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._rows: OrderedDict[bytes, FloatArray] = OrderedDict()

    def get(self, key: bytes) -> FloatArray | None:
        if (row := self._rows.get(key)) is not None:
            self._rows.move_to_end(key)
        return row

    def put(self, key: bytes, row: FloatArray) -> None:
        if self.size <= 0:
            return
        self._rows[key] = row
        self._rows.move_to_end(key)
        if len(self._rows) > self.size:
            self._rows.popitem(last=False)


class TextEmbedder:
    """Implements `routing.base.Embedder`. Safe from any thread and any event loop.

    Callers of `embed` who arrive while the worker is busy share its next batch, equal texts one
    row of it; an idle worker starts at once, so nobody waits for others to come. A caller who
    leaves takes only their own wish away. Vectors are shared and therefore read-only.

    Of a text longer than `max_chars` characters the beginning is embedded (`CHARS_PER_TOKEN`).
    The caches keep a digest of each text, so their memory does not grow with the texts' length.

    Queries and the experts' own texts (`encode`) are cached apart, so that building a large
    index does not push out what callers ask for. `row_cache_size` bounds the latter: at 384
    dimensions 250,000 rows are 400 MB, held only where a registry is that large.
    """

    def __init__(
        self, encoder: Encoder, *, cache_size: int = 50_000, row_cache_size: int = 250_000
    ) -> None:
        self.id, self.digest, self.dim = encoder.id, encoder.digest, encoder.dim
        self.backend, self.max_tokens = encoder.backend, encoder.max_tokens
        self.max_chars = CHARS_PER_TOKEN * encoder.max_tokens
        self._encoder = encoder
        self._lock = threading.Lock()
        self._queries = _Cache(cache_size)
        self._rows = _Cache(row_cache_size)
        self._waiting: OrderedDict[bytes, _Wanted] = OrderedDict()  # not yet in a batch
        self._running: dict[bytes, _Wanted] = {}
        self._busy = False
        self._closed = False
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="embedder")

    # --- for callers who wait ---------------------------------------------------------

    async def embed(self, text: str) -> FloatArray:
        """One text → (d,) of length 1. Raises EngineUnavailable once closed, and whatever the
        model raised, to every caller of the batch that failed."""
        wanted = self._want(text)
        if isinstance(wanted, np.ndarray):
            return wanted
        try:
            # Shielded: cancelling one caller must not cancel the vector others wait for.
            return await asyncio.shield(asyncio.wrap_future(wanted.vector))
        except asyncio.CancelledError:
            self._leave(wanted)
            raise

    def cached(self, text: str) -> FloatArray | None:
        """The (d,) vector of a text asked for before, if it is still kept."""
        key = _key(text[: self.max_chars])
        with self._lock:
            return self._queries.get(key)

    # --- for offline use --------------------------------------------------------------

    def encode(self, texts: Sequence[str]) -> FloatArray:
        """(n,) texts → (n, d). Blocks, in the caller's thread; texts seen before cost nothing."""
        cut = [text[: self.max_chars] for text in texts]
        keys = [_key(text) for text in cut]
        with self._lock:
            known = {key: self._rows.get(key) for key in keys}
        missing = [
            (key, text)
            for key, text in dict(zip(keys, cut, strict=True)).items()
            if known[key] is None
        ]
        for start in range(0, len(missing), ENCODE_CHUNK):
            chunk = missing[start : start + ENCODE_CHUNK]
            rows = self._encoder.encode([text for _, text in chunk])
            with self._lock:
                for (key, _), row in zip(chunk, rows, strict=True):
                    known[key] = kept = _read_only(row)
                    self._rows.put(key, kept)
        out = np.empty((len(texts), self.dim), np.float32)
        for i, key in enumerate(keys):
            out[i] = known[key]
        return out

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, special tokens included. The model reads the first `max_tokens`
        of them; whether a longer text is refused or cut is the caller's choice."""
        return self._encoder.count_tokens(texts)

    async def close(self) -> None:
        """Fails who still waits and ends the worker after its present batch. Safe to call twice."""
        with self._lock:
            self._closed = True
            left = list(self._waiting.values())
            self._waiting.clear()
        for wanted in left:
            wanted.vector.set_exception(EngineUnavailable("the embedder is closed"))
        await asyncio.to_thread(self._worker.shutdown)

    # --- the batch --------------------------------------------------------------------

    def _want(self, text: str) -> FloatArray | _Wanted:
        text = text[: self.max_chars]
        key = _key(text)
        with self._lock:
            if (row := self._queries.get(key)) is not None:
                return row
            if self._closed:
                raise EngineUnavailable("the embedder is closed")
            wanted = self._running.get(key) or self._waiting.get(key)
            if wanted is None:
                wanted = self._waiting[key] = _Wanted(key, text)
            wanted.waiters += 1
            if not self._busy:
                self._busy = True
                self._worker.submit(self._work)
            return wanted

    def _leave(self, wanted: _Wanted) -> None:
        with self._lock:
            wanted.waiters -= 1
            if wanted.waiters == 0 and self._waiting.get(wanted.key) is wanted:
                del self._waiting[wanted.key]

    def _work(self) -> None:
        """In the worker thread: batch after batch until nobody waits."""
        while True:
            with self._lock:
                self._running = {key: self._waiting.pop(key) for key in list(self._waiting)[:BATCH]}
                if not self._running:
                    self._busy = False
                    return
                batch = list(self._running.values())
            try:
                encoded = self._encoder.encode([wanted.text for wanted in batch])
            except Exception as error:
                with self._lock:
                    self._running = {}
                for wanted in batch:
                    wanted.vector.set_exception(error)
                continue
            rows = [_read_only(row) for row in encoded]
            with self._lock:
                self._running = {}
                for wanted, row in zip(batch, rows, strict=True):
                    self._queries.put(wanted.key, row)
            for wanted, row in zip(batch, rows, strict=True):
                wanted.vector.set_result(row)


def _key(text: str) -> bytes:
    """A digest: two texts with the same 16 bytes are not to be expected, nor to be found."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _read_only(row: FloatArray) -> FloatArray:
    row = np.ascontiguousarray(row, np.float32).copy()  # a view would keep its whole batch alive
    row.flags.writeable = False
    return row
