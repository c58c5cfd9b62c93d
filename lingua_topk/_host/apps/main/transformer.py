"""The language model: embedding, blocks, norm, output; and how it is cut for FSDP."""

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor, nn

from lingua.errors import ConfigError
from lingua.transformer import (
    BaseTransformer,
    BaseTransformerArgs,
    OutputLinear,
    RMSNorm,
    TiedLinear,
    causal_mask,
    import_fmha,
    init_trunc_normal,
)


@dataclass
class LMTransformerArgs(BaseTransformerArgs):
    seed: int = 42
    vocab_size: int = -1
    weight_tying: bool = False
    sliding_window: Optional[int] = None  # noqa: UP045


def create_causal_mask(seqlen: int, attn_impl: str, sliding_window: int | None, device=None):
    """The mask of a causal model, in the form that `attn_impl` takes.

    With `sliding_window` w a token sees itself and the w - 1 tokens before it.
    """
    if attn_impl == "sdpa":
        if sliding_window is None:
            return "causal"
        here = torch.arange(seqlen, device=device)
        distance = here[:, None] - here[None, :]  # [S, S]
        return (distance >= 0) & (distance < sliding_window)
    if attn_impl == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        return create_block_mask(
            _windowed(sliding_window), None, None, seqlen, seqlen, device=device or "cpu"
        )
    if attn_impl == "fmha":
        biases = import_fmha().attn_bias
        if sliding_window is None:
            return biases.LowerTriangularMask()
        return biases.LocalAttentionFromBottomRightMask(
            window_left=sliding_window - 1, window_right=0
        )
    raise NotImplementedError(
        f"attn_impl={attn_impl!r} is not known: choose sdpa, flex_attention or fmha"
    )


def _windowed(sliding_window: int | None):
    if sliding_window is None:
        return causal_mask

    def mask(b, h, q_idx, kv_idx):
        return (q_idx >= kv_idx) & (q_idx - kv_idx < sliding_window)

    return mask


class LMTransformer(BaseTransformer):
    """A Llama-style decoder; forward gives logits, or the loss where targets are given."""

    def __init__(self, args: LMTransformerArgs):
        super().__init__(args)
        if args.vocab_size <= 0:
            raise ConfigError(
                f"model.vocab_size={args.vocab_size} is not a size: give the tokenizer's, or leave"
                " it out and training fills it in"
            )
        if args.sliding_window is not None and args.sliding_window < 1:
            raise ConfigError(
                f"model.sliding_window={args.sliding_window} is too small: give at least 1, a token"
                " itself, or null for all before it"
            )
        self.weight_tying = args.weight_tying
        self.sliding_window = args.sliding_window
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.norm = RMSNorm(args.dim, eps=args.norm_eps)
        if args.weight_tying:
            self.output = TiedLinear(self.tok_embeddings)
        else:
            self.output = OutputLinear(args.dim, args.vocab_size)

    def forward(
        self,
        token_values: Tensor,
        target: Tensor | None = None,
        tok_idx: Tensor | None = None,
        mask=None,
        attn_impl: str = "sdpa",
    ) -> Tensor:
        """token_values and target: [B, S] int64. Returns logits [B, S, V], or a 0-d loss."""
        h = self.tok_embeddings(token_values)  # [B, S, D]
        if mask is None:
            mask = create_causal_mask(
                token_values.shape[1], attn_impl, self.sliding_window, token_values.device
            )
        h = super().forward(h, tok_idx=tok_idx, mask=mask, attn_impl=attn_impl)
        return self.output(self.norm(h), target)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.norm.reset_parameters()
        std = self.dim**-0.5
        init_trunc_normal(self.tok_embeddings.weight, std, 3 * std)
        if not self.weight_tying:
            init_trunc_normal(self.output.weight, std, 3 * std)


def attention_flops_per_token(n_layers: int, seq_len: int, dim: int, causal: bool) -> float:
    """Forward and backward of the two attention products, recomputation of one included.

    3.5 * 4 L S D, halved where the mask is causal (FlashAttention's counting,
    arXiv 2307.08691).
    """
    return 3.5 * (4 * n_layers * seq_len * dim // (2 if causal else 1))


def get_num_flop_per_token(
    num_non_embed_params: int, n_layers: int, dim: int, seq_len: int
) -> float:
    """6 N for the weights (arXiv 2001.08361) and the attention on top."""
    return 6 * num_non_embed_params + attention_flops_per_token(n_layers, seq_len, dim, True)


def build_fsdp_grouping_plan(model_args: LMTransformerArgs) -> list[tuple[str, bool]]:
    """Which modules FSDP gathers as one, and whether they are freed after the forward."""
    layers = [(f"layers.{i}", False) for i in range(model_args.n_layers)]
    return [("tok_embeddings", False), *layers, ("output", True)]


def get_no_recompute_ops():
    """None: the default list of what activation checkpointing keeps."""
    return None


def tp_parallelize(model, tp_mesh, model_args, distributed_args) -> None:
    raise ConfigError(
        f"distributed.tp_size={distributed_args.tp_size} is not offered by the embedded host: set"
        " it to 1, or run inside Meta Lingua (LINGUA_HOME)"
    )
