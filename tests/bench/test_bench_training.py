"""The benchmark of training: what it writes, and that nothing incorrect is timed."""

import csv
import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from apps.bench import training, training_check
from apps.bench.training_variants import VARIANTS, build, build_llama, processes, small
from lingua_topk.errors import ConfigError
from lingua_topk.ops import backends

CPU = torch.device("cpu")
WORDS = {"dim": 32, "layers": 3, "vocab": 50, "batch": 2, "seq_len": 16, "k": 5,
         "n_last_nontopk": 1, "steps": 1}  # fmt: skip


def run(*arguments: str) -> None:
    training.main([*(f"--{name}={value}" for name, value in WORDS.items()), *arguments])


@pytest.fixture
def results(monkeypatch, tmp_path):
    monkeypatch.setattr(training, "RESULTS", tmp_path)
    return tmp_path


def small_args(dtype: str = "fp32"):
    args = training._args("", CPU, 0, 0, 0, 0, 0, 0, -1, "", "")
    return small(args, dtype)


def test_a_row_for_each(results):
    run("--save")
    rows = list(csv.DictReader((results / "training.csv").open(encoding="utf-8")))
    assert [row["what"] for row in rows] == ["vanilla", "topk", "annealed", "plain", "llama"]
    assert {row["time_ratio"] for row in rows if row["what"] == "vanilla"} == {"1.0"}
    assert all(0 < float(row["time_ratio_p10"]) <= float(row["time_ratio_p90"]) for row in rows)
    assert all(row["tokens_a_second"] == row["mfu"] == row["peak_gib"] == "" for row in rows)
    shape = ("dim", "layers", "vocab", "batch", "seq_len", "k", "n_last_nontopk", "steps")
    assert [rows[0][name] for name in shape] == "32 3 50 2 16 5 1 1".split()
    assert rows[0]["dtype"] == "fp32" and rows[0]["device"] == "cpu" and rows[0]["commit"]


def test_a_config_gives_the_shape_and_flags_replace_it(results, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        "data: {batch_size: 3, seq_len: 16}\n"
        "model: {dim: 24, n_layers: 3, n_heads: 2, n_kv_heads: 1, vocab_size: 30,"
        " topk: {k: 4, n_last_nontopk: 1}}\n"
        "distributed: {model_dtype: fp64, fsdp_type: full_shard}\n"
    )
    (row,) = training.measure(config=str(config), batch=2, steps=1, variants="vanilla")
    found = {name: row[name] for name in ("dim", "layers", "vocab", "batch", "k", "dtype")}
    expected = {"dim": 24, "layers": 3, "vocab": 30, "batch": 2, "k": 4, "dtype": "fp64"}
    assert found == expected


def test_a_backend_with_other_losses_is_not_reported(monkeypatch, results):
    right = backends.CPU.topk_sum

    def broken(h, update, k, alpha, activation):
        return right(h, update, k, alpha, activation) * (1 + 1e-6)

    monkeypatch.setattr(backends, "CPU", replace(backends.CPU, topk_sum=broken))
    with pytest.raises(RuntimeError, match=r"backend cpu, fp64, alpha=0\.0: the loss of step 0"):
        run("--save")
    assert not list(results.iterdir())


def test_a_twin_that_is_no_llama_is_not_reported(monkeypatch, results):
    import lingua.transformer

    turn = lingua.transformer._turned_as_complex
    monkeypatch.setattr(
        lingua.transformer, "_turned_as_complex", lambda pairs, by: turn(pairs, 1.0001 * by)
    )
    with pytest.raises(RuntimeError, match="vanilla: the loss of step 0 of a small run is"):
        run("--save")
    assert not list(results.iterdir())


@pytest.mark.parametrize(
    ("step", "by", "refused"),
    [(0, 2e-3, "0"), (1, 2e-3, None), (1, 0.1, "1"), (1, float("nan"), "1")],
)
def test_timed_losses_that_are_far_apart_are_not_reported(step, by, refused):
    losses = {"vanilla": [3.0, 2.0], "llama": [3.0, 2.0]}
    losses["llama"][step] += by
    check = functools.partial(
        training_check.check_timed_losses, losses, ["vanilla", "llama"], [], "fp32"
    )
    if refused is None:
        return check()
    with pytest.raises(RuntimeError, match=f"llama: the loss of step {refused} is .*, that of van"):
        check()


def test_a_selection_may_flip_in_the_first_step():
    losses = {"topk": [3.0], "plain": [3.002]}
    training_check.check_timed_losses(losses, [], ["topk", "plain"], "fp32")


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="needs torch's own loss")
def test_a_loss_that_is_asked_for(results):
    rows = training.measure(**WORDS, variants="vanilla,loss-torch")
    assert [row["what"] for row in rows] == ["vanilla", "loss-torch"]


def test_near_ties_are_seen():
    """Neurons 0 and 1 of every hidden state are alike, and k cuts between the two at times."""
    args = small_args("fp64")
    with processes(args):
        one = build(args, VARIANTS["plain"], CPU)
        with training_check._gaps(one.model) as apart:
            one(*training.batches(args.model.vocab_size, 1, 8, 1, CPU)[0])
        assert min(apart) > 1e-9
        for name, weight in one.model.named_parameters():
            local = weight.detach()
            if name.endswith(("wo.weight", "w2.weight")):
                local[1] = local[0]
            if name == "tok_embeddings.weight":
                local[:, 1] = local[:, 0] = 2.0
        with training_check._gaps(one.model) as tied:
            one(*training.batches(args.model.vocab_size, 1, 8, 1, CPU)[0])
    assert len(tied) == len(apart) == 2  # its TopK blocks
    assert min(tied) < 1e-9


def test_llama_takes_the_same_steps():
    args = small_args("fp32")
    with processes(args):
        ours = build(args, VARIANTS["vanilla"], CPU)
        llama = build_llama(args, ours, CPU)
        for tokens, target in training.batches(args.model.vocab_size, 2, 16, 3, CPU):
            torch.testing.assert_close(ours(tokens, target), llama(tokens, target))


def test_flops_of_a_token_are_those_of_the_formula():
    args = small_args()
    block = 4 * 32 * 32 + 3 * 32 * 96 + 2 * 32
    weights = 3 * block + 32 + 48 * 32
    assert training.flop_per_token(args) == 6 * weights + 3.5 * (4 * 3 * 1024 * 32 // 2)


def test_the_turns_of_another_process_are_set_beside_ours():
    seconds = {"vanilla": [1.0, 2.0], "lingua": [2.0, 2.0]}
    measured = {name: training.Measured(s, s, [1.0]) for name, s in seconds.items()}
    rows = training._rows(measured, small_args(), CPU, steps=2)
    assert [row["time_ratio"] for row in rows] == [1.0, 1.5]


def test_what_a_process_of_its_own_is_asked_survives_json():
    args = small_args()
    assert training.from_json(training.to_json(args)) == args


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device=tpu"], "device='tpu' is not known: choose cpu or cuda"),
        (["--dtype=int8"], "dtype='int8' is not known"),
        (["--steps=0"], "steps=0 is too small"),
        (["--layers=-1"], "layers=-1 is too small"),
        (["--k=-1"], "k=-1 is too small"),
        (["--compile=yes"], "compile='yes' is not allowed: give true or false"),
        (["--variants=vanilla,llamas"], "variants: 'llamas' is not known: choose of vanilla,"),
        (["--variants=topk"], "begin with vanilla, the base of the ratios"),
        (["--variants=vanilla,lingua"], "variants: lingua cannot run: it needs CUDA and LINGUA_H"),
        (["--variants=vanilla,loss-cce"], "variants: loss-cce cannot run: it needs CUDA"),
        (["--config=no/such.yaml"], "config=no/such.yaml is not a file"),
    ],
)
def test_refused_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        training.main(arguments)


@pytest.mark.gpu
def test_rows_of_a_gpu(results):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    arguments = ("--device=cuda", "--dim=512", "--vocab=256", "--batch=2", "--seq_len=64")
    training.main([*arguments, "--steps=2", "--save"])
    rows = list(csv.DictReader((results / "training.csv").open(encoding="utf-8")))
    assert all(float(row["tokens_a_second"]) > 0 and float(row["peak_gib"]) > 0 for row in rows)
