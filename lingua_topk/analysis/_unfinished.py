"""What a recording that is not finished has on disk: survivors in the order of the corpus.

Everything is appended to plain files; progress.json says how much of them counts. It is written
after what it speaks of has reached the disk, so a run that ends at any moment loses no more than
what came after it was last written: the next run cuts the files to that length and goes on.

    FOLDER/unfinished/
      progress.json      "recording": what is being recorded; "rows": done; "width": D or null;
                         "survivors": how many, by layer
      tokens             int32 [rows, S]
      layers.3.counts    int32, survivors at each place
      layers.3.neurons   uint16, or uint32 where D is larger, [M], ascending within a place
      layers.3.values    float32 [M]
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lingua_topk.analysis._files import read_json, write_json, writing
from lingua_topk.analysis.recording import UNFINISHED_NAME, folder_of, groups
from lingua_topk.errors import ConfigError, DataError

PROGRESS_NAME = "progress.json"
COUNTS, VALUES, TOKENS = np.dtype("<i4"), np.dtype("<f4"), np.dtype("<i4")
PLACES_AT_ONCE = 2**18


@dataclass(frozen=True)
class Survivors:
    """Survivors of one layer at consecutive places, in their order.

    Attributes:
        counts: integers [P], survivors at each place.
        neurons: integers [M], ascending within a place.
        values: float32 [M].
    """

    counts: np.ndarray
    neurons: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Done:
    """How far a recording is.

    Attributes:
        rows: rows of the corpus.
        width: D; None before the first row.
        survivors: how many there are, by layer.
    """

    rows: int
    width: int | None
    survivors: dict[int, int]


class Unfinished:
    """The files of an unfinished recording, open to append to and to read.

    Attributes:
        folder: where they are.
        recording: what is being recorded, as in progress.json.
        done: what is in the files, whether it has been saved or not.
    """

    def __init__(self, out: Path, recording: dict[str, Any]):
        """Begin, or go on with what a run before has left in `out`.

        ConfigError where that recorded something else; DataError where it is damaged.
        """
        self.folder, self.recording = out / UNFINISHED_NAME, recording
        self._layers = [one["layer"] for one in recording["layers"].values()]
        self._row_length: int = recording["row_length"]
        self.done = Done(0, None, dict.fromkeys(self._layers, 0))
        if (self.folder / PROGRESS_NAME).exists():
            self._go_on(out)
        else:
            if out.is_dir() and any(path != self.folder for path in out.iterdir()):
                raise ConfigError(
                    f"{out} holds something that is no recording: choose a new folder"
                )
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                self._write_progress()
        self._files: dict[Path, BinaryIO] = {}
        try:
            for path, size in self._sizes().items():
                self._files[path] = _cut(path, size)
        except BaseException:
            self.close()
            raise

    def _go_on(self, out: Path) -> None:
        progress = read_json(self.folder / PROGRESS_NAME)
        try:
            refuse_other(out, progress["recording"], self.recording)
            survivors = {layer: progress["survivors"][str(layer)] for layer in self._layers}
            self.done = Done(progress["rows"], progress["width"], survivors)
            numbers = [self.done.rows, *survivors.values()]
            numbers += [] if self.done.width is None else [self.done.width]
            if not all(type(number) is int and number >= 0 for number in numbers):
                raise TypeError
        except (LookupError, TypeError):
            raise DataError(
                f"{self.folder / PROGRESS_NAME} is damaged: remove {out} and record again"
            ) from None

    def append(self, tokens: np.ndarray, found: Mapping[int, Survivors], width: int) -> None:
        """Add whole rows: tokens [R, S], and the survivors of every layer at them.

        They count once `save` has been called.
        """
        before = self.done
        # What a failure leaves of this is cut off by the next run: it is counted at once, below.
        with writing(self.folder):
            self._append("tokens", tokens, TOKENS)
            for layer, one in found.items():
                name = folder_of(layer)
                self._append(f"{name}.counts", one.counts, COUNTS)
                self._append(f"{name}.neurons", one.neurons, neuron_dtype(width))
                self._append(f"{name}.values", one.values, VALUES)
        survivors = {layer: n + len(found[layer].values) for layer, n in before.survivors.items()}
        self.done = Done(before.rows + len(tokens), width, survivors)

    def _append(self, name: str, array: np.ndarray, dtype: np.dtype) -> None:
        self._files[self.folder / name].write(memoryview(np.ascontiguousarray(array, dtype)))

    def save(self) -> None:
        """Bring everything to the disk, so that a later run goes on from here."""
        with writing(self.folder):
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
            self._write_progress()

    def _write_progress(self) -> None:
        survivors = {str(layer): n for layer, n in self.done.survivors.items()}
        content = {
            "recording": self.recording, "rows": self.done.rows, "width": self.done.width,
            "survivors": survivors,
        }  # fmt: skip
        write_json(self.folder / PROGRESS_NAME, content)

    def close(self) -> None:
        for file in self._files.values():
            with suppress(OSError):  # what it still holds back is no part of what was saved
                file.close()

    def _sizes(self) -> dict[Path, int]:
        """Bytes of each file that count."""
        places = self.done.rows * self._row_length
        sizes = {"tokens": places * TOKENS.itemsize}
        for layer, n in self.done.survivors.items():
            name = folder_of(layer)
            sizes[f"{name}.counts"] = places * COUNTS.itemsize
            sizes[f"{name}.neurons"] = n * neuron_dtype(self.done.width).itemsize
            sizes[f"{name}.values"] = n * VALUES.itemsize
        return {self.folder / name: size for name, size in sizes.items()}

    def rows_of_tokens(self, rows: int) -> Iterator[np.ndarray]:
        """The recorded tokens, int32 [R, S] with R at most `rows`; call `save` before."""
        with open(self.folder / "tokens", "rb") as file:
            for start in range(0, self.done.rows, rows):
                n = min(rows, self.done.rows - start) * self._row_length
                yield _read(file, TOKENS, n).reshape(-1, self._row_length)

    def neurons(self, layer: int, most: int) -> Iterator[np.ndarray]:
        """The neurons of all survivors, in pieces of at most that many; call `save` before."""
        n, dtype = self.done.survivors[layer], neuron_dtype(self.done.width)
        with open(self.folder / f"{folder_of(layer)}.neurons", "rb") as file:
            for start in range(0, n, most):
                yield _read(file, dtype, min(most, n - start))

    def places(self, layer: int, most: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Place (int64), neuron and value of all survivors, by place, in pieces.

        A piece has at most `most` survivors or one place's. Call `save` before.
        """
        name, n_places = folder_of(layer), self.done.rows * self._row_length
        with (
            open(self.folder / f"{name}.counts", "rb") as counts_file,
            open(self.folder / f"{name}.neurons", "rb") as neurons_file,
            open(self.folder / f"{name}.values", "rb") as values_file,
        ):
            for first in range(0, n_places, PLACES_AT_ONCE):
                counts = _read(counts_file, COUNTS, min(PLACES_AT_ONCE, n_places - first))
                for start, stop in groups(counts, most):
                    some = counts[start:stop]
                    places = np.repeat(np.arange(first + start, first + stop), some)
                    neurons = _read(neurons_file, neuron_dtype(self.done.width), len(places))
                    yield places, neurons, _read(values_file, VALUES, len(places))


def neuron_dtype(width: int | None) -> np.dtype:
    return np.dtype("<u2" if (width or 0) <= 2**16 else "<u4")


def refuse_other(out: Path, there: Any, here: dict[str, Any]) -> None:
    """ConfigError where what `out` holds, `there`, is not a recording of the same."""
    name = _difference(there, here)
    if name is not None:
        raise ConfigError(
            f"{out} holds a recording that was made with another {name}: choose a new folder, or"
            " remove that one to record again"
        )


def _difference(there: Any, here: Any, name: str = "") -> str | None:
    """The dotted name of the first thing in which two JSON values differ."""
    if there == here:
        return None
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted({*there, *here}):
            if key not in there or key not in here:
                return f"{name}{key}"
            if there[key] != here[key]:
                return _difference(there[key], here[key], f"{name}{key}.")
    return name.removesuffix(".") or "content"


def _cut(path: Path, size: int) -> BinaryIO:
    """The file, open at its end, after what does not count has been cut off."""
    with writing(path):
        file = open(path, "ab")  # noqa: SIM115
        if os.fstat(file.fileno()).st_size < size:
            file.close()
            raise DataError(
                f"{path} is damaged (it is too short): remove {path.parents[1]} and record again"
            )
        file.truncate(size)
        return file


def _read(file: BinaryIO, dtype: np.dtype, n: int) -> np.ndarray:
    found = np.fromfile(file, dtype, n)
    if len(found) < n:
        raise DataError(
            f"{file.name} is damaged (it is too short): remove its recording and record again"
        )
    return found
