"""Models and adapters named on the Hugging Face hub, as local folders. Knows nothing of LoRA.

Files come from the local hub cache (HF_HUB_CACHE) where they are there; HF_HUB_OFFLINE=1 keeps
it at that. Whether the hub answers is seen by one quick attempt: its own client goes on trying for
half a minute, and tells each time.
"""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path

from huggingface_hub import (
    constants,
    get_safetensors_metadata,
    get_session,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)

from composer.adapters.base_model import BaseModelInfo, describe_base_model, read_base_model
from composer.adapters.files import CARD, CONFIG, WEIGHTS
from composer.errors import CatalogError, Problem

ATTEMPT_S = 5.0
"""How long the hub may take to be connected to by the first question, and then to answer it."""
AGAIN_S = 30.0
"""How long it is remembered whether it did: a registry may name a hundred adapters there."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


def is_hub_name(name: str) -> bool:
    """Whether `name` has the form org/name."""
    return _NAME.fullmatch(name) is not None


def fetch_adapter(name: str, revision: str) -> Path:
    """The folder with the adapter's config, safetensors and card; nothing else is downloaded,
    so no pickle either.

    A full commit hash that is in the cache is taken from there without asking the hub. Blocks.
    Raises CatalogError.
    """
    patterns = [CONFIG, WEIGHTS, CARD]
    if _COMMIT.fullmatch(revision):
        try:
            folder = Path(
                snapshot_download(
                    name, revision=revision, allow_patterns=patterns, local_files_only=True
                )
            )
        except LocalEntryNotFoundError:
            pass  # not in the cache yet: fetched below
        except HFValidationError as error:
            raise _refusal(name, revision, error) from error
        else:
            if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
                return folder
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=patterns,
                local_files_only=not _HUB.answers(),
            )
        )
    except _FAILURES as error:
        raise _refusal(name, revision, error) from error


def adapter_root(folder: Path) -> Path:
    """The cache folder of the repository whose snapshot `folder` is: its files are links into
    that folder's blobs."""
    return folder.parent.parent


def fetch_base_model(name: str, revision: str | None, names: tuple[str, ...]) -> BaseModelInfo:
    """What adapters must know of a base model, without downloading its weights: from the cached
    snapshot where that is whole, else its config and the headers of its files by range requests.

    Blocks. Raises CatalogError.
    """
    try:
        cached = Path(snapshot_download(name, revision=revision, local_files_only=True))
        return read_base_model(cached, (name, *names))
    except (LocalEntryNotFoundError, CatalogError):
        pass  # not, or not wholly, in the cache: asked of the hub below
    except HFValidationError as error:
        raise _refusal(name, revision, error) from error
    try:
        if not _HUB.answers():
            raise LocalEntryNotFoundError(name)
        config = json.loads(
            Path(hf_hub_download(name, "config.json", revision=revision)).read_text("utf-8")
        )
        files = get_safetensors_metadata(name, revision=revision).files_metadata.values()
    except _FAILURES as error:
        raise _refusal(name, revision, error) from error
    shapes = {tensor: tuple(info.shape) for file in files for tensor, info in file.tensors.items()}
    return describe_base_model(config, shapes, names=(name, *names), stamp=f"hub:{name}@{revision}")


class _Hub:
    """Whether the hub is to be asked at all. Used from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: tuple[float, bool] | None = None

    def answers(self) -> bool:
        """Blocks: some ATTEMPT_S where the hub is silent, longer where its name is looked up slowly
        (which has no limit of ours) or another thread is asking already."""
        if constants.HF_HUB_OFFLINE:
            return False
        with self._lock:
            if self._seen is None or time.monotonic() - self._seen[0] > AGAIN_S:
                self._seen = (time.monotonic(), self._ask())
            return self._seen[1]

    @staticmethod
    def _ask() -> bool:
        try:
            get_session().head(constants.ENDPOINT, timeout=ATTEMPT_S)
        except (_HTTP_ERROR, OSError):
            return False
        return True  # whatever it said


_HUB = _Hub()

_HTTP_ERROR: type[Exception] = next(
    kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError"
)
"""The root of what the hub's HTTP library raises; which library that is differs by its version."""

_FAILURES = (
    HfHubHTTPError,
    HFValidationError,
    NotASafetensorsRepoError,
    SafetensorsParsingError,
    _HTTP_ERROR,
    LookupError,  # an answer that is not the hub's, such as a proxy's login page
    OSError,
    ValueError,
)
"""What the hub's client raises; LocalEntryNotFoundError is among the OSErrors."""


def _refusal(name: str, revision: str | None, error: Exception) -> CatalogError:
    at = f"{name} at {revision}" if revision else name
    match error:
        case GatedRepoError():
            message = f"{at} is gated on the hub"
            remedy = "Accept its terms there and log in with `hf auth login`."
        case RevisionNotFoundError():
            message = f"{name} has no revision {revision or 'main'} on the hub"
            remedy = "Name one of its commits, tags or branches."
        case RepositoryNotFoundError():
            message = f"there is no {name} on the hub, or it is private"
            remedy = "Correct the name, or log in with `hf auth login`."
        case LocalEntryNotFoundError():
            message = f"{at} is not in the local hub cache and the hub cannot be reached"
            pin = f" --revision {revision}" if revision else ""
            remedy = f"Connect, or fetch it before with `hf download {name}{pin}`."
        case EntryNotFoundError() | NotASafetensorsRepoError():
            message = f"{at} lacks a needed file: {_first_line(error)}"
            remedy = "Name a model that is published as safetensors."
        case _:
            message = f"{at} cannot be fetched from the hub: {_first_line(error)}"
            remedy = "Try again, or name a local folder."
    return CatalogError([Problem(file="", path="", message=message, remedy=remedy)])


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
