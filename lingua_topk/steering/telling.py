"""A forward pass that tells where its tokens stand, while something wants to know.

Of a host's model, and of transformers'. `apps.topk.inference.hidden_states`, which calls the
blocks itself, tells on its own.
"""

import functools
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lingua_topk.errors import ConfigError
from lingua_topk.steering.places import Places, reading
from lingua_topk.steering.sharing import shared
from lingua_topk.steering.sites import decoder_of

# The first arguments of transformers' decoder, in their order.
DECODER_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "cache")
# Settings of its generate with which a pass reads something else than the texts so far.
PIECES = "prefill_chunk_size"
GUIDANCE = "guidance_scale"  # None, or 1 for none


@contextmanager
def telling_places(model: nn.Module) -> Iterator[None]:
    """Within it forward passes of the model tell where their tokens stand (see `places`)."""
    decoder = decoder_of(model)
    generating = _generating_part(model, decoder)
    key = decoder if generating is None else generating
    with shared(key, lambda: _telling(decoder, generating)):
        yield


def _generating_part(model: nn.Module, decoder: nn.Module) -> nn.Module | None:
    """The innermost part with the decoder that has transformers' `generate`: wrappers call it."""
    found = [
        part
        for part in model.modules()
        if callable(getattr(type(part), "generate", None))
        and any(one is decoder for one in part.modules())
    ]
    return found[-1] if found else None


@contextmanager
def _telling(decoder: nn.Module, generating: nn.Module | None) -> Iterator[None]:
    with ExitStack() as undo:
        if hasattr(decoder, "rope_embeddings"):
            _tell(decoder, _lingua_places, undo)
        else:
            texts = _Texts()
            _tell(decoder, texts.places, undo)
            if generating is not None:
                undo.enter_context(_generate_told(generating, texts))
        yield


class _Passes(threading.local):
    """The forward passes that a thread is in, to be closed from the last."""

    def __init__(self):
        self.opened: list[ExitStack] = []


def _tell(decoder: nn.Module, places_of, undo: ExitStack) -> None:
    """Around each forward pass of `decoder`, what `places_of` makes of its arguments."""
    passes = _Passes()

    def begin(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        stack = ExitStack()
        stack.enter_context(reading(places_of(args, kwargs)))
        passes.opened.append(stack)

    def end(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if passes.opened:
            passes.opened.pop().close()

    for handle in (
        decoder.register_forward_pre_hook(begin, with_kwargs=True),
        # Before what was there earlier: what began last ends first.
        decoder.register_forward_hook(end, with_kwargs=True, always_call=True, prepend=True),
    ):
        undo.callback(handle.remove)


def _lingua_places(args: tuple, kwargs: dict[str, Any]) -> Places:
    """Of a host's model, whose rows all begin at position 0, or stand where `tok_idx` says."""
    tokens = args[0] if args else kwargs["token_values"]
    positions = kwargs.get("tok_idx", args[2] if len(args) > 2 else None)
    if positions is None:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
    return Places(positions.expand(tokens.shape[:2]))


class _Texts(threading.local):
    """What a thread reads with a model of transformers, over the calls that make one text of it."""

    def __init__(self):
        self.prompt_lengths: Tensor | None = None  # int64 [B]
        self.given: int | None = None  # tokens that generate was given a text; None outside of it

    @contextmanager
    def generating(self, given: int) -> Iterator[None]:
        """Within it the first pass reads the prompt, and no other: without a cache every pass
        reads the prompt again, together with what was generated."""
        before = self.prompt_lengths, self.given
        self.prompt_lengths, self.given = None, given
        try:
            yield
        finally:
            self.prompt_lengths, self.given = before

    def places(self, args: tuple, kwargs: dict[str, Any]) -> Places:
        arguments = dict(zip(DECODER_ARGUMENTS, args, strict=False)) | kwargs
        positions, n_cached = _positions(arguments), _n_cached(arguments)
        if self.given is None:
            begins, new = not n_cached, None
        else:
            # Behind the prompt may stand tokens that an assistant proposes.
            begins, new = self.prompt_lengths is None, self.given - n_cached
        if begins:
            self.prompt_lengths = positions[:, :new].amax(dim=1) + 1
        return Places(positions, self.prompt_lengths)


@contextmanager
def _generate_told(model: nn.Module, texts: _Texts) -> Iterator[None]:
    """Within it `model.generate` says when a prompt begins."""
    before = vars(model).get("generate")  # None for the method of its class

    @functools.wraps(type(model).generate)
    def generate(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        _check_settings(self, args, kwargs)
        own = before or MethodType(type(self).generate, self)
        with texts.generating(_n_given(args, kwargs)):
            return own(*args, **kwargs)

    # An attribute of the instance hides the method of its class; bound, so that a copy of the
    # model runs itself.
    model.generate = MethodType(generate, model)
    try:
        yield
    finally:
        if before is None:
            del model.generate
        else:
            model.generate = before


def _check_settings(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """ConfigError for settings of generate with which a prompt cannot be told."""
    config = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    config = config or getattr(model, "generation_config", None)
    for name, harmless in ((PIECES, (None,)), (GUIDANCE, (None, 1))):
        value = kwargs.get(name, getattr(config, name, None))
        if value not in harmless:
            raise ConfigError(
                f"{name}={value}: with it a prompt cannot be told from what is generated; leave it"
                " out, or steer with where='all'"
            )


def _n_given(args: tuple, kwargs: dict[str, Any]) -> int:
    """How many tokens generate is given of each text; without any it begins with bos."""
    named = (kwargs.get(name) for name in ("inputs_embeds", "inputs", "input_ids"))
    given = (one for one in (*named, *args[:1]) if one is not None)
    return next((one.shape[1] for one in given), 1)


def _positions(given: dict[str, Any]) -> Tensor:
    """Where in their texts tokens stand: int64 [B, S], negative for padding."""
    tokens = given.get("input_ids")
    tokens = given["inputs_embeds"] if tokens is None else tokens
    n_rows, length = tokens.shape[:2]
    mask = given.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:  # [B, T], of what was read before as well
        counted = mask.long().cumsum(dim=1) - 1
        # Of a cache of fixed size it may have the slots that are still empty, too.
        start = min(_n_cached(given), mask.shape[1] - length)
        return counted.masked_fill(mask == 0, -1)[:, start : start + length]
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
