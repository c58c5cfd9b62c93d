"""Data inside the page: named arrays and JSON values, compressed, in base64.

A chunk, before compression (little-endian):

    uint32 length of the header, the header, zeros up to a multiple of 8, arrays

The header is JSON: "values" by name, and "arrays" by name with their type, their shape and
where they begin, in bytes after the header's padding. Each array begins at a multiple of 8.
scripts/data.js reads it.
"""

import base64
import json
import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

ALIGNMENT = 8
# The names by which scripts/data.js knows the types.
TYPES = ("i1", "u1", "i2", "u2", "i4", "u4", "f4")


def pack(arrays: Mapping[str, np.ndarray], values: Mapping[str, Any]) -> str:
    """The chunk, as text that may stand in a page."""
    described, parts, at = {}, [], 0
    for name, array in arrays.items():
        kind = array.dtype.str[1:]
        if kind not in TYPES:
            raise TypeError(f"{name} is {array.dtype}, which no page reads")
        described[name] = {"type": kind, "shape": array.shape, "at": at}
        content = _padded(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes())
        parts.append(content)
        at += len(content)
    header = json.dumps({"values": values, "arrays": described}, separators=(",", ":")).encode()
    before = _padded(len(header).to_bytes(4, "little") + header)
    return base64.b64encode(zlib.compress(b"".join([before, *parts]), 9)).decode()


def narrow(ids: np.ndarray, bound: int) -> np.ndarray:
    """Integers from 0 below `bound` in the smallest type that the page reads."""
    return ids.astype(np.uint16 if bound <= 2**16 else np.uint32)


def quantised(values: np.ndarray, largest: np.ndarray, dtype: type) -> np.ndarray:
    """Values as integers: `largest` (at least every |value|; broadcast) is the type's maximum."""
    top = np.iinfo(dtype).max
    safe = np.where(largest > 0, largest, 1).astype(np.float64)
    scaled = np.clip(np.asarray(values, np.float64) / safe, -1, 1) * top
    # What fired stays visible, however small it is.
    away = np.where((scaled != 0) & (np.abs(scaled) < 1), np.sign(scaled), np.rint(scaled))
    return away.astype(dtype)


def known(value: float) -> float | None:
    """The number as JSON may hold it: None for NaN and infinities."""
    return float(value) if math.isfinite(value) else None


def _padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % ALIGNMENT)
