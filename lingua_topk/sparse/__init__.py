"""Decoding that reads of the weights behind TopK only what the survivors meet.

Behind a TopK block (`site: residual`) k of the D inputs of the next block's q, k and v are not
zero: the norm between scales them one by one. Behind a TopK gate (`site: mlp`) the same holds
for the inputs of w2, and of w3 only the rows that are multiplied with a survivor matter. At small
batch a token costs the reading of the weights, and these are read in rows of feature-major
copies. The values are looked at when they arrive: whatever has changed them (steering, ties) the
result is that of the dense product up to the order of the sum.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from lingua_topk.errors import ConfigError
from lingua_topk.patch import TopKHandle, topk_handle
from lingua_topk.sparse.feed_forward import SparseFeedForward
from lingua_topk.sparse.modules import is_compiled
from lingua_topk.sparse.projections import SparseProjections


class SparseDecoding:
    """Of one model, what it takes to read only those weights that are needed.

    Within `active()` what stands behind TopK gathers where that is faster, whoever runs the
    model: by the number of rows, so that a prompt of many tokens is read as ever. Hooks on all
    modules act as ever; where they wait at a product that would be gathered, it stays dense. So
    do the first block, blocks behind others than TopK layers, annealed layers (alpha above 0),
    training, autocast, what is compiled or sharded, a part that has been replaced since, and a
    copy of the model that is made within.

    One thread at a time: while it is active, modules of the model are not as they were, for
    whichever thread runs them.

    Memory, beside the model: of a block behind a residual TopK layer a copy of q, k and v, 3 D^2
    weights (with grouped heads less); of a block with a TopK gate one of w2, F D weights. They
    are made when a block gathers for the first time, and kept until `forget`.

    Within `active()` no weight may change. Once one has been replaced, or changed in place, the
    copies are made anew at the next `active()`; but what leaves no trace in torch is not seen:
    a step of a fused optimizer, a change through `.data` or of weights that were made in
    inference mode. Call `forget` then.

    Args:
        model: a host's LMTransformer with TopK; it may stand inside a wrapper.

    Raises: ConfigError for a model without TopK, or one whose parts are not known; the text
    names them.
    """

    def __init__(self, model: nn.Module):
        handle = topk_handle(model)
        if handle is None:
            raise ConfigError(
                f"{type(model).__name__} has no TopK: there is nothing sparse in it to decode with"
            )
        self._model, self._parts = handle.model, _parts_of(handle)

    @property
    def layers(self) -> list[int]:
        """The blocks that can gather, by index."""
        return sorted(self._parts)

    @property
    def copied_bytes(self) -> int:
        """What the copies of weights take now."""
        return sum(part.copy.nbytes for part in self._parts.values())

    def forget(self) -> None:
        """Drop all copies; they are made anew when they are needed."""
        for part in self._parts.values():
            part.copy.forget()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within it the model decodes sparsely; behind it all is as before."""
        with ExitStack() as undo:
            for layer, part in self._parts.items():
                # What is compiled would be compiled anew.
                if not is_compiled(self._model) and not is_compiled(self._model.layers[layer]):
                    undo.enter_context(part.active())
            yield


def _parts_of(handle: TopKHandle) -> dict[int, SparseProjections | SparseFeedForward]:
    """By the block that they are in."""
    blocks = handle.model.layers
    if handle.args.site == "mlp":
        return {
            layer: SparseFeedForward(blocks[layer].feed_forward, topk, f"layers.{layer}")
            for layer, topk in handle.modules.items()
        }
    return {
        layer + 1: SparseProjections(blocks[layer + 1], blocks[layer], topk, f"layers.{layer + 1}")
        for layer, topk in handle.modules.items()
        if layer + 1 < len(blocks)
    }


__all__ = ["SparseDecoding"]
