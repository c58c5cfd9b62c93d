"""Files that appear whole or not at all; safetensors files, read and written in parts.

safetensors (github.com/huggingface/safetensors) is 8 bytes for the length of a header (little
endian), the header (JSON), and the tensors' bytes one after the other. Its own library writes a
tensor from memory in one piece and reads through a memory map, whose pages count as resident; a
recording does not fit into memory, so both are done here with plain reads and writes.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lingua_topk.errors import DataError

DTYPES = {
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "F32": np.dtype("<f4"),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LARGEST_HEADER = 2**20


@dataclass(frozen=True)
class Place:
    """Where in its file a tensor is: `start` is the file's byte at which it begins."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one entry along the first axis."""
        return self.dtype.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))

    @property
    def end(self) -> int:
        return self.start + self.shape[0] * self.row_bytes


def lay_out(tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> tuple[bytes, dict]:
    """The beginning of a safetensors file and the places of its tensors, in this order.

    Give those of larger entries first, so that every one is aligned.
    """
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + Place(np.dtype(dtype), shape, 0).end
        header[name] = {
            "dtype": NAMES[np.dtype(dtype)],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    places = {
        name: Place(np.dtype(dtype), shape, begin + header[name]["data_offsets"][0])
        for name, (dtype, shape) in tensors.items()
    }
    return len(text).to_bytes(8, "little") + text, places


def read_layout(path: Path) -> dict[str, Place]:
    """The tensors of a safetensors file; DataError for a file that is not one, or not whole."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, LARGEST_HEADER):
                raise ValueError("its header does not fit")
            header = json.loads(file.read(length))
        places = {
            name: _place(entry, 8 + length)
            for name, entry in header.items()
            if name != "__metadata__"
        }
        if max(place.end for place in places.values()) != size:
            raise ValueError(f"it has {size} bytes, not those of its header")
    except FileNotFoundError:
        raise DataError(f"{path} is missing: record again") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error}): record again") from None
    return places


def _place(entry: Any, begin: int) -> Place:
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    start, end = entry["data_offsets"]
    if not shape or not all(type(n) is int and n >= 0 for n in (*shape, start)):
        raise ValueError("a shape in its header is none")
    place = Place(dtype, shape, begin + start)
    if place.end != begin + end:
        raise ValueError("a shape in its header does not fit the bytes")
    return place


def read_rows(path: Path, place: Place, start: int, stop: int) -> np.ndarray:
    """Entries start..stop (exclusive) along a tensor's first axis. DataError for a short file."""
    shape = (stop - start, *place.shape[1:])
    n = int(np.prod(shape, dtype=np.int64))
    try:
        found = np.fromfile(path, place.dtype, n, offset=place.start + start * place.row_bytes)
    except FileNotFoundError:
        raise DataError(f"{path} is missing: record again") from None
    if len(found) < n:
        raise DataError(f"{path} is damaged (it is too short): record again")
    return found.reshape(shape)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A write to `path` that the system refuses is a DataError in one line."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{error.filename or path} cannot be written ({error.strerror}): mend that and run"
            " again; what was recorded is kept"
        ) from None


def write_at(descriptor: int, array: np.ndarray, offset: int) -> None:
    """Write an array's bytes at an offset of a file, all of them."""
    left = memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    while left:
        written = os.pwrite(descriptor, left, offset)
        left, offset = left[written:], offset + written


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all, and on the disk when this returns."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds a JSON object; DataError where it is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} is missing: record again") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged (no JSON: {error}): record again") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} is damaged (no JSON object): record again")
    return content
