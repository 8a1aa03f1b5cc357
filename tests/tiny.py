"""The real service over the tiny experts, for tests that want everything at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from api.app import create_app
from composer.build import make_service
from composer.service import Service
from composer.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "examples" / "tiny"

ASKED = {
    "uppercase": ("please write fox in capital letters", "FOX"),
    "reverse": ("spell fox backwards", "xof"),
    "sort-digits": ("sort the digits 3142 in ascending order", "1234"),
    "plural": ("what is the plural of fox", "foxes"),
}
"""A question a skill, and the right answer."""


def registry(*skills: str, queue: int = 64) -> str:
    """experts.yaml with these skills, spelled out rather than scanned."""

    def expert(skill: str) -> dict[str, Any]:
        folder = TINY / "experts" / "large" / skill
        card = next(yaml.safe_load_all((folder / "README.md").read_text()))
        return {"server": "tiny", "adapter": str(folder), **card["composer"]}

    return yaml.safe_dump(
        {
            "version": 1,
            "servers": {
                "tiny": {
                    "engine": "embedded",
                    "model": str(TINY / "bases" / "large"),
                    "model_name": "composer/tiny-large",
                    "queue": queue,
                }
            },
            "experts": {skill: expert(skill) for skill in skills},
            "policies": {
                "auto": {"router": {"name": "neighbours"}, "strategy": {"name": "single"}}
            },
        }
    )


@asynccontextmanager
async def serving(
    folder: Path, text: str, **settings: Any
) -> AsyncIterator[tuple[httpx.AsyncClient, Service]]:
    """A started service over `folder/experts.yaml` holding `text`, and a client of its API."""
    (folder / "experts.yaml").write_text(text)
    service = await asyncio.to_thread(
        make_service,
        Settings(
            **{
                "experts": folder / "experts.yaml",
                "adapter_roots": (TINY,),
                "database_url": f"sqlite+aiosqlite:///{folder}/composer.db",
                "journal": folder / "journal",
                "cache_dir": ROOT / ".cache" / "composer",
                **settings,
            }
        ),
    )
    await service.start()
    transport = httpx.ASGITransport(create_app(service))
    try:
        async with httpx.AsyncClient(
            transport=transport, base_url="http://composer", timeout=120
        ) as client:
            yield client, service
    finally:
        await service.close()


def chat(text: str, model: str = "auto") -> dict[str, Any]:
    """The body of a small chat request."""
    return {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 24}
