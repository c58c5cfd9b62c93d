"""Hidden states of rows of tokens that have positions and masks of their own, cached or not.

Both hosts read a batch as rows that all begin at position 0. Scoring several continuations of
one context, and generating for prompts of different lengths, need more: here each token says
where it stands, and each row what it sees. The blocks, their norms, feed-forwards and TopK
modules run as they are, hooks included; attention alone is replaced, for the time of a call.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apps.topk import lingua_host
from lingua.transformer import apply_rotary_emb, repeat_kv
from lingua_topk.steering.places import Places, reading

CAUSAL = "causal"


class KVCache:
    """Keys and values of the tokens read so far: in every row, a slot a position.

    What was written to a slot is overwritten by the next token at that position, so rows of
    different lengths need no padding: what stands behind a row's last token is never seen.
    """

    def __init__(self, n_layers: int, length: int):
        """length: how many positions there are at most."""
        self.length = length
        self._keys: list[Tensor | None] = [None] * n_layers  # [B, length, Hk, E]
        self._values: list[Tensor | None] = [None] * n_layers
        self._rows: Tensor | None = None  # int64 [B, 1]

    def update(
        self, layer: int, keys: Tensor, values: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Write keys and values [B, S, Hk, E] at `positions` [B, S]; all slots [B, length, ...]."""
        if self._keys[layer] is None:
            shape = (keys.shape[0], self.length, *keys.shape[2:])
            self._keys[layer] = keys.new_zeros(shape)
            self._values[layer] = values.new_zeros(shape)
        if self._rows is None:
            self._rows = torch.arange(len(positions), device=positions.device)[:, None]  # [B, 1]
        self._keys[layer][self._rows, positions] = keys
        self._values[layer][self._rows, positions] = values
        return self._keys[layer], self._values[layer]

    def keep_rows(self, rows: Tensor) -> None:
        """Forget all rows but these; rows: int64 indices, in the order they have afterwards."""
        for held in (self._keys, self._values):
            held[:] = [None if one is None else one[rows] for one in held]
        self._rows = None


def window_of(model: nn.Module) -> int | None:
    """The sliding window of the model's attention, None where a token sees all before it."""
    # Meta Lingua ignores the setting with the attention it trains with.
    return None if lingua_host.is_lingua() else model.sliding_window


def visible(queries: Tensor, keys: Tensor, window: int | None = None) -> Tensor:
    """Which positions see which: bool [B, S, T] of positions [B, S] and [B, T]."""
    distance = queries[:, :, None] - keys[:, None, :]  # [B, S, T]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def hidden_states(
    model: nn.Module,
    tokens: Tensor,
    positions: Tensor,
    mask: Tensor | str,
    cache: KVCache | None = None,
    prompt_lengths: Tensor | None = None,
    texts: Tensor | None = None,
) -> Tensor:
    """What `model.output` makes logits of: [B, S, D], after the final norm.

    Args:
        model: a host's LMTransformer, on one device.
        tokens: int64 [B, S].
        positions: int64 [B, S], below the model's max_seqlen.
        mask: bool [B, S, T], True where a token sees another; T is S, or with a cache as many
            of its slots as there is something in. Or "causal", without a cache: a token sees
            itself and those before it in its row.
        cache: keys and values of earlier tokens, to which those of these are added.
        prompt_lengths, texts: for interventions that act at some places only, see
            `lingua_topk.steering.Places`.
    """
    freqs = model.rope_embeddings(tok_idx=positions.flatten())  # [B S, E / 2, 2, 2]
    h = model.tok_embeddings(tokens)  # [B, S, D]
    mask = mask if isinstance(mask, str) else _added(mask, h.dtype)
    places = Places(positions, prompt_lengths, texts)
    with _attention_replaced(model, positions, cache), reading(places):
        for block in model.layers:
            h = block(h, freqs, tok_idx=None, mask=mask, attn_impl="sdpa")
    return model.norm(h)


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask bool [B, S, T] as what is added to the scores of all heads, [B, 1, S, T].

    Attention would make the same of it, in every block anew.
    """
    hidden = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return hidden.masked_fill_(~mask, -torch.inf)[:, None]


@contextmanager
def _attention_replaced(
    model: nn.Module, positions: Tensor, cache: KVCache | None
) -> Iterator[None]:
    attentions = [block.attention for block in model.layers]
    for layer, attention in enumerate(attentions):
        # An attribute of the instance hides the method of its class until it is deleted.
        attention.forward = partial(_attend, attention, layer, positions, cache)
    try:
        yield
    finally:
        for attention in attentions:
            del attention.forward


def _attend(
    attention: nn.Module,
    layer: int,
    positions: Tensor,
    cache: KVCache | None,
    x: Tensor,
    freq_cis: Tensor,
    tok_idx: Tensor | None = None,
    mask: Tensor | str = CAUSAL,
    attn_impl: str = "sdpa",
) -> Tensor:
    """The host's attention for rows with `positions` [B, S]: x and the result are [B, S, D]."""
    heads, kv_heads, width = attention.n_heads, attention.n_kv_heads, attention.head_dim
    xq = attention.wq(x).unflatten(-1, (heads, width))  # [B, S, Hq, E]
    xk = attention.wk(x).unflatten(-1, (kv_heads, width))  # [B, S, Hk, E]
    xv = attention.wv(x).unflatten(-1, (kv_heads, width))
    # The host rotates rows that share their positions: so all are laid end to end, as one.
    flat = (one.flatten(0, 1)[None] for one in (xq, xk))
    xq, xk = (one[0].unflatten(0, x.shape[:2]) for one in apply_rotary_emb(*flat, 1, freq_cis))
    if cache is not None:
        xk, xv = (one[:, : mask.shape[-1]] for one in cache.update(layer, xk, xv, positions))
    if x.shape[1] == 1 and cache is not None:
        out = _attend_one(xq, xk, xv, mask)
    else:
        out = _attend_all(xq, xk, xv, mask, attention.heads_per_group)
    return attention.wo(out.flatten(-2))


def _attend_all(xq: Tensor, xk: Tensor, xv: Tensor, mask: Tensor | str, per_group: int) -> Tensor:
    """Attention of [B, S, Hq, E] over [B, T, Hk, E]: [B, S, Hq, E]."""
    xk, xv = (repeat_kv(one, per_group, dim=2) for one in (xk, xv))
    xq, xk, xv = (one.transpose(1, 2) for one in (xq, xk, xv))  # [B, H, S or T, E]
    causal = isinstance(mask, str)
    out = F.scaled_dot_product_attention(
        xq, xk, xv, is_causal=causal, attn_mask=None if causal else mask
    )
    return out.transpose(1, 2)


def _attend_one(xq: Tensor, xk: Tensor, xv: Tensor, mask: Tensor) -> Tensor:
    """The same of one token a row: the heads of a group are queries of the one head they share.

    So that the whole cache need not be copied for each of them, at every token.
    """
    grouped = xq.unflatten(2, (xk.shape[2], -1))[:, 0]  # [B, Hk, Hq / Hk, E]
    xk, xv = xk.transpose(1, 2), xv.transpose(1, 2)  # [B, Hk, T, E]
    out = F.scaled_dot_product_attention(grouped, xk, xv, attn_mask=mask)
    return out.flatten(1, 2)[:, None]  # [B, 1, Hq, E]
