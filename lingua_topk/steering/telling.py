"""A forward pass that tells where its tokens stand, while something wants to know.

Of a host's model, and of transformers'. `apps.topk.inference.hidden_states`, which calls the
blocks itself, tells on its own.
"""

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lingua_topk.errors import ConfigError
from lingua_topk.steering.places import Places, reading
from lingua_topk.steering.sites import decoder_of

# The first arguments of transformers' decoder, in their order.
DECODER_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "cache")


@contextmanager
def telling_places(model: nn.Module) -> Iterator[None]:
    """Within it forward passes of the model tell where their tokens stand (see `places`)."""
    decoder = decoder_of(model)
    with ExitStack() as undo:
        if hasattr(decoder, "rope_embeddings"):
            _tell(decoder, _lingua_places, undo)
        else:
            texts = _Texts()
            _tell(decoder, texts.places, undo)
            if hasattr(model, "generate"):
                undo.enter_context(texts.generating(model))
        yield


def _tell(decoder: nn.Module, places_of, undo: ExitStack) -> None:
    """Around each forward pass of `decoder`, what `places_of` makes of its arguments."""
    opened: list[ExitStack] = []  # a pass inside a pass closes first

    def begin(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        stack = ExitStack()
        stack.enter_context(reading(places_of(args, kwargs)))
        opened.append(stack)

    def end(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if opened:
            opened.pop().close()

    for handle in (
        decoder.register_forward_pre_hook(begin, with_kwargs=True),
        decoder.register_forward_hook(end, with_kwargs=True, always_call=True),
    ):
        undo.callback(handle.remove)


def _lingua_places(args: tuple, kwargs: dict[str, Any]) -> Places:
    """Of a host's model, whose rows all begin at position 0, or stand where `tok_idx` says."""
    tokens = args[0] if args else kwargs["token_values"]
    positions = kwargs.get("tok_idx", args[2] if len(args) > 2 else None)
    if positions is None:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
    return Places(positions.expand(tokens.shape[:2]))


class _Texts:
    """What is being read by a model of transformers, over the calls that make one text of it."""

    def __init__(self):
        self._prompt_lengths: Tensor | None = None
        self._awaits_prompt = False  # inside generate, before its first forward pass
        self._generates = False

    @contextmanager
    def generating(self, model: nn.Module) -> Iterator[None]:
        """Within it `model.generate` says when a prompt begins: without a cache every pass reads
        the prompt again, together with what was generated."""
        own = model.generate

        @functools.wraps(own)
        def generate(*args: Any, **kwargs: Any) -> Any:
            config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
            chunk = kwargs.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
            if chunk is not None:
                raise ConfigError(
                    f"prefill_chunk_size={chunk}: a prompt that is read in pieces cannot be told"
                    " from what is generated; leave it out, or steer with where='all'"
                )
            self._awaits_prompt = self._generates = True
            try:
                return own(*args, **kwargs)
            finally:
                self._awaits_prompt = self._generates = False

        model.generate = generate  # an attribute of the instance hides the method of its class
        try:
            yield
        finally:
            del model.generate

    def places(self, args: tuple, kwargs: dict[str, Any]) -> Places:
        given = dict(zip(DECODER_ARGUMENTS, args, strict=False)) | kwargs
        positions = _positions(given)
        begins = self._awaits_prompt if self._generates else not _n_cached(given)
        if begins:
            self._prompt_lengths = positions.amax(dim=1) + 1
            self._awaits_prompt = False
        return Places(positions, self._prompt_lengths)


def _positions(given: dict[str, Any]) -> Tensor:
    """Where in their texts tokens stand: int64 [B, S], negative for padding."""
    tokens = given.get("input_ids")
    tokens = given["inputs_embeds"] if tokens is None else tokens
    n_rows, length = tokens.shape[:2]
    mask = given.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:  # [B, T], of what was read before as well
        counted = mask.long().cumsum(dim=1) - 1
        return counted.masked_fill(mask == 0, -1)[:, -length:]
    positions = given.get("position_ids")
    if positions is None:
        positions = torch.arange(length, device=tokens.device) + _n_cached(given)
    return positions.expand(n_rows, length)


def _n_cached(given: dict[str, Any]) -> int:
    """How many tokens were read before, and are kept; transformers renamed the cache."""
    for name in ("cache", "past_key_values"):
        if given.get(name) is not None:
            return int(given[name].get_seq_length())
    return 0
