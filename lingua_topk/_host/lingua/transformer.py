"""The decoder's parts, with Lingua's parameter names, initialisation and RoPE convention."""

import functools
import math
import warnings
from dataclasses import dataclass
from enum import Enum
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lingua import _loss
from lingua.errors import ConfigError

# On the CPU it is left uncompiled on purpose: see _attend_flex.
warnings.filterwarnings("ignore", message=r"flex_attention called without torch\.compile")


@functools.cache
def _compiled_flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def flex_attention_comp(*args, **kwargs):
    """flex_attention, compiled at the first call: torch.compile imports for seconds."""
    if torch.compiler.is_compiling():  # then it becomes a part of what is being compiled
        from torch.nn.attention.flex_attention import flex_attention

        return flex_attention(*args, **kwargs)
    return _compiled_flex_attention()(*args, **kwargs)


class InitStdFactor(Enum):
    """How the initial std of what writes to the residual stream is divided."""

    DISABLED = "disabled"  # 1
    GLOBAL_DEPTH = "global_depth"  # sqrt(2 (n_layers + 1))
    CURRENT_DEPTH = "current_depth"  # sqrt(2 (layer + 1))
    DIM_RATIO = "dim_ratio"  # dim / 4096


@dataclass
class BaseTransformerArgs:
    dim: int = 512
    n_layers: int = 8
    head_dim: Optional[int] = None  # noqa: UP045 (OmegaConf reads this spelling in all versions)
    n_heads: Optional[int] = None  # noqa: UP045
    n_kv_heads: Optional[int] = None  # noqa: UP045

    ffn_dim_multiplier: Optional[float] = None  # noqa: UP045
    multiple_of: int = 256

    norm_eps: float = 1e-5
    rope_theta: float = 10000.0

    init_base_std: Optional[float] = None  # noqa: UP045
    init_std_factor: str = "disabled"

    max_seqlen: int = 1024


def _compute_dtype(x: Tensor) -> torch.dtype:
    """float32 for what must not be computed in half precision; float64 stays."""
    return torch.promote_types(x.dtype, torch.float32)


def cross_entropy(pred: Tensor, target: Tensor, **kwargs) -> Tensor:
    """Mean (by default) negative log-likelihood in float32 or better, -100 ignored.

    pred: [..., V]; target: [...], int64; kwargs go to `torch.nn.functional.nll_loss`.
    """
    pred = pred.flatten(end_dim=-2)  # [N, V]
    log_probs = F.log_softmax(pred, dim=-1, dtype=_compute_dtype(pred))
    return F.nll_loss(log_probs, target.flatten(), **kwargs)


def repeat_kv(x: Tensor, n_rep: int, dim: int) -> Tensor:
    """Repeat each key or value head n_rep times: [B, S, H, E] -> [B, S, H * n_rep, E]."""
    if dim != 2:
        raise ValueError(f"repeat_kv: dim={dim}, but heads are dimension 2 of [B, S, H, E]")
    return x if n_rep == 1 else x.repeat_interleave(n_rep, dim=dim)


def precompute_freqs_cis(dim: int, end: int, theta: float = 10000.0) -> Tensor:
    """Rotation matrices of RoPE: float32 [end, dim / 2, 2, 2] = [[cos, -sin], [sin, cos]].

    Pair j turns by position * theta^(-2 j / dim) (Su et al., arXiv 2104.09864).
    """
    exponents = torch.arange(0, dim, 2)[: dim // 2].float() / dim  # [dim / 2]
    # 1 / x and not a negative power, to the last bit the table of Lingua and of Hugging Face:
    # far into a sequence one bit of a frequency is a visible angle.
    frequencies = 1.0 / theta**exponents
    angles = torch.outer(torch.arange(end, device=frequencies.device), frequencies)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((cos, -sin, sin, cos), dim=-1).view(end, dim // 2, 2, 2)


def reshape_for_broadcast(freqs_cis: Tensor, x: Tensor, seq_dim: int) -> Tensor:
    """View [S, E / 2, 2, 2] so that it broadcasts over x, [..., E / 2, 1, 2], S at seq_dim."""
    shape = [1] * x.dim()
    shape[seq_dim] = x.shape[seq_dim]
    shape[-3:] = freqs_cis.shape[-3:]
    if freqs_cis.shape[0] != x.shape[seq_dim]:
        raise ValueError(
            f"{freqs_cis.shape[0]} rotary positions for {x.shape[seq_dim]} tokens: they must agree"
        )
    return freqs_cis.view(shape)


def apply_rotary_emb(
    xq: Tensor, xk: Tensor, seq_dim: int, freqs_cis: Tensor
) -> tuple[Tensor, Tensor]:
    """Rotate the pairs (2j, 2j + 1) of queries and keys, in float32 or better.

    xq: [B, S, Hq, E], xk: [B, S, Hk, E], freqs_cis: [S, E / 2, 2, 2]; results as the inputs.
    """
    return (
        _rotate(xq, freqs_cis, seq_dim),
        _rotate(xk, freqs_cis, seq_dim),
    )


def _rotate(x: Tensor, freqs_cis: Tensor, seq_dim: int) -> Tensor:
    pairs = x.unflatten(-1, (-1, 1, 2)).to(_compute_dtype(x))  # [B, S, H, E / 2, 1, 2]
    rotation = reshape_for_broadcast(freqs_cis, pairs, seq_dim)
    pairs = pairs.squeeze(-2)  # [B, S, H, E / 2, 2]
    # A compiler makes one kernel of the sums, and knows no complex numbers.
    turn = _turned_written_out if torch.compiler.is_compiling() else _turned_as_complex
    return turn(pairs, rotation).flatten(-2).type_as(x)


def _turned_written_out(pairs: Tensor, rotation: Tensor) -> Tensor:
    """Products of 2 x 2 matrices, [..., 2, 2], and pairs, [..., 2]."""
    first, second = pairs.unbind(-1)  # [B, S, H, E / 2]
    turned = [row[..., 0] * first + row[..., 1] * second for row in rotation.unbind(-2)]
    return torch.stack(turned, dim=-1)


def _turned_as_complex(pairs: Tensor, rotation: Tensor) -> Tensor:
    """The same, to the last bit on a CPU, of matrices that rotate: one multiplication.

    Forward and backward take a third of the time there, uncompiled.
    """
    rotation = rotation.to(torch.promote_types(pairs.dtype, rotation.dtype))
    # The first column of [[cos, -sin], [sin, cos]] is e^(i angle).
    turns = torch.view_as_complex(rotation[..., 0].contiguous())  # [1, S, 1, E / 2]
    return torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turns)


def causal_mask(b, h, q_idx, kv_idx):
    """flex attention's mask of a causal model."""
    return q_idx >= kv_idx


def lengths_to_start_ids(lengths: Tensor) -> Tensor:
    """Where each of the packed documents starts: [3, 2] -> [0, 3]."""
    return lengths.cumsum(0) - lengths


def lengths_to_local_ids(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Document and position in it of each packed token: [3, 2] -> [0 0 0 1 1], [0 1 2 0 1]."""
    document = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    position = torch.arange(len(document), device=lengths.device)
    return document, position - lengths_to_start_ids(lengths)[document]


def generate_doc_mask_mod(mask_mod, lengths: Tensor, kv_lengths: Tensor | None = None):
    """flex attention's mask of packed documents: `mask_mod` within one, nothing across.

    lengths and kv_lengths (default: the same): [documents], int64. Positions behind the
    last document belong to none.
    """
    kv_lengths = lengths if kv_lengths is None else kv_lengths
    q_document, q_position = lengths_to_local_ids(lengths)
    kv_document, kv_position = lengths_to_local_ids(kv_lengths)

    last_q, last_kv = len(q_document) - 1, len(kv_document) - 1

    def doc_mask_mod(b, h, q_idx, kv_idx):
        # A kernel may ask about places behind the last document: nothing is there.
        exists = (q_idx <= last_q) & (kv_idx <= last_kv)
        q, kv = q_idx.clamp(max=last_q), kv_idx.clamp(max=last_kv)
        same = q_document[q] == kv_document[kv]
        return exists & same & mask_mod(b, h, q_position[q], kv_position[kv])

    return doc_mask_mod


def init_trunc_normal(weight: Tensor, std: float, bound: float) -> None:
    """Fill with a normal distribution of `std` cut at +-bound, in place.

    A sharded weight is drawn whole on every process and then cut, so that the numbers
    depend on the seed alone and not on how many processes share the weight. (torch
    draws a DTensor that way on CUDA only.)
    """
    from torch.distributed.tensor import DTensor, Replicate

    if not isinstance(weight, DTensor):
        nn.init.trunc_normal_(weight, mean=0.0, std=std, a=-bound, b=bound)
        return
    whole = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    nn.init.trunc_normal_(whole, mean=0.0, std=std, a=-bound, b=bound)
    mesh = weight.device_mesh
    replicated = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    with torch.no_grad():
        weight.copy_(replicated.redistribute(mesh, weight.placements))


class RotaryEmbedding(nn.Module):
    """The table of rotations; not a part of the state dict."""

    def __init__(self, theta: float, head_dim: int, max_seqlen: int = 1024):
        super().__init__()
        self.theta = theta
        self.head_dim = head_dim
        self.max_seqlen = max_seqlen
        self.register_buffer(
            "freqs_cis", precompute_freqs_cis(head_dim, max_seqlen, theta), persistent=False
        )

    def reset_parameters(self) -> None:
        """Compute the table anew: after `to_empty` it holds nothing of use."""
        table = precompute_freqs_cis(self.head_dim, self.max_seqlen, self.theta)
        self.freqs_cis.copy_(table)

    def forward(self, seqlen: int | None = None, tok_idx: Tensor | None = None) -> Tensor:
        """Rotations of positions `tok_idx`, [S] int64, or of the first `seqlen`."""
        if tok_idx is not None:
            if tok_idx.dim() != 1:
                raise ValueError(f"tok_idx has shape {tuple(tok_idx.shape)}: give positions [S]")
            return self.freqs_cis[tok_idx]
        if seqlen is None:
            raise ValueError("RotaryEmbedding needs seqlen or tok_idx")
        if seqlen > self.max_seqlen:
            raise ValueError(
                f"a sequence of {seqlen} tokens is longer than model.max_seqlen={self.max_seqlen}"
            )
        return self.freqs_cis[:seqlen]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32 or better (arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        dtype = _compute_dtype(x)
        wide = x.to(dtype)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight.to(dtype)).type_as(x)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)


class OutputLinear(nn.Linear):
    """The output projection; given targets, the loss of its logits, as `loss_of_output`.

    Attributes:
        loss: the name of the loss, which LINGUA_TOPK_LOSS chooses when the module is made.
    """

    def __init__(self, dim: int, vocab_size: int):
        super().__init__(dim, vocab_size, bias=False)
        self.loss = _loss.chosen()

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        if target is None:
            return super().forward(x)
        return loss_of_output(self.loss, x, self.weight, target)


def loss_of_output(name: str, x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy of the logits x weight^T, -100 ignored: [], in float32 or better.

    x: [..., D], weight: [V, D], target: [...] int64. Called from the forward of the module that
    has the weight, since there alone it is whole where FSDP2 has cut it. ConfigError where the
    loss of that name cannot run.
    """
    if name == "plain":
        return cross_entropy(F.linear(x, weight), target)
    return _loss.linear_cross_entropy(name, x, weight, target)


class TiedLinear(nn.Module):
    """An output projection that uses another module's weight, [V, D]; as OutputLinear."""

    def __init__(self, tied_module: nn.Module):
        super().__init__()
        if not isinstance(getattr(tied_module, "weight", None), nn.Parameter):
            raise ValueError(f"{type(tied_module).__name__} has no weight to tie to")
        self.tied_module = tied_module
        self.loss = _loss.chosen()

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        weight = self.tied_module.weight
        if target is None:
            return F.linear(x, weight)
        return loss_of_output(self.loss, x, weight, target)


class Attention(nn.Module):
    """Causal self-attention with grouped key and value heads."""

    def __init__(self, dim: int, head_dim: int, n_heads: int, n_kv_heads: int, rope_theta: float):
        super().__init__()
        self.dim = dim
        self.head_dim = head_dim
        self.rope_theta = rope_theta
        self.n_heads = n_heads
        self.n_kv_heads = n_kv_heads
        self.heads_per_group = n_heads // n_kv_heads
        self.wq = nn.Linear(dim, n_heads * head_dim, bias=False)
        self.wk = nn.Linear(dim, n_kv_heads * head_dim, bias=False)
        self.wv = nn.Linear(dim, n_kv_heads * head_dim, bias=False)
        self.wo = nn.Linear(n_heads * head_dim, dim, bias=False)

    def forward(
        self,
        x: Tensor,
        freq_cis: Tensor,
        tok_idx: Tensor | None = None,
        mask=None,
        attn_impl: str = "sdpa",
    ) -> Tensor:
        """x: [B, S, D], freq_cis: [S or more, E / 2, 2, 2]; mask as `attend` takes it."""
        xq = self.wq(x).unflatten(-1, (self.n_heads, self.head_dim))  # [B, S, Hq, E]
        xk = self.wk(x).unflatten(-1, (self.n_kv_heads, self.head_dim))  # [B, S, Hk, E]
        xv = self.wv(x).unflatten(-1, (self.n_kv_heads, self.head_dim))
        xq, xk = apply_rotary_emb(xq, xk, 1, freq_cis[: x.shape[1]])
        if hasattr(self, "kv_cache"):
            xk, xv = self.kv_cache.update(xk, xv, tok_idx)
        xk = repeat_kv(xk, self.heads_per_group, dim=2)
        xv = repeat_kv(xv, self.heads_per_group, dim=2)
        return self.wo(attend(xq, xk, xv, mask, attn_impl).flatten(-2))  # [B, S, D]

    def reset_parameters(self, init_std: float | None = None, factor: float = 1.0) -> None:
        std = init_std or self.dim**-0.5
        for linear in (self.wq, self.wk, self.wv):
            init_trunc_normal(linear.weight, std, 3 * std)
        # As in Lingua, the cut of wo does not shrink with its std.
        init_trunc_normal(self.wo.weight, std / factor, 3 * std)


def attend(xq: Tensor, xk: Tensor, xv: Tensor, mask, attn_impl: str) -> Tensor:
    """Attention over [B, S, H, E] by the implementation named.

    mask: None for no mask; for sdpa also "causal" or a bool tensor, True to attend; for
    flex_attention a BlockMask; for fmha an xformers AttentionBias.
    """
    if attn_impl == "fmha":
        return _attend_fmha(xq, xk, xv, mask)
    xq, xk, xv = (x.transpose(1, 2) for x in (xq, xk, xv))  # [B, H, S, E]
    if attn_impl == "sdpa":
        out = _attend_sdpa(xq, xk, xv, mask)
    elif attn_impl == "flex_attention":
        out = _attend_flex(xq, xk, xv, mask)
    else:
        raise NotImplementedError(
            f"attn_impl={attn_impl!r} is not known: choose sdpa, flex_attention or fmha"
        )
    return out.transpose(1, 2).contiguous()


def _attend_sdpa(xq: Tensor, xk: Tensor, xv: Tensor, mask) -> Tensor:
    if not (mask is None or isinstance(mask, Tensor) or mask == "causal"):
        raise TypeError(f'sdpa takes None, "causal" or a tensor as mask, not {_named(mask)}')
    causal = isinstance(mask, str)
    return F.scaled_dot_product_attention(
        xq, xk, xv, is_causal=causal, attn_mask=None if causal else mask
    )


def _attend_flex(xq: Tensor, xk: Tensor, xv: Tensor, mask) -> Tensor:
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    if not (mask is None or isinstance(mask, BlockMask)):
        raise TypeError(f"flex_attention takes a BlockMask as mask, not {_named(mask)}")
    # Compiling for the CPU costs more than it gives back; torch has no backward for it there.
    attention = flex_attention_comp if xq.is_cuda else flex_attention
    return attention(xq, xk, xv, block_mask=mask)


def _attend_fmha(xq: Tensor, xk: Tensor, xv: Tensor, mask) -> Tensor:
    fmha = import_fmha()
    if not (mask is None or isinstance(mask, fmha.AttentionBias)):
        raise TypeError(f"fmha takes an xformers AttentionBias as mask, not {_named(mask)}")
    return fmha.memory_efficient_attention(xq, xk, xv, attn_bias=mask)


def import_fmha():
    """xformers' attention, which is optional, or ConfigError."""
    try:
        from xformers.ops import fmha
    except ImportError as error:
        raise ConfigError(
            'attn_impl="fmha" needs xformers, which cannot be imported: install the extra'
            ' "cuda", or use attn_impl="sdpa"'
        ) from error
    return fmha


def _named(mask) -> str:
    return repr(mask) if isinstance(mask, str) else type(mask).__name__


class FeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x), the hidden width rounded up to a multiple."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        multiple_of: int,
        ffn_dim_multiplier: float | None,
        mp_size: int = 1,
    ):
        super().__init__()
        _at_least_one(multiple_of=multiple_of)
        hidden_dim = int(2 * hidden_dim / 3)
        if ffn_dim_multiplier is not None:
            if not math.isfinite(ffn_dim_multiplier):
                raise ConfigError(
                    f"model.ffn_dim_multiplier={ffn_dim_multiplier} is not allowed: give a number"
                    " above 0"
                )
            hidden_dim = int(ffn_dim_multiplier * hidden_dim)
        hidden_dim = multiple_of * math.ceil(hidden_dim / multiple_of)
        if hidden_dim < 1:
            raise ConfigError(
                f"model.ffn_dim_multiplier={ffn_dim_multiplier} leaves the feed-forward no width:"
                " give a larger one"
            )
        self.dim = dim
        self.hidden_dim = hidden_dim
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))  # [B, S, D]

    def reset_parameters(self, init_std: float | None = None, factor: float = 1.0) -> None:
        in_std = init_std or self.dim**-0.5
        out_std = (init_std or self.hidden_dim**-0.5) / factor
        for linear in (self.w1, self.w3):
            init_trunc_normal(linear.weight, in_std, 3 * in_std)
        init_trunc_normal(self.w2.weight, out_std, 3 * out_std)


def _at_least_one(**values) -> None:
    """ConfigError for a field of `model` that is given and below 1."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise ConfigError(f"model.{name}={value} is too small: give at least 1")


def _head_dims(args: BaseTransformerArgs) -> tuple[int, int, int]:
    """head_dim, n_heads and n_kv_heads, or ConfigError."""
    _at_least_one(
        dim=args.dim, head_dim=args.head_dim, n_heads=args.n_heads, n_kv_heads=args.n_kv_heads
    )
    if args.n_heads is None and args.head_dim is None:
        raise ConfigError(
            "model.n_heads and model.head_dim are both unset: give at least one of them"
        )
    n_heads = args.n_heads or args.dim // args.head_dim
    if n_heads == 0 or args.dim % n_heads != 0:
        raise ConfigError(
            f"model.n_heads={n_heads} does not divide model.dim={args.dim}: give a divisor"
            if args.n_heads
            else f"model.head_dim={args.head_dim} gives {n_heads} heads, which do not divide"
            f" model.dim={args.dim}: give a divisor, or set model.n_heads as well"
        )
    head_dim = args.head_dim or args.dim // n_heads
    if head_dim % 2 != 0:
        raise ConfigError(
            f"model.head_dim={head_dim} is odd: rotary embeddings turn pairs, give an even number"
        )
    n_kv_heads = args.n_kv_heads or n_heads
    if n_heads % n_kv_heads != 0:
        raise ConfigError(
            f"model.n_kv_heads={n_kv_heads} does not divide model.n_heads={n_heads}: give a divisor"
        )
    return head_dim, n_heads, n_kv_heads


class TransformerBlock(nn.Module):
    """h = x + attention(norm(x)); h + feed_forward(norm(h))."""

    def __init__(self, args: BaseTransformerArgs):
        super().__init__()
        self.head_dim, self.n_heads, self.n_kv_heads = _head_dims(args)
        self.attention = Attention(
            dim=args.dim,
            head_dim=self.head_dim,
            n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads,
            rope_theta=args.rope_theta,
        )
        self.feed_forward = FeedForward(
            dim=args.dim,
            hidden_dim=4 * args.dim,
            multiple_of=args.multiple_of,
            ffn_dim_multiplier=args.ffn_dim_multiplier,
        )
        self.attention_norm = RMSNorm(args.dim, eps=args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, eps=args.norm_eps)

    def forward(
        self,
        x: Tensor,
        freq_cis: Tensor,
        tok_idx: Tensor | None = None,
        mask=None,
        attn_impl: str = "sdpa",
    ) -> Tensor:
        h = x + self.attention(
            self.attention_norm(x), freq_cis, tok_idx=tok_idx, mask=mask, attn_impl=attn_impl
        )  # [B, S, D]
        return h + self.feed_forward(self.ffn_norm(h))

    def init_weights(self, init_std: float | None = None, factor: float = 1.0) -> None:
        self.attention.reset_parameters(init_std, factor)
        self.attention_norm.reset_parameters()
        self.feed_forward.reset_parameters(init_std, factor)
        self.ffn_norm.reset_parameters()


class BaseTransformer(nn.Module):
    """A stack of blocks over hidden states [B, S, D]."""

    def __init__(self, args: BaseTransformerArgs):
        super().__init__()
        _at_least_one(n_layers=args.n_layers, max_seqlen=args.max_seqlen)
        self.dim = args.dim
        self.init_base_std = args.init_base_std
        try:
            self.init_std_factor = InitStdFactor(args.init_std_factor)
        except ValueError:
            raise ConfigError(
                f"model.init_std_factor={args.init_std_factor!r} is not known: choose one of"
                f" {', '.join(factor.value for factor in InitStdFactor)}"
            ) from None
        self.max_seqlen = args.max_seqlen
        head_dim, _, _ = _head_dims(args)
        self.rope_embeddings = RotaryEmbedding(args.rope_theta, head_dim, args.max_seqlen)
        self.layers = nn.ModuleList(TransformerBlock(args) for _ in range(args.n_layers))

    def forward(
        self, h: Tensor, tok_idx: Tensor | None = None, mask=None, attn_impl: str = "sdpa"
    ) -> Tensor:
        freq_cis = self.rope_embeddings(seqlen=h.shape[1], tok_idx=tok_idx)
        for layer in self.layers:
            h = layer(h, freq_cis, tok_idx=tok_idx, mask=mask, attn_impl=attn_impl)
        return h

    def reset_parameters(self) -> None:
        self.rope_embeddings.reset_parameters()

    def init_weights(self) -> None:
        """Fill every parameter and buffer, from torch's global random state."""
        self.reset_parameters()
        for depth, layer in enumerate(self.layers):
            layer.init_weights(self.init_base_std, self._init_factor(depth))

    def _init_factor(self, depth: int) -> float:
        return {
            InitStdFactor.DISABLED: 1.0,
            InitStdFactor.GLOBAL_DEPTH: math.sqrt(2 * (len(self.layers) + 1)),
            InitStdFactor.CURRENT_DEPTH: math.sqrt(2 * (depth + 1)),
            InitStdFactor.DIM_RATIO: self.dim / 4096,
        }[self.init_std_factor]
