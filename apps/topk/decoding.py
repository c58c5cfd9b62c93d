"""The step of one token a row: a function of buffers that stay, so that a GPU can record it.

On a CPU the function is called. On a GPU it is recorded as a CUDA graph once for a batch of rows
and a range of slots, and then started in one go: the time of a token is that of its kernels, and
not that of the calls which start them.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from apps.topk.inference import KVCache, hidden_states, visible, window_of
from lingua_topk.nn import TopK
from lingua_topk.sparse import SparseDecoding

logger = logging.getLogger(__name__)

# Slots of the cache that a recorded step looks at are a multiple of it: one recording for so many
# tokens.
SLOTS_AT_ONCE = 256
# Steps of a batch that are run by calls before one is recorded: rows come and go, each time the
# batch is another, and to record takes as long as a few steps (a guess, not measured).
FIRST_BY_CALLS = 3


class DecodingStep:
    """Runs one token of each row of a batch, again and again, with their cache.

    Args:
        model: a host's LMTransformer, on one device.
        cache: what was read so far. Another batch, or rows dropped, need another step.
        prompt_lengths, texts: int64 [B], as for `hidden_states`.
        sparse: what makes the model decode sparsely, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        cache: KVCache,
        prompt_lengths: Tensor,
        texts: Tensor,
        sparse: SparseDecoding | None = None,
    ):
        self._model, self._cache, self._sparse = model, cache, sparse
        self._prompt_lengths, self._texts = prompt_lengths, texts
        n_rows, device = len(texts), texts.device
        self._inputs = torch.zeros(2, n_rows, 1, dtype=torch.int64, device=device)
        self._slots = torch.arange(cache.length, device=device)[None]  # [1, length]
        self._window = window_of(model)
        self._watch = Watch(model)
        self._n_steps = 0
        self._n_recorded, self._replay = 0, None  # slots, and what runs a step that looks at them

    def run(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Read one token of each row, at its position; the hidden states, [B, D].

        They may be overwritten by the next call.
        """
        self._inputs.copy_(torch.tensor([tokens, positions])[..., None])
        n_slots = max(positions) + 1
        self._n_steps += 1
        if not self._can_be_recorded():
            return self._body(n_slots)
        n_slots = min(-(-n_slots // SLOTS_AT_ONCE) * SLOTS_AT_ONCE, self._cache.length)
        if self._n_recorded != n_slots:
            self._replay = None  # its memory goes first
            self._replay = recorded(lambda: self._body(n_slots), self._inputs.device)
            self._n_recorded = n_slots
        return self._body(n_slots) if self._replay is None else self._replay()

    def _body(self, n_slots: int) -> Tensor:
        tokens, positions = self._inputs  # [B, 1] each
        mask = visible(positions, self._slots[:, :n_slots], self._window)  # [B, 1, T]
        with nullcontext() if self._sparse is None else self._sparse.active():
            h = hidden_states(
                self._model, tokens, positions, mask, self._cache, self._prompt_lengths,
                self._texts,
            )  # fmt: skip
        return h[:, 0]

    def _can_be_recorded(self) -> bool:
        return (
            records(self._inputs.device)
            and self._n_steps > FIRST_BY_CALLS
            and not self._watch.is_watched()
        )


def records(device: torch.device) -> bool:
    """Whether steps are recorded on this device."""
    return device.type == "cuda"


class Watch:
    """What may act on a model besides its forward pass, and would not be a part of a recording."""

    def __init__(self, model: nn.Module):
        # Looked at before every token: so the dicts themselves, and not the way to them.
        self._hooks = [torch_modules._global_forward_hooks, torch_modules._global_forward_pre_hooks]
        for module in model.modules():
            self._hooks += (module._forward_hooks, module._forward_pre_hooks)
        self._counting = [module for module in model.modules() if isinstance(module, TopK)]

    def is_watched(self) -> bool:
        """Whether hooks act on any module, as in steering and recording, or TopK counts."""
        return any(self._hooks) or any(topk.stats is not None for topk in self._counting)


def recorded(body: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor] | None:
    """What does the same as body, by a CUDA graph on this device; None if it cannot be recorded.

    It does not hold body. torch.OutOfMemoryError where there is no memory for it.
    """
    try:
        stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
        # The current stream is set again by us: torch leaves its own where a recording fails.
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
            result = _record(body, graph, stream)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        logger.info("decoding runs without a CUDA graph: %s", str(error).partition("\n")[0])
        return None

    def replay() -> Tensor:
        with torch.cuda.device(device):
            graph.replay()
        return result

    return replay


def _record(
    body: Callable[[], Tensor], graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream
) -> Tensor:
    """Record body on a stream of the current device; the buffer that a replay writes."""
    # Once by calls: kernels are compiled and workspaces made, which is not to be recorded.
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        body()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        return body()
