"""An analysis from its beginning to its end: record, measure, compare; what is there is kept."""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apps.topk.checkpoint import DTYPES, Checkpoint
from apps.topk.corpus import progress
from apps.topk.model import TopKTransformer
from apps.topk.neurons import comparison, folder
from apps.topk.neurons.corpus import Rows, text_of
from apps.topk.neurons.measures import Text, measure_layer, next_tokens
from apps.topk.neurons.reading import record_model
from apps.topk.neurons.settings import Settings
from apps.topk.provenance import provenance, write_json
from lingua_topk.errors import ConfigError
from lingua_topk.nn import TopK

INPUTS_NAME = "inputs.json"
MAY_BE_THERE = {INPUTS_NAME, "trace"}  # in a folder that an analysis is begun in


@dataclass
class Analysis:
    """Of one checkpoint, with its controls and, where there is one, its twin.

    Attributes:
        layers: which are recorded.
        k: values a token that are kept where there is no TopK, None for all.
        twin_values: "selected" by TopK of the same layer, or "largest" by magnitude.
        vectors_from: what `read_vectors` takes; "" for the checkpoint's own embeddings.
        out: the folder it is written to.
    """

    checkpoint: Checkpoint
    twin: Checkpoint | None
    rows: Rows
    settings: Settings
    layers: list[int]
    k: int | None
    twin_values: str
    vectors_from: str
    device: torch.device
    dtype: str
    batch_rows: int
    out: Path

    def run(self) -> dict[str, Any]:
        """Make what is not there yet; what comparison.json holds.

        ConfigError where `out` holds something else.
        """
        model = self._loaded(self.checkpoint)
        embedding = model.tok_embeddings.weight
        self.text = text_of(self.rows, self.checkpoint, self.vectors_from, embedding)
        self._begin()  # now that what is wrong with the arguments is known
        self._measure(folder.MODEL, model)
        self._measure(folder.RANDOM, self._random(self.checkpoint))
        if self.twin is not None:
            self._measure(folder.TWIN, self._loaded(self.twin))
            self._measure(folder.RANDOM_TWIN, self._random(self.twin))
        vectors = self.text.vectors.source
        compared = comparison.compare_neurons(self.out, self.settings.seed, vectors)
        comparison.write_comparison(self.out, compared)
        folder.write_analysis(self.out, self._described())
        return compared

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """JSON that is the same only when the results would be."""
        return {
            "version": folder.VERSION,
            "checkpoint": self.checkpoint.state(),
            "twin": self.twin and self.twin.state(),
            "tokens": hashlib.sha256(self.rows.tokens.tobytes()).hexdigest(),
            "row_length": self.rows.tokens.shape[1],
            "settings": asdict(self.settings),
            "layers": self.layers,
            "k": self.k,
            "twin_values": self.twin_values,
            "vectors": hashlib.sha256(self.text.vectors.vectors.tobytes()).hexdigest(),
            "dtype": self.dtype,
        }

    @cached_property
    def _shuffled(self) -> Text:
        return self.text.shuffled(self.settings.seed)

    def _begin(self) -> None:
        path = self.out / INPUTS_NAME
        if path.is_file():
            self._check_same(path)
            return
        names = {one.name for one in self.out.iterdir()} if self.out.is_dir() else set()
        others = {name for name in names if not name.startswith(".")}
        if self.out.exists() and (not self.out.is_dir() or others - MAY_BE_THERE):
            raise ConfigError(f"out={str(self.out)!r} is there and is no analysis: give another")
        try:
            write_json(path, self.inputs)
        except OSError as error:
            raise ConfigError(
                f"out={str(self.out)!r} cannot be written ({error.strerror}): give another folder"
            ) from None

    def _check_same(self, path: Path) -> None:
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
            different = [name for name in self.inputs if there.get(name) != self.inputs[name]]
        except (OSError, ValueError, AttributeError):
            different = ["what it was made from"]
        if different:
            raise ConfigError(
                f"out={str(self.out)!r} holds an analysis with another {different[0]}: give another"
                " --out, or remove it"
            )

    def _loaded(self, checkpoint: Checkpoint) -> nn.Module:
        return checkpoint.model(self.device, DTYPES[self.dtype])

    def _random(self, checkpoint: Checkpoint) -> nn.Module:
        """Its architecture with weights that training could begin with."""
        torch.manual_seed(self.settings.seed)
        model = TopKTransformer(checkpoint.model_args)
        model.init_weights()
        for parameter in model.parameters():  # the rotary table stays in float32
            parameter.data = parameter.data.to(DTYPES[self.dtype])
        return model.eval().requires_grad_(False).to(self.device)

    def _measure(self, part: str, model: nn.Module) -> None:
        """Record and measure the layers that are not measured yet."""
        place = self.out / part
        inputs = {"part": part, **self.inputs}
        digest = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
        todo = [i for i in self.layers if not folder.is_measured(place, i, digest)]
        keeps = part == folder.MODEL  # the report shows what fires on its texts
        if not todo and not keeps:
            shutil.rmtree(place / folder.RECORDING, ignore_errors=True)
            return
        vocab_size = self.checkpoint.model_args.vocab_size
        recording = record_model(
            model,
            self.rows.tokens,
            place / folder.RECORDING,
            layers=self.layers,
            k=self.k,
            site=self._site,
            selections=self._selections if part in (folder.TWIN, folder.RANDOM_TWIN) else None,
            batch_rows=self.batch_rows,
            inputs=inputs,
            name=str(self.checkpoint.folder),
            vocab_size=vocab_size,
            label=f"reading with {part}",
        )
        promoted = next_tokens(model) if todo and self._site != "mlp" else {}
        with progress.bar(f"measuring {part}", len(todo), "layer") as shown:
            for i in progress.ticking(todo, shown):
                layer = recording.layer(i)
                measured = measure_layer(
                    layer, self.text, self._shuffled, vocab_size, self.settings
                )
                measured.arrays.update(promoted)
                folder.write_layer(place, layer, measured, digest)
        if not keeps:
            shutil.rmtree(place / folder.RECORDING)

    @property
    def _selections(self) -> dict[int, TopK] | None:
        """What the layers of the twin are read by; None for magnitude."""
        args = self.checkpoint.model_args.topk
        if args is None or self.twin_values == "largest":
            return None
        layers = args.topk_layers(self.checkpoint.model_args.n_layers)
        return {i: TopK(args.k, args.activation) for i in layers}

    @property
    def _site(self) -> str | None:
        """Where the checkpoint has its neurons: the twin is recorded there too."""
        topk = self.checkpoint.model_args.topk
        return topk and topk.site

    def _described(self) -> dict[str, Any]:
        twin = [folder.TWIN, folder.RANDOM_TWIN] if self.twin else []
        return {
            "parts": [folder.MODEL, folder.RANDOM, *twin],
            "checkpoint": self.checkpoint.describe(),
            "step": self.checkpoint.step,
            "alpha": self.checkpoint.alpha,  # that training had reached; read with 0
            "twin": self.twin and self.twin.describe(),
            "corpus": self.rows.describe(),
            "layers": self.layers,
            "k": self.k,
            "twin_values": self.twin_values,
            "vectors": self.text.vectors.source,
            "settings": asdict(self.settings),
            "dtype": self.dtype,
            "provenance": provenance(),
        }
