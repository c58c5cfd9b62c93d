"""The files of an analysis: who writes them, who reads them, and what they are called.

OUT/
  analysis.json          what was analysed, how and when; written last
  model/recording/       which neurons fire where (see lingua_topk.analysis.recording)
  model/layers/03.safetensors    the measures of layer 3, arrays [D] or [D, n] by name
  model/words/03.jsonl   a line a neuron: the words it fires on most strongly, with its values
                         there; and those that tell it apart, with bits and mean value
  random/                the same of the same architecture with random weights
  twin/                  the same of the vanilla twin, where one was given
  random_twin/           and of the twin's architecture with random weights
"""

import json
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from apps.topk.neurons.measures import Measured
from apps.topk.provenance import write_bytes, write_json, write_text
from lingua_topk.analysis.distinctive import DistinctiveWord
from lingua_topk.analysis.recording import LayerRecording
from lingua_topk.analysis.semantics import told_by_words
from lingua_topk.errors import DataError

VERSION = 2
DONE_NAME = "analysis.json"
MODEL, RANDOM, TWIN, RANDOM_TWIN = "model", "random", "twin", "random_twin"
RECORDING = "recording"


@dataclass(frozen=True)
class MeasuredLayer:
    """The measures of one layer as they lie in an analysis folder.

    Attributes:
        index: the layer.
        is_topk: whether its block has TopK.
        kept: which values were recorded, in words.
        n_tokens: that were recorded.
        arrays: [D] or [D, n] by name.
        words: of each neuron, with its value of largest magnitude there.
        distinctive: the words that tell each neuron apart, see `distinctive_words`.
    """

    index: int
    is_topk: bool
    kept: str
    n_tokens: int
    arrays: dict[str, np.ndarray]
    words: list[list[tuple[str, float]]]
    distinctive: list[list[DistinctiveWord]]

    @property
    def told(self) -> np.ndarray:
        """bool [D], see `told_by_words`."""
        return told_by_words(self.arrays["n_with_vector"], self.arrays["coverage"])


def write_layer(folder: Path, layer: LayerRecording, measured: Measured, inputs: str) -> None:
    """Write a layer's files. inputs: a digest of what they are made from; see `is_measured`."""
    both = zip(measured.words, measured.distinctive, strict=True)
    lines = (
        json.dumps(
            {"neuron": neuron, "words": words, "distinctive": [list(astuple(one)) for one in own]}
        )
        + "\n"
        for neuron, (words, own) in enumerate(both)
    )
    write_text(_words_path(folder, layer.index), "".join(lines))
    metadata = {
        "layer": str(layer.index), "is_topk": str(layer.is_topk).lower(), "kept": layer.kept,
        "n_tokens": str(layer.n_tokens), "inputs": inputs,
    }  # fmt: skip
    write_bytes(_arrays_path(folder, layer.index), save(measured.arrays, metadata))


def is_measured(folder: Path, layer: int, inputs: str) -> bool:
    """Whether the layer's files are there and made from the same."""
    if not _words_path(folder, layer).is_file():
        return False
    try:
        with safe_open(_arrays_path(folder, layer), "numpy") as file:
            return file.metadata().get("inputs") == inputs
    except (OSError, SafetensorError, AttributeError):
        return False


def read_layers(folder: Path) -> list[MeasuredLayer]:
    """The layers of one part, such as OUT/model, by index; none where there is no such part."""
    return [_read_layer(folder, path) for path in sorted(folder.glob("layers/*.safetensors"))]


def _read_layer(folder: Path, path: Path) -> MeasuredLayer:
    try:
        with safe_open(path, "numpy") as file:
            facts = file.metadata()
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        index = int(facts["layer"])
        text = _words_path(folder, index).read_text(encoding="utf-8")
        records = [json.loads(line) for line in text.splitlines()]
        words = [[(word, float(value)) for word, value in one["words"]] for one in records]
        distinctive = [
            [DistinctiveWord(word, float(bits), float(mean)) for word, bits, mean in some]
            for some in (one["distinctive"] for one in records)
        ]
        if len(words) != len(arrays["counts"]):
            raise ValueError(f"words of {len(words)} neurons, and {len(arrays['counts'])} measured")
        return MeasuredLayer(
            index, facts["is_topk"] == "true", facts["kept"], int(facts["n_tokens"]), arrays,
            words, distinctive,
        )  # fmt: skip
    except (OSError, SafetensorError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{path} is no layer of an analysis ({error}): analyse again") from None


def read_analysis(out: Path) -> dict[str, Any]:
    """What analysis.json holds. DataError where the folder holds no finished analysis."""
    path = out / DONE_NAME
    if not path.is_file():
        raise DataError(
            f"{out} holds no finished analysis (it has no {DONE_NAME}): make one with python -m"
            " apps.topk.analyze"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']!r}, where {VERSION} is read")
        return content
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({error}): analyse again") from None


def write_analysis(out: Path, content: dict[str, Any]) -> None:
    write_json(out / DONE_NAME, {"version": VERSION, **content})


def _arrays_path(folder: Path, layer: int) -> Path:
    return folder / "layers" / f"{layer:02d}.safetensors"


def _words_path(folder: Path, layer: int) -> Path:
    return folder / "words" / f"{layer:02d}.jsonl"
