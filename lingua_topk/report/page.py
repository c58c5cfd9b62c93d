"""The page: one HTML file that holds its data, its scripts and its looks, and loads nothing.

What is shown at once stands in one small chunk; what belongs to single neurons and texts lies
in chunks of its own, which scripts/data.js unpacks when they are asked for (see chunks.py).
Text of a corpus is inside chunks only, and reaches the page as text nodes.
"""

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from lingua_topk.report.chunks import known, narrow, pack, quantised
from lingua_topk.report.data import Figure, Firings, Layer, Report, Text, Trace
from lingua_topk.report.steered import steering_values
from lingua_topk.report.svg import cleaned

# What the file begins with, by which a page of ours is known.
MARK = "<!doctype html>\n<!-- written by apps.topk.report: it may be replaced by it -->\n"
FOLDER = Path(__file__).parent
# In this order they become one script.
SCRIPTS = ("data", "show", "tokens", "charts", "overview", "table", "steering", "neuron", "texts",
           "main")  # fmt: skip

NEURONS_A_CHUNK = 64
TABLE_WORDS = 6
TABLE_TOKENS = 6
WORDS = 20
# Shown in the table; all are shown with the neuron.
COLUMNS = ("firing_rate", "maximum", "token_entropy", "shuffled_token_entropy",
           "semantic_entropy", "mono_score")  # fmt: skip
NUMBERS = (*COLUMNS, "mean", "token_entropy_count", "token_entropy_normalised",
           "shuffled_token_entropy_count", "shuffled_semantic_entropy", "shuffled_mono_score",
           "n_words", "n_with_vector", "coverage")  # fmt: skip
TRACED = ("token_entropy", "semantic_entropy", "overlap")


def page(report: Report) -> str:
    """The whole file as text. The same report gives the same text."""
    script = _script()
    style = (FOLDER / "style.css").read_text(encoding="utf-8")
    parts = {
        "title": html.escape(_written(report.title)),
        "policy": _policy(script, style),
        "style": style,
        "script": script,
        "figures": "\n".join(
            _figure(figure, f"figure-{i}-") for i, figure in enumerate(report.figures)
        ),
        "steering_link": '<a href="#steering">Steering</a>' if report.steering else "",
        "steering": _steering(report),
        "meta": _json(_meta(report)),
        "chunks": "\n".join(
            f'<script type="application/octet-stream;base64" id="chunk-{name}">{text}</script>'
            for name, text in _chunks(report)
        ),
    }
    return MARK + _filled("page", parts)


def _filled(name: str, parts: Mapping[str, str]) -> str:
    """A template with its parts, in one pass: what is filled in is not looked into."""
    template = (FOLDER / f"{name}.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def _script() -> str:
    texts = [(FOLDER / "scripts" / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS]
    return '"use strict";\n{\n' + "\n".join(texts) + "}\n"


def _policy(script: str, style: str) -> str:
    """Nothing is loaded from anywhere; the page's own script and looks are known by their hash."""

    def digest(text: str) -> str:
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    return (
        f"default-src 'none'; script-src 'sha256-{digest(script)}';"
        f" style-src 'sha256-{digest(style)}'; img-src data:; base-uri 'none'; form-action 'none'"
    )


def _json(content: Any) -> str:
    """JSON that may stand in a script element: neither `</script` nor `<!--` can be in it."""
    return json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")


def _written(text: str) -> str:
    """Text for the page's own HTML, where no script makes control characters visible."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def _figure(figure: Figure, prefix: str) -> str:
    title, caption = (html.escape(_written(text)) for text in (figure.title, figure.caption))
    drawing = cleaned(figure.svg, prefix)
    return f"<figure><h3>{title}</h3>{drawing}<figcaption>{caption}</figcaption></figure>"


def _steering(report: Report) -> str:
    """The section of that name, "" where nothing was steered."""
    if report.steering is None:
        return ""
    figure = report.steering.figure
    return _filled("steering", {"figure": _figure(figure, "steering-") if figure else ""})


def _meta(report: Report) -> dict[str, Any]:
    """What the page knows before it unpacks anything."""
    firsts = np.cumsum([0, *(layer.width for layer in report.layers)]).tolist()
    return {
        "title": report.title,
        "facts": [list(fact) for fact in report.facts],
        "sentences": list(report.sentences),
        "tables": [vars(table) for table in report.tables],
        "layers": [
            {
                "index": layer.index, "isTopk": layer.is_topk, "kept": layer.kept, "first": first,
                "width": layer.width,
            }
            for layer, first in zip(report.layers, firsts, strict=False)
        ],
        "columns": list(COLUMNS),
        "numbers": list(NUMBERS),
        "neuronsAChunk": NEURONS_A_CHUNK,
        "tokens": int(report.rows.size),
        "strongest": report.strongest,
        "texts": [
            {"name": text.name, "row": text.row, "length": len(text.tokens)}
            for text in report.texts
        ],
        "trace": _trace_meta(report.trace),
        "isSteered": report.steering is not None,
    }  # fmt: skip


def _trace_meta(trace: Trace | None) -> dict[str, Any] | None:
    if trace is None:
        return None
    baselines = {
        name: [known(np.nanmedian(row)) if np.isfinite(row).any() else None for row in array]
        for name, array in trace.shared.items()
        if name.startswith("shifted_")
    }
    return {
        "steps": [int(step) for step in trace.steps],
        "annealedAt": trace.annealed_at,
        "layers": sorted(trace.layers),
        "pairs": np.asarray(trace.pairs).tolist(),
        "baselines": baselines,
    }


def _chunks(report: Report) -> Iterator[tuple[str, str]]:
    """Name and text of every chunk."""
    yield "table", _table(report)
    for layer in report.layers:
        for first in range(0, layer.width, NEURONS_A_CHUNK):
            part = slice(first, min(first + NEURONS_A_CHUNK, layer.width))
            yield f"{layer.index}-{first // NEURONS_A_CHUNK}", _neurons(report, layer, part)
    if report.texts:
        tokens = np.concatenate([text.tokens for text in report.texts])
        yield "texts", pack({"tokens": narrow(tokens, len(report.pieces))}, {})
    for i, text in enumerate(report.texts):
        yield f"text-{i}", _text(text)
    if report.steering is not None:
        yield "steering", pack({}, steering_values(report.steering))


def _table(report: Report) -> str:
    """The table of neurons, those of all layers in turn, and the vocabulary."""
    layers = report.layers
    arrays = {name: np.concatenate([_measure(layer, name) for layer in layers]) for name in COLUMNS}
    arrays["dead"] = np.concatenate([layer.arrays["counts"] == 0 for layer in layers]).astype("u1")
    arrays["told"] = np.concatenate([layer.told for layer in layers]).astype("u1")
    tokens = [_columns(layer.arrays.get("top_tokens"), layer.width, -1) for layer in layers]
    arrays["tops"] = np.concatenate([one[:, :TABLE_TOKENS] for one in _equally_wide(tokens)])
    words = [_words(one, TABLE_WORDS) for one in chain.from_iterable(x.words for x in layers)]
    values = {"words": [[word for word, _ in one] for one in words], "pieces": _pieces(report)}
    return pack(arrays, values)


def _measure(layer: Layer, name: str) -> np.ndarray:
    """float32 [D], NaN where it was not measured."""
    found = layer.arrays.get(name)
    return np.full(layer.width, np.nan, "f4") if found is None else found.astype("f4")


def _columns(array: np.ndarray | None, width: int, missing: float) -> np.ndarray:
    """The array [D, n], or one column of `missing` for what was not measured."""
    return np.full((width, 1), missing, "i4") if array is None else array


def _equally_wide(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    most = max(one.shape[1] for one in arrays)
    return [np.pad(one, ((0, 0), (0, most - one.shape[1])), constant_values=-1) for one in arrays]


def _words(words: Sequence[tuple[str, float]], most: int) -> list[list[Any]]:
    """Word and value, the value rounded as far as anyone reads it."""
    return [[word, float(f"{value:.4g}")] for word, value in words[:most]]


def _pieces(report: Report) -> list[Any]:
    """Text a token; one that spells no whole characters as {"hex"}, a special one as {"name"}."""
    found: list[Any] = []
    for i, piece in enumerate(report.pieces):
        try:
            text = piece.decode("utf-8")
            found.append(text or {"name": report.special.get(i, "special")})
        except UnicodeDecodeError:
            found.append({"hex": piece.hex()})
    return found


def _neurons(report: Report, layer: Layer, part: slice) -> str:
    """Neurons of one layer with everything that is known of them."""
    given = layer.arrays
    arrays = {"numbers": np.stack([_measure(layer, name)[part] for name in NUMBERS], axis=1)}
    arrays["counts"] = given["counts"][part].astype("u4")
    for name in ("top_tokens", "promoted", "suppressed", "histogram"):
        if name in given:
            arrays[name] = given[name][part].astype("i4")
    for name in ("top_token_share", "promoted_logits", "suppressed_logits"):
        if name in given:
            arrays[name] = given[name][part].astype("f4")
    if "context_values" in given:
        arrays |= _contexts(report, layer, part)
    arrays |= _traced(report.trace, layer.index, part)
    return pack(arrays, {"words": [_words(one, WORDS) for one in layer.words[part]]})


def _contexts(report: Report, layer: Layer, part: slice) -> dict[str, np.ndarray]:
    """Windows of text: token ids and values [n, C, W], and where they stand."""
    most = slice(report.n_contexts)
    rows, positions, starts, values = (
        layer.arrays[f"context_{name}"][part, most]
        for name in ("rows", "positions", "starts", "values")
    )
    # float32 [n, 1, 1]; a neuron's values are integers relative to its largest.
    largest = layer.arrays["maximum"][part, None, None]
    at = starts[:, :, None] + np.arange(values.shape[2])  # [n, C, W]
    is_there = (rows[:, :, None] >= 0) & (at < report.rows.shape[1])
    tokens = report.rows[np.maximum(rows, 0)[:, :, None], np.minimum(at, report.rows.shape[1] - 1)]
    beyond = len(report.pieces)  # stands for no token
    return {
        "context_tokens": narrow(np.where(is_there, tokens, beyond), beyond + 1),
        "context_values": quantised(np.where(is_there, values, 0), largest, np.int8),
        "context_rows": rows.astype("i4"),
        "context_peaks": (positions - starts).astype("i4"),
        "context_starts": starts.astype("i4"),
    }


def _traced(trace: Trace | None, index: int, part: slice) -> dict[str, np.ndarray]:
    """[n, C] each, and what the neurons share with those of other layers, [n, P]."""
    if trace is None or index not in trace.layers:
        return {}
    given = trace.layers[index]
    found = {f"trace_{name}": given[name][:, part].T.astype("f4") for name in TRACED}
    found["trace_counts"] = given["counts"][:, part].T.astype("u4")
    found["trace_settled"] = given["settle_step"][part].astype("i4")
    if "top_tokens" in given:
        found["trace_tops"] = given["top_tokens"][:, part, :5].transpose(1, 0, 2).astype("i4")
    for name in ("overlap", "correlation"):
        if name in trace.shared:
            found[f"shared_{name}"] = trace.shared[name][:, part].T.astype("f4")
    return found


def _text(text: Text) -> str:
    """What fires on a text: by layer the neurons at each position, strongest first."""
    arrays: dict[str, np.ndarray] = {}
    scales = {}
    for index, one in text.firings.items():
        order = np.lexsort((-np.abs(one.values), one.positions))
        at = np.bincount(one.positions, minlength=len(text.tokens))
        scales[str(index)] = scale = _largest(one)
        arrays[f"{index}-offsets"] = np.concatenate([[0], np.cumsum(at)]).astype("u4")
        arrays[f"{index}-neurons"] = one.neurons[order].astype("u4")
        arrays[f"{index}-values"] = quantised(one.values[order], np.array(scale), np.int16)
    return pack(arrays, {"scales": scales})


def _largest(one: Firings) -> float:
    return float(np.abs(one.values).max()) if len(one.values) else 0.0
