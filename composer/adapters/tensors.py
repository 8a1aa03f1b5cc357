"""safetensors files as named arrays of bytes, and what can be said of them without torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, deserialize, safe_open

_EXPONENT = {
    "BF16": (np.uint16, 0x7F80),
    "F16": (np.uint16, 0x7C00),
    "F32": (np.uint32, 0x7F800000),
}
"""The bits that are all set in a NaN or an infinity and in no other number (IEEE 754). Used in
place of `isfinite` because numpy has no bfloat16."""

DTYPES = frozenset(_EXPONENT)
"""The types LoRA factors are trained and served in."""


class TensorFileError(ValueError):
    """The file is not whole, valid safetensors."""


@dataclass(frozen=True, slots=True)
class RawTensor:
    """`dtype` is safetensors' own name for it (F32, BF16, …); `data` is row-major."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | bytearray | memoryview

    def is_finite(self) -> bool:
        """False when any number in it is NaN or infinite. Only for `DTYPES`."""
        kind, mask = _EXPONENT[self.dtype]
        bits = np.frombuffer(self.data, dtype=kind)
        return not bool(np.any((bits & mask) == mask))


def read_tensors(path: Path) -> dict[str, RawTensor]:
    """Every tensor of one file, in memory. Raises TensorFileError, OSError.

    Read rather than mapped: a mapped file that is truncated meanwhile kills the process.
    """
    try:
        entries = deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise TensorFileError(_reason(error)) from error
    return {
        name: RawTensor(entry["dtype"], tuple(entry["shape"]), entry["data"])
        for name, entry in entries
    }


def read_shapes(path: Path) -> Mapping[str, tuple[int, ...]]:
    """The shape of every tensor of one file, from its header alone. Raises TensorFileError,
    OSError."""
    if not path.is_file():
        raise FileNotFoundError(2, "there is no such file", str(path))
    try:
        with safe_open(path, framework="np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise TensorFileError(_reason(error)) from error


def _reason(error: SafetensorError) -> str:
    return re.sub(r"^Error while deserializing( header)?: ", "", str(error))
