"""From survivors in the order of the corpus to files sorted by neuron, in little memory.

How many survivors each neuron has is counted first; that gives each one its place in the files.
Then the survivors are read in pieces, each piece is sorted, and every neuron's part of it is
written behind what that neuron has already.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lingua_topk.analysis._files import Place, lay_out, write_at, write_json, writing
from lingua_topk.analysis._unfinished import Unfinished
from lingua_topk.analysis.recording import INFO_NAME, TOKENS_NAME, folder_of, groups
from lingua_topk.errors import DataError

SURVIVORS_AT_ONCE = 2**20
SURVIVORS_A_FILE = 2**24
TOKENS_AT_ONCE = 2**20
CONFIG_NAME = "config.json"


def finish(unfinished: Unfinished, out: Path) -> None:
    """Write the recording in `out` and remove what it was made of. Can be done again.

    A layer that an interrupted call has finished is kept.
    """
    with writing(out):
        for layer in unfinished.done.survivors:
            folder = out / folder_of(layer)
            if not (folder / CONFIG_NAME).is_file():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                _sort_layer(unfinished, layer, folder)
        _write_tokens(unfinished, out / TOKENS_NAME)
        write_json(out / INFO_NAME, _info(unfinished))
    shutil.rmtree(unfinished.folder, ignore_errors=True)


def _info(unfinished: Unfinished) -> dict:
    recording = unfinished.recording
    layers = {
        name: {**one, "survivors": unfinished.done.survivors[one["layer"]]}
        for name, one in recording["layers"].items()
    }
    return {**recording, "width": unfinished.done.width, "layers": layers}


@dataclass(frozen=True)
class _File:
    """One file of a layer, while it is written: neurons start to stop (exclusive)."""

    path: Path
    start: int
    stop: int
    places: dict[str, Place]

    @property
    def partial(self) -> Path:
        return self.path.with_name(f".{self.path.name}.partial")


def _sort_layer(unfinished: Unfinished, layer: int, folder: Path) -> None:
    counts = _count(unfinished, layer)  # [D]
    files = [
        _begin(unfinished, folder, start, counts[start:stop])
        for start, stop in groups(counts, SURVIVORS_A_FILE)
    ]
    # Where, counted from the beginning of its file, each neuron's next survivor goes: [D]
    next_at = np.concatenate([_starts(counts[one.start : one.stop]) for one in files])
    row_length = unfinished.recording["row_length"]
    for places, neurons, values in unfinished.places(layer, SURVIVORS_AT_ONCE):
        order = np.argsort(neurons, kind="stable")  # by place within a neuron, as they were
        found = np.bincount(neurons, minlength=len(counts))  # [D]
        places, values = places[order], values[order]
        rows, positions = np.divmod(places, row_length)
        locations = np.stack([rows, positions, neurons[order]], axis=1)  # [M, 3]
        ends = np.cumsum(found)
        for one in files:
            _add(one, locations, values, found, ends, next_at)
        next_at += found
    for one in files:
        _end(one)
    write_json(folder / CONFIG_NAME, _delphi_config(unfinished, len(files)))


def _count(unfinished: Unfinished, layer: int) -> np.ndarray:
    """Survivors of each neuron: int64 [D]."""
    counts = np.zeros(unfinished.done.width, np.int64)
    for neurons in unfinished.neurons(layer, SURVIVORS_AT_ONCE):
        if neurons.max() >= len(counts):
            raise DataError(
                f"{unfinished.folder} is damaged (a neuron is too large): remove its recording"
                " and record again"
            )
        counts += np.bincount(neurons, minlength=len(counts))
    return counts


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.cumsum(counts) - counts


def _begin(unfinished: Unfinished, folder: Path, start: int, counts: np.ndarray) -> _File:
    """The file of neurons start, start + 1, ... with all but their survivors."""
    n_rows, row_length = unfinished.done.rows, unfinished.recording["row_length"]
    stop, m = start + len(counts), int(counts.sum())
    largest = max(n_rows, row_length, len(counts)) - 1
    tensors = {
        "counts": ("<i8", counts.shape),
        "activations": ("<f4", (m,)),
        "tokens": ("<i4", (n_rows, row_length)),
        "locations": ("<u2" if largest < 2**16 else "<u4", (m, 3)),
    }
    header, places = lay_out(tensors)
    one = _File(folder / f"{start}_{stop - 1}.safetensors", start, stop, places)
    with open(one.partial, "wb") as file:
        file.write(header)
        file.truncate(places["locations"].end)
        file.flush()
        write_at(file.fileno(), counts, places["counts"].start)
        _copy_tokens(unfinished, file.fileno(), places["tokens"].start)
    return one


def _copy_tokens(unfinished: Unfinished, descriptor: int, offset: int) -> None:
    rows = max(1, TOKENS_AT_ONCE // unfinished.recording["row_length"])
    for tokens in unfinished.rows_of_tokens(rows):
        write_at(descriptor, tokens, offset)
        offset += tokens.nbytes


def _add(
    one: _File,
    locations: np.ndarray,
    values: np.ndarray,
    found: np.ndarray,
    ends: np.ndarray,
    next_at: np.ndarray,
) -> None:
    """Write those of a sorted piece of survivors that belong to this file.

    Args:
        locations: int64 [M, 3], row, position, neuron.
        values: float32 [M].
        found: int64 [D], how many of them each neuron has.
        ends: int64 [D], where in the piece they end.
        next_at: int64 [D], where in its file each neuron's go on.
    """
    first, last = ends[one.start] - found[one.start], ends[one.stop - 1]
    if first == last:
        return
    place, value_place = one.places["locations"], one.places["activations"]
    own = (locations[first:last] - [0, 0, one.start]).astype(place.dtype)
    own_values = values[first:last]
    # Opened for each piece, since a layer may have more files than a process may have open.
    descriptor = os.open(one.partial, os.O_WRONLY)
    try:
        for neuron in one.start + np.flatnonzero(found[one.start : one.stop]):
            end, at = ends[neuron] - first, int(next_at[neuron])
            begin = end - found[neuron]
            write_at(descriptor, own[begin:end], place.start + at * place.row_bytes)
            write_at(
                descriptor, own_values[begin:end], value_place.start + at * value_place.row_bytes
            )
    finally:
        os.close(descriptor)


def _end(one: _File) -> None:
    """Give a whole file its name."""
    with open(one.partial, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(one.partial, one.path)


def _write_tokens(unfinished: Unfinished, path: Path) -> None:
    shape = (unfinished.done.rows, unfinished.recording["row_length"])
    header, places = lay_out({"tokens": ("<i4", shape)})
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(header)
        file.flush()
        _copy_tokens(unfinished, file.fileno(), places["tokens"].start)
        os.fsync(file.fileno())
    os.replace(partial, path)


def _delphi_config(unfinished: Unfinished, n_files: int) -> dict:
    """What delphi writes beside a module's files, and reads of them."""
    recording = unfinished.recording
    row_length = recording["row_length"]
    return {
        "model_name": recording["model_name"],
        "dataset_repo": "", "dataset_split": "", "dataset_name": "", "dataset_column": "",
        "ctx_len": row_length, "cache_ctx_len": row_length,  # older and newer releases
        "n_tokens": unfinished.done.rows * row_length,
        "n_splits": n_files,
    }  # fmt: skip
