"""Models of every shape there is, in float64 and not trained, and tokenizers of every kind."""

import base64
import io

import sentencepiece
import torch

from apps.topk.corpus.tokenizer import train_tokenizer
from apps.topk.model import TopKTransformer, TopKTransformerArgs
from lingua.tokenizer import build_tokenizer
from lingua_topk import TopKArgs

TOKENIZERS = ("bytes", "sp", "sp-prefix", "tiktoken")
WORDS = "the harbour was quiet on the third day and nobody spoke of the storm "
RANKS = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" q", b"ui", b"\xe6\xbc", b"\n\n"]

SHAPES = {
    "residual": {"topk": TopKArgs(k=8, n_last_nontopk=1)},
    "mlp": {"topk": TopKArgs(k=8, n_last_nontopk=1, site="mlp")},
    "vanilla": {},
    "grouped": {"topk": TopKArgs(k=8, layers=[1]), "n_kv_heads": 2, "head_dim": 12},
    "tied": {"topk": TopKArgs(k=8, n_last_nontopk=0), "weight_tying": True, "n_kv_heads": 1},
    "sliding": {"topk": TopKArgs(k=8, n_last_nontopk=1), "sliding_window": 5},
}


def small_model(vocab_size=258, seed=0, max_seqlen=64, **shape):
    args = {"dim": 32, "n_layers": 3, "n_heads": 4, "multiple_of": 16, **shape}
    torch.manual_seed(seed)
    model = TopKTransformer(
        TopKTransformerArgs(vocab_size=vocab_size, max_seqlen=max_seqlen, **args)
    )
    model.init_weights()
    for parameter in model.parameters():  # the rotary table stays in float32
        parameter.data = 2 * parameter.data.double()  # not the same token again and again
    return model.eval().requires_grad_(False)


def make_tokenizer(name, folder):
    """A tokenizer of that kind; files that it needs are written to `folder`."""
    if name == "bytes":
        return build_tokenizer(name)
    path = folder / name
    if name == "tiktoken":
        lines = (b"%s %d\n" % (base64.b64encode(t), rank) for rank, t in enumerate(RANKS))
        path.write_bytes(b"".join(lines))
    elif name == "sp":
        path.write_bytes(train_tokenizer([WORDS] * 3, 290))
    else:
        path.write_bytes(_prefixing())
    return build_tokenizer(name.partition("-")[0], str(path))


def _prefixing():
    """A SentencePiece model as its own defaults make them: it drops the first space of a text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS] * 3), model_writer=model, vocab_size=290, model_type="bpe",
        byte_fallback=True, minloglevel=3, pad_id=3,
    )  # fmt: skip
    return model.getvalue()
