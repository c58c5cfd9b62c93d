"""Log-likelihoods against the model's own forward, one text at a time."""

import math
from itertools import chain, pairwise

import lm_eval.utils
import pytest
import torch

from apps.main.transformer import LMTransformer, LMTransformerArgs
from apps.topk.evaluation import scoring
from apps.topk.evaluation.scoring import Request, batches_of, rows_of, score
from lingua_topk import TopKArgs, apply_topk
from lingua_topk.errors import CheckpointError
from tests.apps.bigram import bigram_transformer, random_table

VOCABULARY, WINDOW = 40, 24


def transformer(topk=None, dtype=torch.float64, sliding_window=None):
    torch.manual_seed(3)
    args = LMTransformerArgs(
        dim=32, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=VOCABULARY, max_seqlen=WINDOW,
        sliding_window=sliding_window,
    )  # fmt: skip
    model = LMTransformer(args)
    model.init_weights()
    if topk is not None:
        apply_topk(model, topk)
    return model.to(dtype).eval().requires_grad_(False)


def texts(count, seed=0):
    """Groups of four continuations of one context, some contexts of one token or two."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low, high):
        n = int(torch.randint(low, high, (), generator=generator))
        return tuple(torch.randint(VOCABULARY, (n,), generator=generator).tolist())

    requests = []
    for i in range(count):
        context = tokens(1, 3) if i % 5 == 0 else tokens(6, 30)
        requests += [Request(context, tokens(1, 8)) for _ in range(4)]
    return requests


def by_hand(model, request):
    """Nats, and whether each token is the likeliest, from one forward of the whole text."""
    tokens = (request.context + request.continuation)[-(WINDOW + 1) :]
    logits = model(torch.tensor([tokens[:-1]]))[0].double()  # [S, V]
    total, greedy = 0.0, True
    for place in range(len(tokens) - 1 - len(request.continuation), len(tokens) - 1):
        wanted = tokens[place + 1]
        total += logits[place].log_softmax(-1)[wanted].item()
        greedy &= logits[place].argmax().item() == wanted
    return total, greedy


@pytest.mark.parametrize(
    "topk", [None, TopKArgs(k=5, n_last_nontopk=1), TopKArgs(k=9, n_last_nontopk=1, site="mlp")]
)
@pytest.mark.parametrize("sliding_window", [None, 4])
@pytest.mark.parametrize("batch_tokens", [1, 100, 10_000])
def test_scores_are_those_of_every_text_alone(topk, sliding_window, batch_tokens):
    model = transformer(topk, sliding_window=sliding_window)
    requests = texts(15)
    scores = score(model, requests, WINDOW, batch_tokens)
    for request, got, greedy in zip(
        requests, scores.log_likelihoods.tolist(), scores.greedy.tolist(), strict=True
    ):
        expected, likeliest = by_hand(model, request)
        assert got == pytest.approx(expected, abs=1e-12 * WINDOW, rel=1e-12)
        assert greedy == likeliest


def test_a_continuation_that_is_greedy_is_said_to_be():
    model = transformer(TopKArgs(k=5, n_last_nontopk=1))
    tokens = [1, 2, 3]
    for _ in range(4):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    other = (tokens[-1] + 1) % VOCABULARY
    requests = [Request((1, 2, 3), tuple(tokens[3:])), Request((1, 2, 3), (*tokens[3:-1], other))]
    assert score(model, requests, WINDOW, 64).greedy.tolist() == [True, False]


@pytest.mark.parametrize("topk", [None, TopKArgs(k=2, n_last_nontopk=0)])
def test_a_bigram_model_gives_what_its_table_says(topk):
    table = random_table(VOCABULARY)
    model = bigram_transformer(table, WINDOW, topk)
    requests = texts(10)
    got = score(model, requests, WINDOW, 512).log_likelihoods.tolist()
    for request, nats in zip(requests, got, strict=True):
        pairs = pairwise((request.context[-1], *request.continuation))
        assert nats == pytest.approx(sum(math.log(table[a, b]) for a, b in pairs), rel=1e-9)


def test_a_shared_context_is_read_once():
    context = tuple(range(10))
    requests = [Request(context, (i, i + 1, i + 2)) for i in range(4)]
    (row,) = rows_of(requests, WINDOW)
    assert len(row) == 10 + 4 * 2
    assert row.positions == [*range(10), *([10, 11] * 4)]
    alone = rows_of(requests, WINDOW, share_contexts=False)
    assert [len(row) for row in alone] == [12] * 4
    assert all(row.is_causal for row in alone) and not row.is_causal
    # A row is no longer than the window, and a short context is not shared.
    many = rows_of([Request(context, (i, 1, 2, 3)) for i in range(20)], WINDOW)
    assert len(many) == 5 and all(len(row) <= WINDOW for row in many)
    assert len(rows_of([Request((7,), (1, 2)), Request((7,), (3, 4))], WINDOW)) == 2


def test_one_token_each_costs_nothing_beyond_the_context():
    (row,) = rows_of([Request(tuple(range(10)), (i,)) for i in range(30)], WINDOW)
    assert len(row) == 10 and row.is_causal
    assert [prediction[:2] for prediction in row.predictions] == [(9, i) for i in range(30)]


def test_a_long_context_loses_its_beginning():
    (row,) = rows_of([Request(tuple(range(100)), (1, 2, 3))], 8)
    assert row.tokens == [94, 95, 96, 97, 98, 99, 1, 2]
    (row,) = rows_of([Request((5, 6), tuple(range(8)))], 8)
    assert row.tokens == [6, *range(7)]


def test_a_long_continuation_is_scored_in_pieces():
    """In the disjoint windows that lm-eval cuts a document into."""
    tokens = list(range(100, 120))
    rows = rows_of([Request((5, 6), tuple(tokens))], 8)
    windows = lm_eval.utils.get_rolling_token_windows(tokens, 6, 8, 1)
    assert [(row.tokens, [p[1] for p in row.predictions]) for row in rows] == list(windows)
    model = bigram_transformer(random_table(VOCABULARY), WINDOW)
    request = Request((3,), tuple(i % VOCABULARY for i in range(3 * WINDOW)))
    got = score(model, [request], WINDOW, 64).log_likelihoods.item()
    pairs = pairwise((3, *request.continuation))
    table = random_table(VOCABULARY)
    assert got == pytest.approx(sum(math.log(table[a, b]) for a, b in pairs), rel=1e-9)


def test_batches_hold_every_row_once_and_no_more_tokens_than_allowed():
    rows = rows_of(texts(20), WINDOW)
    batches = batches_of(rows, 60)
    assert sorted(map(id, chain(*batches))) == sorted(map(id, rows))
    assert all(len(batch) * max(map(len, batch)) <= 60 for batch in batches)
    assert max(map(len, batches)) > 1
    assert all(len({row.is_causal for row in batch}) == 1 for batch in batches)
    assert [len(batch) for batch in batches_of(rows[:3], 1)] == [1, 1, 1]


def test_many_predictions_are_projected_in_parts(monkeypatch):
    model, requests = transformer(), texts(8)
    whole = score(model, requests, WINDOW, 512).log_likelihoods
    monkeypatch.setattr(scoring, "LOGITS_CHUNK", 3 * VOCABULARY)
    parts = score(model, requests, WINDOW, 512).log_likelihoods
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)


def test_sums_are_wide_where_the_model_is_narrow():
    """bf16 logits, as they are; the log-softmax and the sum of a text are not rounded again."""
    model = transformer(dtype=torch.bfloat16)
    requests = texts(6)
    got = score(model, requests, WINDOW, 1).log_likelihoods
    assert got.dtype == torch.float64
    for request, nats in zip(requests, got.tolist(), strict=True):
        tokens = (request.context + request.continuation)[-(WINDOW + 1) :]
        first = len(tokens) - 1 - len(request.continuation)
        logits = model(torch.tensor([tokens[:-1]]))[0, first:].double()
        wanted = torch.tensor(request.continuation)
        expected = logits.log_softmax(-1)[range(len(wanted)), wanted].sum().item()
        # A row of several continuations goes through other kernels than one alone: logits of
        # about 1 differ by bf16's spacing. A bf16 sum of 20 nats would be off by 0.06.
        assert nats == pytest.approx(expected, abs=0.03)


def test_no_numbers_are_an_error():
    model = transformer()
    model.output.weight[3] = torch.nan
    with pytest.raises(CheckpointError, match="no finite log-likelihood for 8 of 8 texts"):
        score(model, texts(2), WINDOW, 64)


def test_no_request_is_no_work():
    scores = score(transformer(), [], WINDOW, 64)
    assert scores.log_likelihoods.shape == scores.greedy.shape == (0,)
