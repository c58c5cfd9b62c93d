"""A transformer whose distribution is known: the next token depends on the last by a table."""

import torch
from torch import Tensor

from apps.main.transformer import LMTransformer, LMTransformerArgs
from lingua_topk import TopKArgs, apply_topk

EPSILON = 1e-5


def bigram_transformer(table: Tensor, max_seqlen: int, topk: TopKArgs | None = None):
    """A model with P(next | token) = table[token, next]; table: float64 [V, V], rows sum to 1.

    Its blocks add nothing. An embedding is one-hot, of a size that the norm leaves as it is,
    so TopK keeps it too, and the output layer is the logarithm of the table.
    """
    vocab_size = len(table)
    width = -(-vocab_size // 4) * 4
    model = LMTransformer(
        LMTransformerArgs(
            dim=width, n_layers=2, n_heads=2, vocab_size=vocab_size, max_seqlen=max_seqlen,
            norm_eps=EPSILON,
        )
    )  # fmt: skip
    model.init_weights()
    model = model.double().eval().requires_grad_(False)
    size = (1 - width * EPSILON) ** 0.5  # size^2 / D + epsilon = 1 / D
    model.tok_embeddings.weight.copy_(size * torch.eye(vocab_size, width))
    for block in model.layers:
        block.attention.wo.weight.zero_()
        block.feed_forward.w2.weight.zero_()
    # The norm makes sqrt(D) * size of the one that is there.
    model.output.weight.zero_()
    model.output.weight[:, :vocab_size] = table.log().T / (width**0.5 * size)
    if topk is not None:
        apply_topk(model, topk)
    return model


def random_table(vocab_size: int, seed: int = 0) -> Tensor:
    """Rows of probabilities, float64 [V, V]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(vocab_size, vocab_size, generator=generator, dtype=torch.float64).softmax(-1)
