"""What is recorded of a model or of fake layers, against the dense values read one by one."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lingua_topk import TopKArgs
from lingua_topk.analysis.record import Point, points_of, record, select
from lingua_topk.errors import CheckpointError, ConfigError, DataError
from lingua_topk.nn import TopK
from tests.analysis.recorded import (
    N_ROWS,
    ROW_LENGTH,
    TOKENS,
    VOCAB_SIZE,
    WIDTH,
    Fake,
    by_definition,
    contents,
    recorded,
    sparse,
    survivors,
)
from tests.apps.small_models import small_model

SITES = ("residual", "mlp")


# ---- What is kept


@pytest.mark.parametrize("keep", ["survivors", "all", 1, 3, WIDTH, WIDTH + 5])
def test_what_is_kept_is_what_the_dense_values_say(tmp_path, keep):
    outputs = {0: sparse(seed=0), 3: torch.randn(N_ROWS, ROW_LENGTH, WIDTH)}
    fake = Fake(outputs)
    recording = recorded(fake, tmp_path / "out", points=fake.points(keep))
    assert recording.layers == [0, 3]
    for i, y in outputs.items():
        expected = by_definition(y, None if isinstance(keep, str) else keep)
        assert survivors(recording.layer(i)) == expected
        counts = np.bincount([neuron for _, neuron, _ in expected], minlength=WIDTH)
        assert np.array_equal(recording.layer(i).counts, counts)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_values_are_kept_in_single_precision(dtype):
    y = sparse().to(dtype)
    found = select(y, "survivors")
    assert found.values.dtype == np.float32
    assert np.array_equal(found.values, y[y != 0].float().numpy())


def test_a_transform_is_applied_before_the_choice(tmp_path):
    y = torch.randn(N_ROWS, ROW_LENGTH, WIDTH)
    fake = Fake({0: y})
    points = {0: Point(fake.layers["0"], False, 2, transform=F.relu)}
    recording = recorded(fake, tmp_path / "out", points=points)
    assert survivors(recording.layer(0)) == by_definition(F.relu(y), 2)


def test_of_equal_values_at_the_limit_k_are_kept():
    found = select(torch.tensor([[[1.0, -2.0, 2.0, 2.0, 0.5]]]), 2)
    assert found.counts.tolist() == [2]
    assert np.abs(found.values).tolist() == [2.0, 2.0]
    assert found.neurons.tolist() == sorted(set(found.neurons.tolist()))


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("k", [None, 5])
def test_a_model_is_recorded_as_its_dense_states_say(tmp_path, site, k):
    model = small_model(vocab_size=VOCAB_SIZE, topk=TopKArgs(k=8, n_last_nontopk=1, site=site))
    states = dense_states(model, site)
    recording = record(
        model, points_of(model, k=k), TOKENS.tolist(), row_length=ROW_LENGTH, n_rows=N_ROWS,
        out=tmp_path / "out", batch_rows=3, inputs={}, model_name="", vocab_size=VOCAB_SIZE,
    )  # fmt: skip
    kept = "all" if k is None else "the 5 largest by magnitude"
    for i, y in enumerate(states):
        layer = recording.layer(i)
        assert layer.is_topk == (i < 2)
        assert layer.kept == ("survivors" if i < 2 else kept)
        same(survivors(layer), by_definition(y, None if i < 2 else k))


def dense_states(model, site):
    """What the neurons are at every token, [N, S, D], by layer; found by other means than hooks."""
    states = []
    h = model.tok_embeddings(TOKENS)
    freqs = model.rope_embeddings(seqlen=ROW_LENGTH)
    for block in model.layers:
        mlp = block.feed_forward
        if site == "mlp":
            inner = h + block.attention(block.attention_norm(h), freqs, mask="causal")
            gate = mlp.w1(block.ffn_norm(inner))
            states.append(mlp.topk(gate) if hasattr(mlp, "topk") else F.silu(gate))
        h = block(h, freqs, mask="causal")
        if site == "residual":
            states.append(h)
    return states


def same(found, expected):
    """The same places and neurons; values may differ where a batch of other size rounds."""
    assert [one[:2] for one in found] == [one[:2] for one in expected]
    np.testing.assert_allclose([v for *_, v in found], [v for *_, v in expected], rtol=1e-5)


# ---- Which points a model has


def test_the_points_of_a_vanilla_model_can_be_those_of_its_twin():
    vanilla = small_model()
    assert points_of(vanilla)[1] == Point(vanilla.layers[1], False, "all")
    gate = points_of(vanilla, [2], k=4, site="mlp")
    assert gate == {2: Point(vanilla.layers[2].feed_forward.w1, False, 4, F.silu)}


@pytest.mark.parametrize("site", SITES)
def test_a_twin_is_read_by_the_selection_of_the_model(site):
    """What TopK would leave of the same input, as TopK itself gives it."""
    vanilla, y = small_model(), torch.randn(2, 3, 16)
    point = points_of(vanilla, [0], k=4, site=site, selections={0: TopK(3, "relu")})[0]
    block = vanilla.layers[0]
    assert point.module is (block if site == "residual" else block.feed_forward.w1)
    assert (point.is_topk, point.kept) == (False, "what the model's selection would leave")
    assert torch.equal(point.transform(y), topk_by_definition(y, 3))
    assert points_of(vanilla, [1], k=4, site=site, selections={0: TopK(3)})[1].keep == 4


def topk_by_definition(y, k):
    y = y.relu()
    return torch.where(y >= y.sort(-1).values[..., -k, None], y, 0)


def test_layers_are_chosen():
    model = small_model(topk=TopKArgs(k=8, n_last_nontopk=1))
    assert list(points_of(model, [2, 0, 2])) == [0, 2]


@pytest.mark.parametrize(
    "arguments, text",
    [
        ({"layers": [3]}, "layer 3 is not in the model: it has 0 to 2"),
        ({"layers": [-1]}, "layer -1 is not in the model"),
        ({"k": 0}, "k=0 is below 1"),
        ({"site": "gate"}, "site='gate' is not known"),
        ({"site": "mlp"}, "this model has TopK at 'residual'"),
    ],
)
def test_points_that_are_not_there(arguments, text):
    model = small_model(topk=TopKArgs(k=8, n_last_nontopk=1))
    with pytest.raises(ConfigError, match=text):
        points_of(model, **arguments)


# ---- Batches, rows, hooks


def test_batches_of_every_size_give_the_same_files(tmp_path):
    outputs = {0: sparse(seed=0), 1: sparse(seed=1)}
    for batch_rows in (1, 2, 3, N_ROWS, 100):
        recorded(Fake(outputs), tmp_path / str(batch_rows), batch_rows=batch_rows)
    first, *others = (contents(folder) for folder in tmp_path.iterdir())
    assert others
    for one in others:
        assert one == first


def test_progress_is_told_after_each_batch(tmp_path):
    told = []
    recorded(Fake({0: sparse()}), tmp_path / "out", batch_rows=3, on_progress=told.append)
    assert told == [0, 3, 6, 7]


def test_rows_beyond_those_wanted_are_left_alone(tmp_path):
    recording = recorded(Fake({0: sparse()}), tmp_path / "out", n_rows=4)
    assert np.array_equal(recording.tokens, TOKENS[:4])
    assert survivors(recording.layer(0)) == by_definition(sparse()[:4])


@pytest.mark.parametrize(
    "rows, text",
    [
        (TOKENS[:5], "ends after 5 rows, where n_rows=7 are wanted"),
        (TOKENS[:, :5], r"row 0 of the corpus has shape \[5\], not \[6\]"),
        (TOKENS + 1 + (VOCAB_SIZE - TOKENS.max()), "vocabulary is 0 to 49: use the tokenizer"),
        (TOKENS - 50, "has the token -"),
        ([], "ends after 0 rows"),
    ],
)
def test_a_corpus_that_does_not_fit(tmp_path, rows, text):
    with pytest.raises(DataError, match=text):
        recorded(Fake({0: sparse()}), tmp_path / "out", rows=rows)


@pytest.mark.parametrize("number", ["n_rows", "row_length", "batch_rows"])
def test_numbers_below_one(tmp_path, number):
    with pytest.raises(ConfigError, match=f"{number}=0 is below 1"):
        recorded(Fake({0: sparse()}), tmp_path / "out", **{number: 0})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("keep", ["survivors", "all", 2])
def test_values_that_are_not_finite(tmp_path, value, keep):
    y = sparse()
    y[4, 3, 5] = value
    fake = Fake({2: y})
    with pytest.raises(CheckpointError, match="layer 2 has values that are not finite"):
        recorded(fake, tmp_path / "out", points=fake.points(keep))


def test_hooks_are_gone_afterwards_also_after_an_error(tmp_path):
    fake = Fake({0: sparse()}, stop_at=1)
    with pytest.raises(InterruptedError):
        recorded(fake, tmp_path / "out")
    assert not fake.layers["0"]._forward_hooks
    fake.stop_at = None
    recorded(fake, tmp_path / "out")
    assert not fake.layers["0"]._forward_hooks


def test_a_module_that_does_not_run_once(tmp_path):
    fake = Fake({0: sparse()})
    points = {**fake.points(), 5: Point(nn.Identity(), True)}
    with pytest.raises(ConfigError, match="layer 5 ran 0 times in a forward pass"):
        recorded(fake, tmp_path / "a", points=points)
    twice = nn.Sequential(fake.layers["0"], fake.layers["0"])
    with pytest.raises(ConfigError, match="layer 0 ran 2 times"):
        recorded(lambda tokens: twice(sparse()[:2]), tmp_path / "b", points=fake.points())


def test_layers_of_different_width(tmp_path):
    fake = Fake({0: sparse(10), 1: sparse(11)})
    with pytest.raises(ConfigError, match="layer 1 has 11 neurons, where 10 were before"):
        recorded(fake, tmp_path / "out")


def test_an_output_of_another_shape(tmp_path):
    fake = Fake({0: sparse().flatten(0, 1)})
    with pytest.raises(ConfigError, match=r"gives the shape \[2, 10\]"):
        recorded(fake, tmp_path / "out")
