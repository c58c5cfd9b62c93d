"""A recording: which neurons survive at which tokens of a corpus, and with what value.

On disk, in the layout of delphi's cache of activations (github.com/EleutherAI/delphi), so that its
`LatentDataset(folder, ..., modules=["layers.3", ...])` reads it as it is:

    FOLDER/
      recording.json              what was recorded; written last: a folder without it is unfinished
      tokens.safetensors          tokens int32 [N, S]
      layers.3/config.json        what delphi reads about a module
      layers.3/START_END.safetensors    neurons START to END, both included:
          locations   uint16, or uint32 where a number does not fit, [M, 3]: row, position,
                      neuron - START; sorted by neuron, then by row and position
          activations float32 [M]
          tokens      int32 [N, S], as delphi wants it
          counts      int64 [END - START + 1], survivors of each neuron (delphi ignores it)
      unfinished/                 while it is being recorded: what a later run goes on from

Reading takes memory for the tokens and for one block of survivors, however many there are.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lingua_topk.analysis._files import Place, read_json, read_layout, read_rows
from lingua_topk.errors import DataError

VERSION = 1
INFO_NAME = "recording.json"
TOKENS_NAME = "tokens.safetensors"
UNFINISHED_NAME = "unfinished"


@dataclass(frozen=True)
class Block:
    """The survivors of consecutive neurons, sorted by neuron, then by place.

    Attributes:
        first: the first neuron.
        counts: int64 [n], survivors of each neuron.
        places: int64 [M], row * S + position.
        values: float32 [M].
    """

    first: int
    counts: np.ndarray
    places: np.ndarray
    values: np.ndarray

    @property
    def neurons(self) -> np.ndarray:
        """int64 [M], the neuron of each survivor less `first`."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    @property
    def offsets(self) -> np.ndarray:
        """int64 [n + 1]: neuron first + i has the survivors offsets[i] to offsets[i + 1]."""
        return np.concatenate([[0], np.cumsum(self.counts)])


@dataclass(frozen=True)
class _Split:
    """One file: neurons first to first + len(counts) - 1."""

    path: Path
    first: int
    locations: Place
    activations: Place
    counts: np.ndarray  # int64 [n]

    @cached_property
    def offsets(self) -> np.ndarray:  # int64 [n + 1]
        return np.concatenate([[0], np.cumsum(self.counts)])


class LayerRecording:
    """The survivors of one layer.

    Attributes:
        index: the layer.
        is_topk: whether its block has TopK.
        kept: which values: "survivors" (all that TopK left), "what the model's selection would
            leave" (of its twin), "all", "the 24 largest by magnitude".
            A value of 0 is never kept.
        width: D, the number of neurons.
        n_tokens: N * S, the tokens that were recorded.
        counts: int64 [D], survivors of each neuron.
    """

    def __init__(
        self, folder: Path, info: dict[str, Any], n_rows: int, row_length: int, width: int
    ):
        self.index, self.is_topk, self.kept = info["layer"], info["is_topk"], info["kept"]
        self.width, self.n_tokens = width, n_rows * row_length
        self._n_rows, self._row_length = n_rows, row_length
        self._splits = _splits_of(folder, width)
        self.counts = np.concatenate([split.counts for split in self._splits])
        if self.counts.sum() != info["survivors"]:
            raise DataError(f"{folder} is damaged (survivors are missing): record again")

    def neuron(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Places, int64 [m], ascending, and values, float32 [m], of neuron i."""
        if not 0 <= i < self.width:
            raise DataError(
                f"neuron {self.index}:{i} is not in the recording: it has 0 to {self.width - 1}"
            )
        split = next(one for one in reversed(self._splits) if one.first <= i)
        block = self._read(split, i - split.first, i - split.first + 1)
        return block.places, block.values

    def blocks(self, max_survivors: int = 2**22) -> Iterator[Block]:
        """All neurons in order, each once: as many together as have no more survivors than that.

        At least one a block, and none beyond the end of a file. Neurons without survivors are
        among them.
        """
        for split in self._splits:
            for start, stop in groups(split.counts, max_survivors):
                yield self._read(split, start, stop)

    def _read(self, split: _Split, start: int, stop: int) -> Block:
        """Neurons start to stop (exclusive), counted from the first of the split."""
        begin, end = (int(split.offsets[i]) for i in (start, stop))
        locations = read_rows(split.path, split.locations, begin, end)  # [M, 3]
        values = read_rows(split.path, split.activations, begin, end)
        places = locations[:, 0].astype(np.int64) * self._row_length + locations[:, 1]
        block = Block(split.first + start, split.counts[start:stop], places, values)
        inside = (locations[:, 0] < self._n_rows) & (locations[:, 1] < self._row_length)
        if not inside.all() or not np.array_equal(locations[:, 2], block.neurons + start):
            raise DataError(f"{split.path} is damaged (its locations are wrong): record again")
        return block


class Recording:
    """A finished recording; see `open_recording`.

    Attributes:
        folder: where it is.
        info: what recording.json holds: version, n_rows, row_length, width, vocab_size,
            model_name, layers (by the name of their folder), inputs.
        tokens: int32 [N, S], the corpus.
        n_tokens: N * S.
        width: D, neurons a layer.
        layers: the recorded layers, ascending.
    """

    def __init__(self, folder: Path, info: dict[str, Any]):
        self.folder, self.info = folder, info
        self.width: int = info["width"]
        shape = (info["n_rows"], info["row_length"])
        self.n_tokens: int = shape[0] * shape[1]
        self._by_layer = {one["layer"]: name for name, one in info["layers"].items()}
        self.layers = sorted(self._by_layer)
        path = folder / TOKENS_NAME
        place = _only(read_layout(path), "tokens", "<i4", shape, path)
        self.tokens = read_rows(path, place, 0, shape[0])
        vocab_size = info["vocab_size"]
        if self.tokens.size and not 0 <= self.tokens.min() <= self.tokens.max() < vocab_size:
            raise DataError(f"{path} is damaged (a token is not in the vocabulary): record again")

    def layer(self, i: int) -> LayerRecording:
        """The survivors of layer i; DataError where it was not recorded, or is damaged."""
        if i not in self._by_layer:
            held = ", ".join(map(str, self.layers))
            raise DataError(f"{self.folder} has no layer {i}: it has {held}")
        name = self._by_layer[i]
        return LayerRecording(
            self.folder / name, self.info["layers"][name], *self.tokens.shape, self.width
        )


def open_recording(folder: str | Path) -> Recording:
    """The recording in a folder; DataError where it is unfinished, damaged or something else."""
    folder = Path(folder)
    path = folder / INFO_NAME
    if not path.is_file():
        if (folder / UNFINISHED_NAME).is_dir():
            raise DataError(
                f"{folder} is an unfinished recording: run what made it again, and it goes on"
            )
        raise DataError(f"{folder} is no recording: it has no {INFO_NAME}")
    info = read_json(path)
    if info.get("version") != VERSION:
        raise DataError(
            f"{path} is of version {info.get('version')!r}, where {VERSION} is read: record again"
        )
    try:
        recording = Recording(folder, _checked(info))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is damaged ({type(error).__name__}): record again") from None
    for i in recording.layers:
        recording.layer(i)
    return recording


def _checked(info: dict[str, Any]) -> dict[str, Any]:
    """The content of recording.json, whose numbers and names are then what they must be."""
    layers = info["layers"]
    numbers = [info[name] for name in ("n_rows", "row_length", "width", "vocab_size")]
    numbers += [one["survivors"] for one in layers.values()]
    numbers += [one["layer"] for one in layers.values()]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError
    if not all(name == folder_of(one["layer"]) for name, one in layers.items()):
        raise ValueError
    return info


def groups(counts: np.ndarray, most: int) -> Iterator[tuple[int, int]]:
    """Start and stop (exclusive) of runs of entries, in order, each with a sum of at most `most`.

    As long as they can be; a run has one entry at least, whatever its count.
    """
    ends = np.cumsum(counts, dtype=np.int64)
    start = before = 0
    while start < len(ends):
        stop = max(int(np.searchsorted(ends, before + most, side="right")), start + 1)
        yield start, stop
        start, before = stop, int(ends[stop - 1])


def folder_of(layer: int) -> str:
    """The name of a layer's folder: the path of its block in the model, as delphi names modules."""
    return f"layers.{layer}"


def _splits_of(folder: Path, width: int) -> list[_Split]:
    """The files of a layer, whose neurons are 0 to width - 1 without gap or overlap."""
    try:
        edges = sorted(
            tuple(map(int, path.stem.split("_"))) for path in folder.glob("*_*.safetensors")
        )
    except ValueError:
        raise DataError(f"{folder} is damaged (a file is not ours): record again") from None
    starts = [0, *(end + 1 for _, end in edges)]
    if not edges or starts != [*(start for start, _ in edges), width]:
        raise DataError(f"{folder} is damaged (a file of some neurons is missing): record again")
    return [_open_split(folder / f"{start}_{end}.safetensors", start, end) for start, end in edges]


def _open_split(path: Path, start: int, end: int) -> _Split:
    layout = read_layout(path)
    n = end - start + 1
    counts = read_rows(path, _only(layout, "counts", "<i8", (n,), path), 0, n)
    m = int(counts.sum())
    dtype = layout["locations"].dtype if "locations" in layout else None
    if counts.min() < 0 or dtype not in (np.dtype("<u2"), np.dtype("<u4")):
        raise DataError(f"{path} is damaged (no counts or locations): record again")
    return _Split(
        path,
        start,
        _only(layout, "locations", dtype, (m, 3), path),
        _only(layout, "activations", "<f4", (m,), path),
        counts,
    )


def _only(layout: dict[str, Place], name: str, dtype, shape: tuple[int, ...], path: Path) -> Place:
    """The place of a tensor that must be of that dtype and shape."""
    place = layout.get(name)
    if place is None or place.dtype != np.dtype(dtype) or place.shape != shape:
        raise DataError(f"{path} is damaged ({name} is not of shape {shape}): record again")
    return place
