"""The configs that are shipped: they say what the paper says, and they run."""

import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from apps.topk import cli
from apps.topk.model import TopKTrainArgs
from apps.topk.prepare import prepare
from apps.topk.train import train
from tests.apps.tiny import SENTENCES, read_metrics

ROOT = Path(__file__).resolve().parents[1]
PAPER = sorted((ROOT / "configs" / "paper").glob("*.yaml"))
SHAPES = [(d, n) for d in (1024, 2048) for n in (8, 16, 24)]


def read(path, *overrides):
    return cli.merge(
        TopKTrainArgs,
        (OmegaConf.load(path), str(path)),
        (OmegaConf.from_dotlist(list(overrides)), "the command line"),
    )


def test_there_is_a_config_for_every_shape_of_the_paper():
    expected = {f"topk_d{d}_l{n}.yaml" for d, n in SHAPES}
    assert {path.name for path in PAPER} == expected


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_what_is_published_is_as_published(path):
    args = read(path)
    dim, n_layers = map(int, re.findall(r"\d+", path.stem))
    assert (args.model.dim, args.model.n_layers) == (dim, n_layers)
    topk, optim = args.model.topk, args.optim
    assert (topk.k, topk.n_last_nontopk, topk.anneal_ratio, topk.site) == (64, 2, 0.2, "residual")
    assert (optim.lr, optim.beta1, optim.beta2, optim.epsilon) == (3e-4, 0.9, 0.95, 1e-8)
    assert (optim.weight_decay, optim.clip, args.steps) == (0.1, 10.0, 20_000)
    assert 8 * args.data.batch_size * args.grad_acc_steps == 1024
    assert args.data.seq_len == 1024
    assert args.model.n_heads * args.model.head_dim == dim and args.model.head_dim == 128
    assert args.name == path.stem and args.dump_dir.endswith(path.stem)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """What prepare writes under the name that the paper's configs read."""
    folder = tmp_path_factory.mktemp("prepared")
    text = folder / "text.jsonl"
    lines = ['{"text": "%s %d"}' % (SENTENCES[i % 3] * 4, i) for i in range(60)]  # noqa: UP031
    text.write_text("\n".join(lines), encoding="utf-8")
    out = folder / "data" / "fineweb_edu"
    prepare(source=str(text), out=str(out), name="fineweb_edu", vocab_size=300, chunks=4)
    return folder


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_a_paper_config_runs_on_what_prepare_writes(path, prepared, tmp_path, monkeypatch):
    """Two steps from the folder that holds data/, all as configured but for the size."""
    monkeypatch.chdir(prepared)
    small = ["model.dim=128", "model.n_heads=1", "model.topk.k=16", "data.batch_size=1"]
    small += ["data.seq_len=32", "data.prefetch_size=2", "grad_acc_steps=2", "steps=2"]
    on_cpu = ["distributed.compile=false", "distributed.model_dtype=fp32", "data.load_async=false"]
    args = read(path, *small, *on_cpu, f"dump_dir={tmp_path}/run", "logging.freq=1")
    train(args)
    metrics = read_metrics(tmp_path / "run")
    layers = {int(key.rpartition("/")[2]) for key in metrics[-1] if key.startswith("topk/l0/")}
    assert layers == set(range(args.model.n_layers - 2))
    assert (tmp_path / "run" / "evals" / "0000000002" / "validation.json").is_file()


def test_the_quickstart_compares_alike_and_keeps_to_an_eighth():
    args = read(ROOT / "configs" / "quickstart.yaml")
    assert args.model.topk.k <= args.model.dim // 8
    assert args.model.topk.n_last_nontopk == 2 and args.model.topk.layers is None
    assert args.steps % args.checkpoint.dump.every == 0
