"""What the page of a report shows, read from an analysis folder."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from apps.topk.cli import one_line
from apps.topk.neurons import comparison_text
from apps.topk.neurons.folder import MODEL, MeasuredLayer, read_analysis, read_layers
from lingua_topk.analysis.recording import LayerRecording, Recording, open_recording
from lingua_topk.errors import DataError
from lingua_topk.report.data import Figure, Firings, Layer, Report, Table, Text, Trace

RECORDING = Path(MODEL, "recording")
TRACE = "trace"
TRACE_FIGURES = {
    "settling": "When neurons settle",
    "overlap": "Overlap with the final self",
    "token_entropy": "Token entropy over training",
    "semantic_entropy": "Semantic entropy over training",
    "layers": "The same index over layers",
}


def read_page_data(
    folder: Path,
    pieces: Sequence[bytes],
    special: Mapping[int, str],
    *,
    n_texts: int,
    strongest: int,
    n_contexts: int,
    given: Sequence[Text] = (),
) -> Report:
    """The report of an analysis.

    Args:
        folder: what apps.topk.analyze wrote.
        pieces: what each token spells, in UTF-8.
        special: names of special tokens.
        n_texts: rows of the recording that can be chosen, evenly spread over it.
        strongest: neurons a token and layer that are kept of them.
        n_contexts: a neuron, at most.
        given: texts that stand before them.

    Raises: DataError where a part is missing, damaged, or does not fit the others.
    """
    about = read_analysis(folder)
    recording = open_recording(folder / RECORDING)
    layers = read_layers(folder / MODEL)
    _check(folder, about, layers, recording, pieces)
    compared = read_json(folder / "comparison.json")
    return Report(
        title=_title(about),
        facts=_facts(about, recording),
        layers=[
            Layer(one.index, one.is_topk, one.kept, one.arrays, one.words, one.told)
            for one in layers
        ],
        pieces=pieces,
        special=special,
        rows=recording.tokens,
        texts=[*given, *recorded_texts(recording, n_texts, strongest)],
        figures=list(_figures(folder)),
        tables=_tables(compared) if compared else [],
        sentences=compared["conclusion"] if compared else [],
        trace=read_trace(folder / TRACE, recording.width),
        strongest=strongest,
        n_contexts=n_contexts,
    )


def _check(
    folder: Path, about: Mapping[str, Any], layers: Sequence[MeasuredLayer],
    recording: Recording, pieces: Sequence[bytes],
) -> None:  # fmt: skip
    measured = [one.index for one in layers]
    if measured != about["layers"] or not set(measured) <= set(recording.layers):
        raise DataError(
            f"{folder}: layers {about['layers']} were analysed, and {measured} are there: analyse"
            " again"
        )
    if any(len(one.arrays["counts"]) != recording.width for one in layers):
        raise DataError(f"{folder}: layers and recording do not fit together: analyse again")
    if recording.info["vocab_size"] != len(pieces):
        raise DataError(
            f"{folder} was made with a vocabulary of {recording.info['vocab_size']} tokens, where"
            f" the checkpoint has {len(pieces)}: give --ckpt the checkpoint that was analysed"
        )


def read_json(path: Path) -> dict[str, Any] | None:
    """None where the file is not there."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
        return content
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({one_line(str(error))}): make it again") from None


# The run -----------------------------------------------------------------------------------


def _title(about: Mapping[str, Any]) -> str:
    return f"Neurons of {about['checkpoint'].get('name') or 'a model'}"


def _facts(about: Mapping[str, Any], recording: Recording) -> list[tuple[str, str]]:
    model, corpus, settings = about["checkpoint"], about["corpus"], about["settings"]
    topk = model["topk"]
    sources = ", ".join(f"{name} ({n:,} documents)" for name, n in corpus["sources"].items())
    kept = {one["kept"]: None for one in recording.info["layers"].values()}
    facts = [
        ("Model", f"{model['dim']} wide, {model['n_layers']} layers, "
                  f"{model['parameters']:,} parameters"),
        ("TopK", "none" if topk is None else
         f"k = {topk['k']}, {topk['site']} site, layers {_ranges(topk['layers'])}"),
        ("Trained", f"{_count(model['tokens'])} tokens, step {_count(about['step'])} of "
                    f"{model['steps']:,}"),
        ("Layers read", _ranges(about["layers"])),
        ("Neurons", f"{recording.width * len(about['layers']):,}"),
        ("Text", f"{corpus['tokens']:,} tokens of {sources}"),
        ("Recorded", "; ".join(kept)),
        ("Word vectors", about["vectors"]),
        ("Words", f"|value| above {settings['threshold']} of the neuron's largest; "
                  f"{settings['min_words']} to {settings['max_words']} words"),
        ("Parts", ", ".join(about["parts"])),
        ("Commit", str(about["provenance"].get("commit"))),
        ("Made", str(about["provenance"].get("created_at"))),
    ]  # fmt: skip
    return facts


def _count(number: int | None) -> str:
    return "unknown" if number is None else f"{number:,}"


def _ranges(numbers: Sequence[int]) -> str:
    """0 to 2, 5: runs of consecutive numbers together."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _figures(folder: Path) -> Iterator[Figure]:
    traced = _traced_on(folder / TRACE / "trace.json")
    drawing = read_svg(folder / "entropy.svg")
    if drawing:
        yield Figure("Entropies over layers", f"{comparison_text.CAPTION}.", drawing)
    for name, title in TRACE_FIGURES.items():
        drawing = read_svg(folder / TRACE / f"{name}.svg")
        if drawing:
            yield Figure(title, traced, drawing)


def _traced_on(path: Path) -> str:
    """What the trace was made with, which may be other text and vectors than the analysis."""
    about = read_json(path)
    if about is None:
        return ""
    try:
        return (
            f"From the trace over the run's checkpoints: {about['corpus']['tokens']:,} tokens;"
            f" vectors of words: {about['settings']['vectors']}."
        )
    except (LookupError, TypeError, ValueError) as error:
        raise DataError(f"{path} is no trace ({one_line(repr(error))}): trace again") from None


def read_svg(path: Path) -> str:
    """ "" where there is none."""
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else ""
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({one_line(str(error))}): make it again") from None


def _tables(compared: Mapping[str, Any]) -> list[Table]:
    try:
        drawn = [
            *comparison_text.tables(compared),
            *comparison_text.tables(compared, every_layer=True),
        ]
        by_title = {str(one.title): one for one in drawn}  # once, where no layers are pooled
        return [
            Table(
                title,
                [str(column.header) for column in one.columns],
                [list(map(str, row)) for row in zip(*(c.cells for c in one.columns), strict=True)],
            )
            for title, one in by_title.items()
        ]
    except (LookupError, TypeError, AttributeError) as error:
        raise DataError(
            f"comparison.json is not what this version writes ({error!r}): analyse again"
        ) from None


# Texts -------------------------------------------------------------------------------------


def recorded_texts(recording: Recording, n_texts: int, strongest: int) -> list[Text]:
    """Rows of the recording, evenly spread, with the strongest neurons at each token."""
    n_rows = len(recording.tokens)
    rows = np.unique(np.linspace(0, n_rows - 1, min(n_texts, n_rows)).round().astype(np.int64))
    by_layer = {
        index: _firings_of_rows(recording.layer(index), recording.tokens.shape, rows, strongest)
        for index in recording.layers
    }
    return [
        Text(
            f"Recorded row {row}",
            recording.tokens[row],
            {index: found[i] for index, found in by_layer.items()},
            row=int(row),
        )
        for i, row in enumerate(rows)
    ]


def _firings_of_rows(
    layer: LayerRecording, shape: tuple[int, int], rows: np.ndarray, strongest: int
) -> list[Firings]:
    """Of each of the rows, what fires in a layer."""
    n_rows, length = shape
    is_chosen = np.zeros(n_rows, dtype=bool)
    is_chosen[rows] = True
    parts = []
    for block in layer.blocks():
        kept = np.flatnonzero(is_chosen[block.places // length])
        parts.append((block.places[kept], block.first + block.neurons[kept], block.values[kept]))
    places, neurons, values = (np.concatenate(column) for column in zip(*parts, strict=True))
    found = strongest_firings(Firings(places, neurons, values), strongest)
    edges = np.searchsorted(found.positions, np.append(rows, n_rows) * length)
    ends = np.searchsorted(found.positions, (rows + 1) * length)
    return [
        Firings(found.positions[a:b] - row * length, found.neurons[a:b], found.values[a:b])
        for row, a, b in zip(rows, edges[:-1], ends, strict=True)
    ]


def strongest_firings(found: Firings, most: int) -> Firings:
    """At each position at most `most`, those of largest |value|; by position, strongest first."""
    order = np.lexsort((-np.abs(found.values), found.positions))
    positions = found.positions[order]
    rank = np.arange(len(positions)) - np.searchsorted(positions, positions)
    order = order[rank < most]
    return Firings(found.positions[order], found.neurons[order], found.values[order])


# The trace ---------------------------------------------------------------------------------


def read_trace(folder: Path, width: int) -> Trace | None:
    """What apps.topk.trace wrote; None where it did not. DataError where it does not fit."""
    about = read_json(folder / "trace.json")
    if about is None:
        return None
    path = folder / "trace.safetensors"
    try:
        with safe_open(path, "numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        layers: dict[int, dict[str, np.ndarray]] = {}
        for name, array in arrays.items():
            group, _, rest = name.partition(".")
            if group == "layers":
                index, _, measure = rest.partition(".")
                layers.setdefault(int(index), {})[measure] = array
        pairs = arrays["over_layers.pairs"]
        shared = {
            name.removeprefix("over_layers."): array
            for name, array in arrays.items()
            if name.startswith("over_layers.") and array.shape == (len(pairs), width)
        }
        found = Trace(arrays["steps"].tolist(), about["annealed_at"], layers, pairs, shared)
        if not all(one["overlap"].shape == (len(found.steps), width) for one in layers.values()):
            raise ValueError("it is of another model")
        return found
    except (OSError, SafetensorError, ValueError, LookupError) as error:
        raise DataError(
            f"{path} is not the trace of this run ({one_line(str(error))}): trace again"
        ) from None
