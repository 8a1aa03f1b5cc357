"""The process's own settings, read before anything numeric is loaded. Knows no outcome."""

from __future__ import annotations

import os

from pydantic import ValidationError
from pydantic_settings import SettingsError as BadSetting

from composer.errors import SettingsError
from composer.settings import Settings


def process_settings() -> Settings:
    """Call it before importing anything numeric: the libraries read their thread count once.
    Raises SettingsError."""
    try:
        settings = Settings()
    except (ValidationError, BadSetting) as error:
        raise SettingsError(f"the environment's COMPOSER_ settings are wrong: {error}") from error
    os.environ.setdefault("OMP_NUM_THREADS", str(settings.threads))
    return settings
