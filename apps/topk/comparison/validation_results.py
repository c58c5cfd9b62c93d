"""What apps.topk.eval wrote: validation.json, and the documents it was computed from."""

import math
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import numpy as np

from apps.topk.comparison.estimates import Estimate, Items, usable_stderr
from apps.topk.comparison.fields import Fields, as_number, read_json_lines
from apps.topk.comparison.measures import L0, VALIDATION, Measure, Result, reproduced
from apps.topk.evaluation.results import (
    DOCUMENTS_NAME,
    PROVENANCE,
    VALIDATION_NAME,
    steering_told,
)
from lingua_topk.errors import DataError

PERPLEXITY, BITS = "perplexity", "bits a byte"
LN_2 = math.log(2)


def read_validation(
    content: Fields, documents: Path, units: Hashable
) -> tuple[dict[Measure, Result], list[str]]:
    """The measures in validation.json, and notes on what was left out.

    content: the whole file; documents: where the per-document file would lie; units: what
    tells the tokenizer, whose tokens perplexity is counted by. DataError.
    """
    by_source = _documents(documents) if documents.is_file() else {}
    common = _common_settings(content.section(PROVENANCE))
    results: dict[Measure, Result] = {}
    notes: list[str] = []
    fired: list[tuple[float, int]] = []
    for source in content.content:
        if source == PROVENANCE:
            continue
        measured = content.section(source)
        found = _measures(measured, by_source.get(source), units, common)
        results |= {Measure(VALIDATION, source, name): one for name, one in found.items()}
        if source in by_source and any(one.items is None for one in found.values()):
            notes.append(
                f"{DOCUMENTS_NAME} does not add up to {VALIDATION_NAME} for {source} and is left"
                " out: they are of different evaluations"
            )
        fired += _survivors(measured)
    if fired:
        tokens = sum(n for _, n in fired)
        mean = sum(l0 * n for l0, n in fired) / tokens
        results[L0] = Result(Estimate(mean, None), better=0)
    return results, notes


def _common_settings(origin: Fields) -> dict[str, Any]:
    as_trained = bool(origin.section("args").content.get("as_trained", False))
    steered = steering_told(origin.content.get("steer")) or "by nothing"
    return {"dtype": origin.text("dtype"), "as_trained": as_trained, "steered": steered}


def _measures(
    measured: Fields, documents: list[Fields] | None, units: Hashable, common: dict[str, Any]
) -> dict[str, Result]:
    """Perplexity and bits a byte of one source."""
    n = measured.whole("documents")
    settings = {
        "documents": n, "bytes": measured.whole("bytes"),
        "window": measured.content.get("window"), "context": measured.content.get("context"),
        "bos": measured.content.get("bos"), **common,
    }  # fmt: skip
    perplexity, bits = measured.positive("perplexity"), measured.number("bits_per_byte")
    error = usable_stderr(measured.content.get("nll_per_token_stderr"))
    nats = _items(documents, "tokens", 1.0)
    # Delta method: perplexity = exp(nats a token).
    known = Estimate(perplexity, None if error is None else perplexity * error)
    if reproduced(nats, perplexity, is_log=True) is None:
        nats = None
    bit_items = _items(documents, "bytes", LN_2)
    again = reproduced(bit_items, bits, is_log=False)
    # Its standard error is not in the file, since bytes a token vary with the document.
    known_bits = Estimate(bits, again.stderr if again else None)
    bit_items = bit_items if again else None
    return {
        PERPLEXITY: Result(known, -1, True, n, nats, units, settings),
        BITS: Result(known_bits, -1, False, n, bit_items, None, settings),
    }


def _items(documents: list[Fields] | None, weight: str, nats: float) -> Items | None:
    """An item a document: its likelihood in units of `nats`, by `weight`.

    The same document is told by its index and its bytes.
    """
    if not documents:
        return None
    return Items(
        ids=tuple((one.whole("document"), one.whole("bytes")) for one in documents),
        amounts=np.array([one.number("nll") / nats for one in documents]),
        weights=np.array([float(one.whole(weight)) for one in documents]),
    )


def _documents(path: Path) -> dict[str, list[Fields]]:
    """The lines by source, in the order of their documents."""
    found: dict[str, dict[int, Fields]] = {}
    for line in read_json_lines(path):
        lines = found.setdefault(str(line.content.get("source")), {})
        document = line.whole("document")
        if document in lines:
            raise DataError(
                f"{line.place}: document {document} is there twice: evaluate that checkpoint again"
            )
        lines[document] = line
    return {source: [lines[i] for i in sorted(lines)] for source, lines in found.items()}


def _survivors(measured: Fields) -> list[tuple[float, int]]:
    """Mean survivors a token over the TopK layers, and over how many tokens; or nothing."""
    layers = [as_number(mean) for mean in measured.section("l0").content.values()]
    counts = [mean for mean in layers if mean is not None]
    tokens = measured.whole("tokens")
    return [(sum(counts) / len(counts), tokens)] if counts and tokens else []
