"""What a batch is to its callers: its statuses, its times, its counts. Knows no disk and no tasks.

validating → in_progress → finalizing → completed
     │            └→ expired
     └→ failed
validating or in_progress → cancelling → cancelled
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from composer.batch.answers import Answers

Status = Literal[
    "validating",
    "in_progress",
    "finalizing",
    "completed",
    "failed",
    "cancelling",
    "cancelled",
    "expired",
]
Ending = Literal["completed", "cancelled", "expired"]
ENDED: frozenset[Status] = frozenset({"completed", "failed", "cancelled", "expired"})
CANCELLABLE: frozenset[Status] = frozenset({"validating", "in_progress"})

UNANSWERED: Mapping[Ending, tuple[str, str]] = {
    "cancelled": ("batch_cancelled", "The batch was cancelled before this request was answered."),
    "expired": (
        "batch_expired",
        "This request could not be answered before the completion window expired.",
    ),
}
"""Code and message of the lines that a batch leaves without an answer."""


@dataclass(slots=True)
class Batch:
    """Times are in Unix seconds, `created_ns` in nanoseconds. `key` names the key that it was made
    with: whom that excludes answers none of its lines."""

    id: str
    endpoint: str
    input_file_id: str
    created_ns: int
    expires_at: int
    metadata: dict[str, str] | None = None
    status: Status = "validating"
    errors: list[dict[str, Any]] | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    times: dict[str, int] = field(default_factory=dict)
    total: int = 0
    completed: int = 0
    failed: int = 0
    key: str = ""

    def become(self, status: Status, at: float | None = None) -> None:
        """`at` is when, if not now; the first time counts."""
        self.status = status
        self.times.setdefault(f"{status}_at", int(time.time() if at is None else at))

    def count(self, answers: Answers) -> None:
        self.completed = answers.answered - answers.failed
        self.failed = answers.failed

    @property
    def body(self) -> dict[str, Any]:
        """In OpenAI's shape."""
        names = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling")
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": None if self.errors is None else {"object": "list", "data": self.errors},
            "input_file_id": self.input_file_id,
            "completion_window": "24h",
            "status": self.status,
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            "created_at": self.created_ns // 10**9,
            "expires_at": self.expires_at,
            **{f"{name}_at": self.times.get(f"{name}_at") for name in (*names, "cancelled")},
            "request_counts": {
                "total": self.total,
                "completed": self.completed,
                "failed": self.failed,
            },
            "metadata": self.metadata,
        }
