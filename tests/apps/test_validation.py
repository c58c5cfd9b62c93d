"""Perplexity against what pencil and paper give."""

import math
from itertools import pairwise

import pytest
import torch

from apps.main.transformer import LMTransformer, LMTransformerArgs
from apps.topk.evaluation.validation import (
    Documents,
    measures,
    n_scored,
    negative_log_likelihoods,
    tokenised,
    windows_of,
)
from lingua.tokenizer import ByteTokenizer
from lingua_topk import TopKArgs, apply_topk
from lingua_topk.errors import DataError
from tests.apps.bigram import bigram_transformer, random_table

VOCABULARY = 5


def documents(*lengths):
    generator = torch.Generator().manual_seed(1)
    made = Documents()
    for length in lengths:
        made.add("x" * length, torch.randint(VOCABULARY, (length,), generator=generator).tolist())
    return made


def tiny_transformer(topk=None):
    torch.manual_seed(3)
    with torch.device("cpu"):
        args = LMTransformerArgs(dim=16, n_layers=3, n_heads=2, vocab_size=258, max_seqlen=32)
        model = LMTransformer(args)
    model.init_weights()
    model = model.double().eval()
    if topk:
        apply_topk(model, topk)
    return model


@pytest.mark.parametrize("n_tokens", [0, 1, 2, 3, 7, 8, 9, 20, 33])
@pytest.mark.parametrize(("window", "context"), [(2, 1), (8, 1), (8, 4), (8, 7), (64, 32)])
def test_windows_score_every_token_once_with_context_before_it(n_tokens, window, context):
    scored = []
    for one in windows_of(0, n_tokens, window, context):
        assert 0 < len(one) <= window
        for target in range(one.first_scored, one.stop + 1):
            scored.append(target)
            before = target - one.start  # tokens of the window before the target
            assert before >= min(context, target)
    assert scored == list(range(1, n_tokens))


@pytest.mark.parametrize(("window", "context"), [(4, 1), (4, 3), (16, 8), (512, 256)])
@pytest.mark.parametrize("topk", [None, TopKArgs(k=2, n_last_nontopk=0)])
def test_a_uniform_model_has_the_vocabulary_as_its_perplexity(topk, window, context):
    table = torch.full((VOCABULARY, VOCABULARY), 1 / VOCABULARY, dtype=torch.float64)
    model = bigram_transformer(table, 512, topk)
    text = documents(3, 100, 1, 17)
    result = measures(text, negative_log_likelihoods(model, text, window, context, 64)[0])
    assert result["perplexity"] == pytest.approx(VOCABULARY, rel=1e-12)
    assert result["tokens"] == 2 + 99 + 0 + 16
    assert result["bits_per_byte"] == pytest.approx(117 * math.log2(VOCABULARY) / 121, rel=1e-12)
    assert result["nll_per_token_stderr"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("topk", [None, TopKArgs(k=2, n_last_nontopk=0)])
@pytest.mark.parametrize(("window", "context"), [(4, 1), (5, 2), (512, 256)])
def test_a_bigram_model_gets_what_its_table_says(topk, window, context):
    probabilities, text = random_table(VOCABULARY), documents(30, 2, 7)
    model = bigram_transformer(probabilities, 512, topk)
    nll, l0 = negative_log_likelihoods(model, text, window, context, 16)
    assert set(l0.values()) <= {1.0}
    for got, tokens in zip(nll.tolist(), text.tokens, strict=True):
        pairs = pairwise(tokens)
        assert got == pytest.approx(-sum(math.log(probabilities[a, b]) for a, b in pairs))
    result = measures(text, nll)
    # Weighted by tokens: the mean over documents is another number.
    assert result["nll_per_token"] == pytest.approx(nll.sum().item() / (29 + 1 + 6))
    assert result["nll_per_token"] != pytest.approx((nll / torch.tensor([29, 1, 6])).mean().item())


def test_the_standard_error_is_that_of_resampled_documents():
    text = documents(*range(2, 60))
    model = bigram_transformer(random_table(VOCABULARY), 512)
    nll, _ = negative_log_likelihoods(model, text, 512, 256, 4096)
    lengths = torch.tensor([len(tokens) - 1.0 for tokens in text.tokens], dtype=torch.float64)
    generator = torch.Generator().manual_seed(5)
    draws = torch.randint(len(lengths), (20_000, len(lengths)), generator=generator)
    resampled = nll[draws].sum(1) / lengths[draws].sum(1)
    result = measures(text, nll)
    assert result["nll_per_token_stderr"] == pytest.approx(resampled.std().item(), rel=0.1)


@pytest.mark.parametrize("topk", [None, TopKArgs(k=4, n_last_nontopk=1)])
@pytest.mark.parametrize("batch_tokens", [1, 64, 4096])
def test_batches_change_nothing(topk, batch_tokens):
    """Against every document alone, every window's tokens scored by hand."""
    model = tiny_transformer(topk)
    texts = ["short", "a text that is longer than one window of the model", "héé" * 9]
    text = tokenised(texts, ByteTokenizer(), True)
    nll, l0 = negative_log_likelihoods(model, text, 16, 8, batch_tokens)
    for got, tokens in zip(nll.tolist(), text.tokens, strict=True):
        expected = 0.0
        for t in range(1, len(tokens)):
            # The window that scores token t: the first one reaches token 16, each further one 8
            # tokens more.
            start = 0 if t <= 16 else 9 + (t - 17) // 9 * 9
            logits = model(torch.tensor([tokens[start:t]]))[0, -1]
            expected -= logits.log_softmax(-1)[tokens[t]].item()
        assert got == pytest.approx(expected, abs=1e-9)
    assert list(l0) == ([0, 1] if topk else [])


@pytest.mark.parametrize("k", [4, 64])  # 64 is more than D: a plain ReLU
def test_padding_is_not_counted_as_survivors(k):
    model = tiny_transformer(TopKArgs(k=k, n_last_nontopk=2))
    texts = ["a", "some more text to read"]
    together = negative_log_likelihoods(
        model, tokenised(texts, ByteTokenizer(), True), 16, 8, 4096
    )[1]
    total = 0.0
    for text in texts:
        one = tokenised([text], ByteTokenizer(), True)
        total += negative_log_likelihoods(model, one, 16, 8, 1)[1][0] * n_scored(one)
    assert together[0] == pytest.approx(total / (1 + 22))
    assert 1 < together[0] <= 4 if k == 4 else together[0] > 4


def test_hooks_are_gone_afterwards():
    model = tiny_transformer(TopKArgs(k=4, n_last_nontopk=1))
    negative_log_likelihoods(model, tokenised(["text"], ByteTokenizer(), True), 16, 8, 64)
    assert not any(module._forward_hooks for module in model.modules())


def test_bos_is_given_where_training_did():
    assert tokenised(["ab"], ByteTokenizer(), True).tokens == [[256, 97, 98]]
    assert tokenised(["ab"], ByteTokenizer(), False).tokens == [[97, 98]]
    assert tokenised(["hé"], ByteTokenizer(), True).n_bytes == 3


@pytest.mark.parametrize("texts", [[], [""]])
def test_nothing_to_predict_is_an_error(texts):
    with pytest.raises(DataError, match="no token to predict"):
        tokenised(texts, ByteTokenizer(), True)
