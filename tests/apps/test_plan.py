"""The planner's numbers against pencil and paper, and against what autograd keeps."""

import json
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from apps.topk import cli
from apps.topk.model import TopKTrainArgs, TopKTransformer, TopKTransformerArgs
from apps.topk.plan import Machine, activation_bytes_a_token, logit_bytes_a_token, main, plan
from lingua_topk import TopKArgs

ROOT = Path(__file__).resolve().parents[2]
GIB = 1024**3


def paper(name="topk_d1024_l8"):
    args = cli.merge(TopKTrainArgs, (cli.read_yaml(str(ROOT / f"configs/paper/{name}.yaml")), name))
    return args, Machine(vocab_size=32_000)


def test_the_smallest_run_of_the_paper_by_hand():
    args, machine = paper()
    result = plan(args, machine)
    d, f, layers, v = 1024, 2816, 8, 32_000
    block = 4 * d * d + 3 * d * f + 2 * d
    n = layers * block + 2 * v * d + d
    assert result.parameters == n
    assert result.tokens_a_step == 1024 * 1024 and result.tokens == 20_000 * 1024 * 1024
    flop = 6 * (n - v * d) + 3.5 * (4 * layers * 1024 * d) / 2
    assert result.flop_a_token == pytest.approx(flop)
    assert result.hours == pytest.approx(flop * result.tokens / (8 * 989e12 * 0.4) / 3600)
    assert result.weights_gib == pytest.approx(4 * n / 8 / GIB)
    assert result.optimizer_gib == pytest.approx(8 * n / 8 / GIB)
    assert result.gathered_gib == pytest.approx(2 * n / GIB)
    assert result.logits_gib == pytest.approx(32 * 1024 * v * 12 / GIB)
    parts = ("weights", "optimizer", "gradients", "gathered", "activations", "logits")
    assert result.memory_gib == pytest.approx(sum(getattr(result, f"{p}_gib") for p in parts))


def test_more_gpus_take_less_time_and_memory_and_do_not_change_the_batch_of_each():
    (args, _), result = paper("topk_d2048_l24"), {}
    for gpus in (1, 8):
        result[gpus] = plan(args, Machine(gpus=gpus, vocab_size=32_000))
    assert result[8].tokens_a_step == 8 * result[1].tokens_a_step
    assert result[8].tokens_a_second == pytest.approx(8 * result[1].tokens_a_second)
    assert result[8].weights_gib == pytest.approx(result[1].weights_gib / 8)
    assert result[8].activations_gib == result[1].activations_gib


def test_it_says_when_it_does_not_fit():
    args, machine = paper("topk_d2048_l24")
    assert plan(args, machine).fits
    args.data.batch_size = 128
    assert not plan(args, machine).fits


def kept_bytes(function):
    """Bytes of the distinct storages that autograd keeps for the backward of `function`."""
    kept = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    return sum(storage.nbytes() for storage in kept.values()), result


@pytest.mark.parametrize("n_kv_heads", [8, 2])
def test_activations_are_about_what_autograd_keeps(n_kv_heads):
    """In fp32, where the norms' copies are the tensors themselves: within a quarter."""
    args = TopKTransformerArgs(
        dim=256, n_layers=4, n_heads=8, n_kv_heads=n_kv_heads, vocab_size=100, max_seqlen=64
    )
    args.topk = TopKArgs(k=32)
    model = TopKTransformer(args)
    model.init_weights()
    h = torch.randn(8, 64, 256, requires_grad=True)
    rotation = model.rope_embeddings(64)

    def blocks():
        x = h
        for layer in model.layers:
            x = layer(x, rotation, mask="causal")
        return x

    kept, _ = kept_bytes(blocks)
    assert activation_bytes_a_token(model, 4) == pytest.approx(kept / (8 * 64), rel=0.25)


def test_logits_are_about_what_the_loss_keeps():
    logits = torch.randn(4, 32, 1000, requires_grad=True)
    from lingua.transformer import cross_entropy

    kept, _ = kept_bytes(lambda: cross_entropy(logits, torch.zeros(4, 32, dtype=torch.long)))
    # The log-softmax is kept; logits, their gradient and its own are there besides.
    assert kept == pytest.approx(4 * 32 * 1000 * 4, rel=0.01)
    assert logit_bytes_a_token(1000, 2) == 1000 * (2 + 4 + 4 + 2)


def test_it_prints_json(capsys):
    config = f"config={ROOT}/configs/paper/topk_d1024_l8.yaml"
    main([config, "vocab_size=32000", "gpus=16", "json=true", "steps=10"])
    result = json.loads(capsys.readouterr().out)
    assert result["tokens"] == 10 * 2 * 1024 * 1024


def test_the_table_and_the_help(capsys):
    config = f"config={ROOT}/configs/paper/topk_d1024_l8.yaml"
    main([config, "vocab_size=32000"])
    assert "168,313,856" in capsys.readouterr().out
    main(["--help"])
    assert "mfu" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("gpus=0", "gpus=0 is not allowed: give at least 1"),
        ("mfu=40", "mfu=40.0 is not allowed: give a share above 0, at most 1"),
        ("gpu=8", "gpu (in the command line) is no known key"),
        ("model.topk.k=0", "model.topk.k=0 is too small"),
        ("vocab_size=0", "give vocab_size=N, for example vocab_size=32000"),
    ],
)
def test_a_mistake_is_one_line(capsys, tmp_path, monkeypatch, argument, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main([f"config={ROOT}/configs/paper/topk_d1024_l8.yaml", argument])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
