"""Fake layers to record, whose outputs are known, and what a recording of them must hold."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lingua_topk.analysis.record import Point, record
from lingua_topk.analysis.recording import LayerRecording

N_ROWS, ROW_LENGTH, WIDTH, VOCAB_SIZE = 7, 6, 10, 50
TOKENS = torch.randint(
    0, VOCAB_SIZE, (N_ROWS, ROW_LENGTH), generator=torch.Generator().manual_seed(1)
)


class Fake(nn.Module):
    """Layers whose outputs are given, [N, S, D] each; a row of tokens is known by its first two.

    stop_at: the number of the forward pass, from 0, that raises; None for none.
    """

    def __init__(self, outputs: dict[int, Tensor], tokens: Tensor = TOKENS, stop_at=None):
        super().__init__()
        self.layers = nn.ModuleDict({str(i): nn.Identity() for i in outputs})
        self.outputs, self.stop_at, self.passes = outputs, stop_at, 0
        self.rows = {tuple(row): i for i, row in enumerate(tokens.tolist())}

    def forward(self, tokens: Tensor) -> None:
        if self.passes == self.stop_at:
            raise InterruptedError("stopped here")
        self.passes += 1
        chosen = [self.rows[tuple(row)] for row in tokens.tolist()]
        for i, output in self.outputs.items():
            self.layers[str(i)](output[chosen])

    def points(self, keep="survivors") -> dict[int, Point]:
        return {i: Point(self.layers[str(i)], keep == "survivors", keep) for i in self.outputs}


def sparse(width: int = WIDTH, seed: int = 0, rows: int = N_ROWS, length: int = ROW_LENGTH):
    """Outputs [N, S, D] of both signs, of which one in three is not 0; neuron 2 is dead."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(rows, length, width, generator=generator)
    y[torch.rand(y.shape, generator=generator) > 1 / 3] = 0
    y[..., 2] = 0
    return y


def recorded(fake: Fake, out: Path, rows=TOKENS, points=None, **arguments):
    arguments = {
        "row_length": ROW_LENGTH, "n_rows": len(TOKENS), "batch_rows": 2, "inputs": {"seed": 0},
        "model_name": "fake", "vocab_size": VOCAB_SIZE, **arguments,
    }  # fmt: skip
    return record(fake, points or fake.points(), rows, out=out, **arguments)


def survivors(layer: LayerRecording, **arguments) -> list[tuple[int, int, float]]:
    """All (place, neuron, value), in the order of the recording."""
    return [
        (place, block.first + neuron, value)
        for block in layer.blocks(**arguments)
        for place, neuron, value in zip(
            block.places.tolist(), block.neurons.tolist(), block.values.tolist(), strict=True
        )
    ]


def by_definition(y: Tensor, k: int | None = None) -> list[tuple[int, int, float]]:
    """What is kept of outputs [N, S, D]: read off the dense values one after the other."""
    found = []
    for place, values in enumerate(np.asarray(y.float()).reshape(-1, y.shape[-1])):
        magnitudes = sorted(np.abs(values).tolist(), reverse=True)
        limit = magnitudes[k - 1] if k is not None and k <= len(values) else 0.0
        for neuron, value in enumerate(values.tolist()):
            if value != 0 and abs(value) >= limit:
                found.append((place, neuron, value))
    return sorted(found, key=lambda one: (one[1], one[0]))


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
