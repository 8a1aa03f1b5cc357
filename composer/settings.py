"""The process's own settings, from the environment (COMPOSER_…). What is served: experts.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Read once at start and handed down; nothing else reads the environment."""

    model_config = SettingsConfigDict(env_prefix="COMPOSER_", frozen=True, extra="ignore")

    experts: Path = Field(Path("experts.yaml"), description="The registry file.")
    adapter_roots: tuple[Path, ...] = Field(
        (),
        description="Folders adapters may lie in, a JSON list; default: the registry file's own.",
    )
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    api_key: str | None = Field(
        None, description="When set, every /v1 request needs `Authorization: Bearer <key>`."
    )
    database_url: str = "sqlite+aiosqlite:///data/composer.db"
    journal: Path = Field(
        Path("data/journal"), description="Folder of records that wait for the database."
    )
    record_queue: int = Field(
        10_000, ge=1, description="Records held in memory before the journal."
    )
    log_content: bool = Field(False, description="Store prompts, answers and query embeddings.")
    cache_dir: Path = Field(
        Path(".cache/composer"), description="Files made once, such as the ONNX embedder."
    )
    server_cache_dir: Path | None = Field(
        None, description="cache_dir as model servers in containers of their own see it."
    )
    compositions: int = Field(
        32, ge=1, description="Adapters composed for requests that are kept ready at once."
    )
    compositions_mb: int = Field(
        4096,
        ge=0,
        description="MiB in cache_dir of those and of earlier ones; and of the registry's.",
    )
    embedder: str = Field(
        "all-MiniLM-L6-v2",
        description="A sentence-transformers name or path; the default is bundled.",
    )
    embedder_backend: Literal["auto", "onnx", "torch"] = "auto"
    embedding_cache: int = Field(50_000, ge=0, description="Query embeddings kept in memory.")
    threads: int = Field(
        1, ge=1, description="CPU threads of each numeric library; more than the free cores hurts."
    )
    max_wait_s: float = Field(
        300.0,
        gt=0,
        description="How long a call may wait for its expert, in seconds, where its policy says "
        "nothing; one that could not be begun in time is refused (503).",
    )
    patience: float = Field(
        0.1,
        gt=0,
        le=1,
        description="The part of that time which a device may let pass before it swaps models: "
        "1 swaps least, less answers those who wait sooner. Models that still run calls stay for "
        "longer.",
    )
    preload: bool = Field(
        True,
        description="Load what is likely to be asked for next into a device's free memory while it "
        "is idle, the servers configured first at the start.",
    )
    drain_s: float = Field(
        30.0,
        ge=0,
        description="How long a model that has to leave its device may finish its running calls; "
        "what is cut off then and has not begun to answer is asked again.",
    )
    scheduler_log: Path | None = Field(
        None, description="File of the scheduler's events and decisions, one JSON a line."
    )
    files_dir: Path = Field(
        Path("data/files"), description="Folder of the files and results of batches."
    )
    max_file_mb: int = Field(512, ge=1, description="Largest file that can be uploaded, in MiB.")
    drain_timeout_s: float = Field(
        30.0, gt=0, description="How long a stop waits for running requests."
    )

    @property
    def url(self) -> str:
        """Where a service with these settings is reached from its own machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"
