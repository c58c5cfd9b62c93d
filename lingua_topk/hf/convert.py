"""Lingua's config, names and shapes as Hugging Face's, and back.

Both are pre-norm decoders with the same matrices. What differs is the order of the rows of the
query and key projections: Lingua's rotary embedding turns the pairs (2j, 2j + 1) of a head,
transformers' the pairs (j, j + E / 2). The rows are permuted, which changes no product.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import LlamaConfig

from lingua_topk.config import TopKArgs
from lingua_topk.errors import CheckpointError, ConfigError
from lingua_topk.hf.modeling_topk_lm import TopKLMConfig

# Inside a block: Lingua's name and transformers'.
BLOCK_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
OTHER_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK_NAMES_BACK = {theirs: ours for ours, theirs in BLOCK_NAMES.items()}
_OTHER_NAMES_BACK = {theirs: ours for ours, theirs in OTHER_NAMES.items()}
_TIED = "output.tied_module.weight"
_ROTATED = ("q_proj", "k_proj")


def to_hf_config(
    args: Any,
    topk: TopKArgs | None,
    hidden_dim: int,
    *,
    alpha: float = 0.0,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
) -> LlamaConfig:
    """The config of the exported model: Llama's own for a vanilla one.

    Args:
        args: the model section of a Lingua config (its LMTransformerArgs).
        topk: its TopK, or None.
        hidden_dim: width of the feed-forward, which `args` only bounds.
        alpha: annealing coefficient of the TopK.
        bos_token_id, eos_token_id: the tokenizer's, or None.

    ConfigError for what transformers' Llama does not have.
    """
    if getattr(args, "sliding_window", None) is not None:
        raise ConfigError(
            f"model.sliding_window={args.sliding_window} cannot be exported: Llama attends to the"
            " whole sequence; export a model that was trained without it"
        )
    n_heads = args.n_heads or args.dim // args.head_dim
    fields = {
        "vocab_size": args.vocab_size,
        "hidden_size": args.dim,
        "intermediate_size": hidden_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": args.n_kv_heads or n_heads,
        "head_dim": args.head_dim or args.dim // n_heads,
        "max_position_embeddings": args.max_seqlen,
        "rms_norm_eps": args.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(args.rope_theta)},
        "tie_word_embeddings": args.weight_tying,
        "hidden_act": "silu",
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": None,
    }
    if topk is None:
        return LlamaConfig(architectures=["LlamaForCausalLM"], **fields)
    topk.validate(args.n_layers)
    return TopKLMConfig(
        architectures=["TopKLMForCausalLM"],
        topk_k=topk.k,
        topk_layers=list(topk.topk_layers(args.n_layers)),
        topk_site=topk.site,
        topk_activation=topk.activation,
        topk_alpha=alpha,
        **fields,
    )


def to_hf_weights(weights: Mapping[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    """A Lingua state dict under transformers' names; shapes and dtypes stay.

    With tied weights the embedding stands once, as transformers saves it. CheckpointError for
    a name that is not known.
    """
    found = {}
    for name, weight in weights.items():
        if name == _TIED:
            continue
        theirs = _renamed(name, "layers", "model.layers", BLOCK_NAMES, OTHER_NAMES)
        if theirs.split(".")[-2] in _ROTATED:
            weight = to_halves(weight, config.head_dim)
        found[theirs] = weight.contiguous()
    return found


def from_hf_weights(weights: Mapping[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    """The inverse of `to_hf_weights`, with the tied embedding under both of Lingua's names."""
    found = {}
    for name, weight in weights.items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        if name.split(".")[-2] in _ROTATED:
            weight = to_pairs(weight, config.head_dim)
        ours = _renamed(name, "model.layers", "layers", _BLOCK_NAMES_BACK, _OTHER_NAMES_BACK)
        found[ours] = weight.contiguous()
    if config.tie_word_embeddings:
        found[_TIED] = found["tok_embeddings.weight"]
    return found


def to_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Rows [H * E, D] of interleaved pairs (2j, 2j + 1) as pairs (j, j + E / 2) of each head."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def to_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """The inverse of `to_halves`."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def _renamed(
    name: str, here: str, there: str, in_block: Mapping[str, str], other: Mapping[str, str]
) -> str:
    if name in other:
        return other[name]
    match = re.fullmatch(rf"{re.escape(here)}\.(\d+)\.(.+)\.weight", name)
    if match is None or match[2] not in in_block:
        raise CheckpointError(
            f"the weight {name!r} has no place in the other format: give a checkpoint of a Llama"
            " without biases or further parts"
        )
    return f"{there}.{match[1]}.{in_block[match[2]]}.weight"
