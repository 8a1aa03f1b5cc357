"""What is kept: requests, their outcomes, runtime experts. Knows no router, engine or HTTP."""

from composer.store.lessons import Judged, Lesson, Lessons
from composer.store.recorder import Receipt, Recorder
from composer.store.records import Feedback, Record
from composer.store.repository import Store
from composer.store.shadows import Compared, Promotion, ShadowChoice, Shadows

__all__ = [
    "Compared",
    "Feedback",
    "Judged",
    "Lesson",
    "Lessons",
    "Promotion",
    "Receipt",
    "Record",
    "Recorder",
    "ShadowChoice",
    "Shadows",
    "Store",
]
