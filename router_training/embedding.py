"""The service's own embedder for work offline, with the vectors it made before. Knows no
outcome."""

from __future__ import annotations

from dataclasses import dataclass

from composer.routing.artefact import EmbedderStamp
from composer.routing.views import Encode
from router_training.environment import process_settings
from router_training.progress import Progress, silent
from router_training.vectors import KeptVectors


@dataclass(frozen=True, slots=True)
class Embedding:
    """`kept` embeds texts it has seen in any run for nothing; `encode_anew` asks the model each
    time, for those who measure how long that takes."""

    kept: KeptVectors
    encode_anew: Encode

    @property
    def stamp(self) -> EmbedderStamp:
        return EmbedderStamp(id=self.kept.id, digest=self.kept.digest, dim=self.kept.dim)


def open_embedding(progress: Progress = silent) -> Embedding:
    """The embedder that COMPOSER_EMBEDDER names, on one thread. Raises SettingsError."""
    settings = process_settings()
    from composer.embedder import TextEmbedder, load_encoder  # torch, perhaps

    encoder = load_encoder(
        settings.embedder,
        backend=settings.embedder_backend,
        cache_dir=settings.cache_dir,
        threads=settings.threads,
    )
    bare = TextEmbedder(encoder, cache_size=0, row_cache_size=0)
    kept = KeptVectors(bare, settings.cache_dir / "vectors", progress)
    return Embedding(kept, bare.encode)
