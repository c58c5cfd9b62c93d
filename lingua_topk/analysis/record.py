"""Recording what neurons do over a corpus: one pass, in memory that does not grow with it.

    points = points_of(model, layers=[3, 4], k=24)
    recording = record(lambda tokens: model(tokens.to(device)), points, rows, ...)

A recording that was cut short goes on when the same call is made again, and ends as it would
have without the interruption.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lingua_topk.analysis._files import writing
from lingua_topk.analysis._sorting import finish
from lingua_topk.analysis._unfinished import Survivors, Unfinished, refuse_other
from lingua_topk.analysis.recording import (
    INFO_NAME,
    UNFINISHED_NAME,
    VERSION,
    Recording,
    folder_of,
    open_recording,
)
from lingua_topk.errors import CheckpointError, ConfigError, DataError
from lingua_topk.patch import topk_handle

SAVE_SECONDS = 30.0
ROWS_AT_ONCE = 2**8
SITES = ("residual", "mlp")


@dataclass(frozen=True)
class Point:
    """Where a layer's neurons are read.

    Attributes:
        module: its output, [B, S, D], is read.
        is_topk: whether its block has TopK.
        keep: "survivors", "selected" or "all": every value that is not 0; or the number k of those
            largest by magnitude at each token (of equal ones at the limit, any).
        transform: what the neurons' values are of the module's output; None: the output.
    """

    module: nn.Module
    is_topk: bool
    keep: Literal["survivors", "selected", "all"] | int = "survivors"
    transform: Callable[[Tensor], Tensor] | None = None

    @property
    def kept(self) -> str:
        """`keep` in words."""
        if self.keep == "selected":
            return "what the model's selection would leave"
        return self.keep if isinstance(self.keep, str) else f"the {self.keep} largest by magnitude"


def points_of(
    model: nn.Module,
    layers: Sequence[int] | None = None,
    k: int | None = None,
    site: Literal["residual", "mlp"] | None = None,
    selections: Mapping[int, Callable[[Tensor], Tensor]] | None = None,
) -> dict[int, Point]:
    """The points of a Lingua-shaped model, with TopK or without, by layer.

    At the residual site a neuron is a component of a block's output; at the mlp site, one of the
    gate's: the output of TopK or, where the block has none, SiLU(w1 x).

    Args:
        layers: which; None for all.
        k: how many values a token are kept of a block without TopK; None for all.
        site: None for the model's own, residual for a model without TopK. Give it for a vanilla
            model that is to be compared with one that has TopK at the mlp site.
        selections: by layer, TopK of the model that a vanilla one is compared with: there its
            neurons are what that would leave, so that both models are read alike.

    ConfigError for a layer that the model does not have, or a k or site that is not allowed.
    """
    handle, selections = topk_handle(model), selections or {}
    if handle is not None:
        model, site = handle.model, site or handle.args.site
    site = site or "residual"
    if site not in SITES:
        raise ConfigError(f"site={site!r} is not known: choose one of {', '.join(SITES)}")
    if handle is not None and site != handle.args.site:
        raise ConfigError(f"site={site!r}: this model has TopK at {handle.args.site!r}: give that")
    if k is not None and k < 1:
        raise ConfigError(f"k={k} is below 1: give a number from 1, or none for all values")
    topk = handle.modules if handle is not None else {}
    points = {}
    for i in range(len(model.layers)) if layers is None else sorted(set(layers)):
        if not 0 <= i < len(model.layers):
            raise ConfigError(f"layer {i} is not in the model: it has 0 to {len(model.layers) - 1}")
        block = model.layers[i]
        inner = block if site == "residual" else block.feed_forward.w1
        if i in topk:
            points[i] = Point(block if site == "residual" else topk[i], True)
        elif i in selections:
            points[i] = Point(inner, False, "selected", selections[i])
        else:
            keep = "all" if k is None else k
            points[i] = Point(inner, False, keep, None if site == "residual" else F.silu)
    return points


def record(
    forward: Callable[[Tensor], Any],
    points: Mapping[int, Point],
    rows: Iterable[Tensor | Sequence[int]],
    *,
    row_length: int,
    n_rows: int,
    out: str | Path,
    batch_rows: int,
    inputs: dict[str, Any],
    model_name: str,
    vocab_size: int,
    on_progress: Callable[[int], None] | None = None,
) -> Recording:
    """Record the survivors at `points` over the first `n_rows` rows of a corpus.

    Args:
        forward: runs the model on tokens, int64 [B, S] on the CPU; what it returns is not used.
        points: by layer; all have the same number of neurons.
        rows: each of `row_length` token ids; the same ones at every call with these `inputs`.
        out: a new folder, or that of an earlier call: an unfinished recording is gone on with,
            a finished one is returned as it is.
        batch_rows: rows that are run at once.
        inputs: JSON that identifies model and corpus, and everything else that changes what
            is recorded.
        model_name: for delphi's tools, which look for a tokenizer by it.
        vocab_size: token ids are below it.
        on_progress: called with the number of rows that are done, those of earlier calls included.

    Raises:
        ConfigError: `out` holds another recording, or something else; a number out of range.
        DataError: too few rows, a row of another length, a token outside the vocabulary, other
            rows than an earlier call had; what is in `out` is damaged, or cannot be written.
        CheckpointError: a value that is not finite.
    """
    if not points:
        raise ConfigError("no layer is chosen: choose one at least")
    numbers = {"n_rows": n_rows, "row_length": row_length, "batch_rows": batch_rows}
    for name, number in numbers.items():
        if number < 1:
            raise ConfigError(f"{name}={number} is below 1: give a larger number")
    out = Path(out)
    description = {
        "version": VERSION,
        "n_rows": n_rows,
        "row_length": row_length,
        "vocab_size": vocab_size,
        "model_name": model_name,
        "layers": {
            folder_of(i): {"layer": i, "kept": points[i].kept, "is_topk": points[i].is_topk}
            for i in sorted(points)
        },
        "inputs": json.loads(json.dumps(inputs)),
    }
    with _locked(out):
        if not (out / INFO_NAME).exists():
            with closing(Unfinished(out, description)) as unfinished:
                _collect(forward, points, rows, batch_rows, unfinished, on_progress)
                finish(unfinished, out)
        recording = open_recording(out)
        there = {name: recording.info.get(name) for name in description}
        there["layers"] = {
            name: {key: value for key, value in one.items() if key != "survivors"}
            for name, one in there["layers"].items()
        }
        refuse_other(out, there, description)
        # An earlier call may have been cut short between its last two steps.
        shutil.rmtree(out / UNFINISHED_NAME, ignore_errors=True)
    return recording


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """The folder, made where there is none, for this process alone."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file: give a folder for the recording")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks: two at once are the user's to avoid
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"{out} is being recorded by another process: wait for it, or choose another"
                ) from None
        yield
    finally:
        os.close(descriptor)


def _collect(
    forward: Callable[[Tensor], Any],
    points: Mapping[int, Point],
    rows: Iterable[Tensor | Sequence[int]],
    batch_rows: int,
    unfinished: Unfinished,
    on_progress: Callable[[int], None] | None,
) -> None:
    """Add to `unfinished` the rows that it lacks, and save it."""
    # A finished pass that only has to be sorted does not ask for rows.
    n_rows = unfinished.recording["n_rows"]
    batches = _batches(rows, batch_rows, unfinished) if unfinished.done.rows < n_rows else ()
    saved_at = time.monotonic()
    if on_progress is not None:
        on_progress(unfinished.done.rows)
    try:
        with torch.no_grad(), listening(points) as heard:
            for tokens in batches:
                heard.clear()
                forward(tokens)
                found, width = _checked(heard, points, tokens, unfinished.done.width)
                unfinished.append(tokens.numpy(), found, width)
                if time.monotonic() - saved_at >= SAVE_SECONDS:
                    unfinished.save()
                    saved_at = time.monotonic()
                if on_progress is not None:
                    on_progress(unfinished.done.rows)
    except BaseException:
        with suppress(DataError):  # what went wrong first is what is said
            unfinished.save()
        raise
    unfinished.save()


def _batches(
    rows: Iterable[Tensor | Sequence[int]], batch_rows: int, unfinished: Unfinished
) -> Iterator[Tensor]:
    """The rows that are still to be done: int64 [B, S].

    DataError where those that are done are not the ones that were recorded, or there are too few.
    """
    wanted = unfinished.recording
    rows = iter(rows)
    before = chain.from_iterable(unfinished.rows_of_tokens(ROWS_AT_ONCE))
    for i, recorded in enumerate(before):
        row = next(rows, None)
        if row is None or not np.array_equal(_token_ids(row, i, wanted).numpy(), recorded):
            raise DataError(
                f"row {i} of the corpus is not the one that the unfinished recording in"
                f" {unfinished.folder.parent} has: give the same corpus, or choose a new folder"
            )
    done, n_rows = unfinished.done.rows, wanted["n_rows"]
    while done < n_rows:
        some = list(islice(rows, min(batch_rows, n_rows - done)))
        if not some:
            raise DataError(f"the corpus ends after {done} rows, where n_rows={n_rows} are wanted")
        yield torch.stack([_token_ids(row, done + i, wanted) for i, row in enumerate(some)])
        done += len(some)


def _token_ids(row: Tensor | Sequence[int], i: int, wanted: dict[str, Any]) -> Tensor:
    """A row as int64 [S] on the CPU; DataError for another length, or a token out of range."""
    tokens = torch.as_tensor(row, dtype=torch.int64, device="cpu")
    row_length, vocab_size = wanted["row_length"], wanted["vocab_size"]
    if tokens.shape != (row_length,):
        raise DataError(f"row {i} of the corpus has shape {list(tokens.shape)}, not [{row_length}]")
    smallest, largest = tokens.min().item(), tokens.max().item()
    if smallest < 0 or largest >= vocab_size:
        wrong = smallest if smallest < 0 else largest
        raise DataError(
            f"row {i} of the corpus has the token {wrong}, where the vocabulary is 0 to"
            f" {vocab_size - 1}: use the tokenizer that the model was trained with"
        )
    return tokens


@dataclass(frozen=True)
class Heard:
    """What one point gave in one forward pass: the shape of its output, and what is kept of it."""

    shape: tuple[int, ...]
    survivors: Survivors


@contextmanager
def listening(points: Mapping[int, Point]) -> Iterator[dict[int, list[Heard]]]:
    """What the points give, by layer, while the block runs; their hooks are removed after it."""
    heard: dict[int, list[Heard]] = {}

    def hook(layer: int, point: Point) -> Callable[[nn.Module, Any, Tensor], None]:
        def listen(module: nn.Module, arguments: Any, output: Tensor) -> None:
            y = output.detach() if point.transform is None else point.transform(output.detach())
            heard.setdefault(layer, []).append(Heard(tuple(y.shape), select(y, point.keep)))

        return listen

    handles = []
    try:
        for layer, point in points.items():
            handles.append(point.module.register_forward_hook(hook(layer, point)))
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def select(y: Tensor, keep: str | int) -> Survivors:
    """What is kept of y, [B, S, D], any floating dtype: see Point.keep.

    Found on the device of y; what is kept alone is brought to the CPU.
    """
    y = y.reshape(-1, y.shape[-1])  # [P, D]
    if isinstance(keep, str) or keep >= y.shape[1]:
        places, neurons = y.nonzero(as_tuple=True)  # [M], [M], by place
        values = y[places, neurons]
        counts = torch.bincount(places, minlength=len(y))  # [P]
    else:
        largest = y.abs().topk(keep, sorted=False).indices.sort(dim=1).values  # [P, k]
        values = y.gather(1, largest)
        held = values != 0
        counts, neurons, values = held.sum(dim=1), largest[held], values[held]
    return Survivors(*(one.cpu().numpy() for one in (counts, neurons.int(), values.float())))


def _checked(
    heard: dict[int, list[Heard]], points: Mapping[int, Point], tokens: Tensor, width: int | None
) -> tuple[dict[int, Survivors], int]:
    """The survivors by layer, and D, which all layers share."""
    for layer in sorted(points):
        times = len(heard.get(layer, []))
        if times != 1:
            raise ConfigError(f"the module of layer {layer} ran {times} times in a forward pass")
        shape = heard[layer][0].shape
        if len(shape) != 3 or shape[:2] != tuple(tokens.shape):
            raise ConfigError(
                f"the module of layer {layer} gives the shape {list(shape)} for tokens of shape"
                f" {list(tokens.shape)}: [B, S, D] is wanted"
            )
        if width is None:
            width = shape[2]
        if shape[2] != width:
            raise ConfigError(f"layer {layer} has {shape[2]} neurons, where {width} were before")
        if not np.isfinite(heard[layer][0].survivors.values).all():
            raise CheckpointError(
                f"layer {layer} has values that are not finite (NaN or infinite, as float32): use"
                " another checkpoint, or compute in a dtype of larger range"
            )
    return {layer: heard[layer][0].survivors for layer in sorted(points)}, width
