"""Fixtures every test may use. One thread per process: two-thread torch beside a busy neighbour
has been seen to run twenty times slower than one."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
