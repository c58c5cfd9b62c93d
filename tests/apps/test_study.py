"""Several runs from one config: what is trained, how far each is above its twin, and mistakes."""

import csv
import importlib
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from apps.topk import cli, side_by_side, study
from apps.topk.model import TopKTrainArgs
from apps.topk.studies import summary
from apps.topk.studies.arguments import Run, StudyArgs, read_arguments, runs_of
from lingua_topk.errors import ConfigError, DataError
from tests.apps.hostile import undisturbed
from tests.apps.tiny import CONFIG, SENTENCES, write_corpus

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs/study").glob("*_?pu.yaml"))
RUNS = {"topk": [], "step": ["model.topk.anneal_schedule=step"], "vanilla": ["model.topk=null"]}


def in_this_process(called):
    """What stands in for processes of their own, which would import torch one by one."""

    def run(commands):
        for program, *words in commands.values():
            called.append(program)
            with pytest.MonkeyPatch.context() as patch, undisturbed():
                patch.setattr(sys, "argv", [program, *words])
                importlib.import_module(program).main()

    return run


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A study of three kinds and two seeds, in a folder of its own."""
    folder = tmp_path_factory.mktemp("study")
    root = write_corpus(folder / "data")
    train = OmegaConf.create(CONFIG)
    train.data.root_dir = str(root)
    (folder / "train.yaml").write_text(OmegaConf.to_yaml(train))
    (folder / "eval.yaml").write_text("name: held_out\nvalidation: {max_documents: 4}\n")
    words = sorted(set("".join(SENTENCES).replace(".", "").replace(",", "").lower().split()))
    lines = [f"{word} {i % 5} {i % 3} {i % 7} 1.0" for i, word in enumerate(words)]
    (folder / "vectors.txt").write_text("\n".join(lines) + "\n")
    content = {
        "dump_dir": str(folder / "runs"),
        "train": str(folder / "train.yaml"),
        "eval": str(folder / "eval.yaml"),
        "set": ["steps=4", "logging.freq=2"],
        "runs": RUNS,
        "seeds": [1, 2],
        "parallel": 2,
        "read": "topk",
        "analyze": {"tokens": 600, "min_words": 2, "vectors": str(folder / "vectors.txt")},
        "steer": {"n": 1, "candidates": 4, "deltas": "1,2", "num_prompts": 2, "max_tokens": 4},
    }
    path = folder / "study.yaml"
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(content)))
    return path


@pytest.fixture(scope="module")
def made(config):
    called = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(side_by_side, "run", in_this_process(called))
        study.main([f"config={config}"])
    return config.parent / "runs", called


def test_every_run_is_trained_evaluated_and_summed_up(made):
    folder, called = made
    assert called == (
        ["apps.topk.train"] * 6 + ["apps.topk.eval"] * 6
        + ["apps.topk.analyze", "apps.topk.steer_eval", "apps.topk.report"]
    )  # fmt: skip
    lines = list(csv.DictReader((folder / "summary.csv").open()))
    assert [(line["run"], line["seed"]) for line in lines] == [
        (kind, seed) for seed in "12" for kind in RUNS
    ]
    for line in lines:
        evaluation = folder / f"{line['run']}-seed{line['seed']}/evals/study/validation.json"
        measured = json.loads(evaluation.read_text())["text"]
        assert float(line["perplexity"]) == pytest.approx(measured["perplexity"], rel=1e-5)
        assert (float(line["percent"]) == 0) == (line["run"] == "vanilla")
    assert {line["perplexity"] for line in lines if line["run"] == "topk"} != {
        line["perplexity"] for line in lines if line["run"] == "step"
    }
    table = (folder / "table.md").read_text()
    assert "| vanilla" in table and (folder / "table.csv").is_file()
    assert "<!doctype html>" in (folder / "report.html").read_text()[:100].lower()


def test_seeds_are_of_everything_that_is_drawn(made):
    folder, _ = made
    for seed in (1, 2):
        config = OmegaConf.load(folder / f"step-seed{seed}/config.yaml")
        assert (config.seed, config.model.seed, config.data.seed) == (seed, seed, seed)
        assert config.model.topk.anneal_schedule == "step" and config.steps == 4


def test_what_is_there_is_used(made, config, monkeypatch):
    folder, _ = made
    called = []
    monkeypatch.setattr(side_by_side, "run", in_this_process(called))
    before = (folder / "summary.csv").read_bytes()
    shutil.rmtree(folder / "vanilla-seed2/evals/study")
    study.main([f"config={config}", "read=null"])
    assert called == ["apps.topk.eval"] and (folder / "summary.csv").read_bytes() == before


@pytest.mark.parametrize(
    "word", ["set=[steps=5,logging.freq=2]", "runs.topk=[model.topk.k=3]", "eval_set=[dtype=bf16]"]
)
def test_results_of_other_keys_are_not_taken_for_these(made, config, monkeypatch, word):
    called = []
    monkeypatch.setattr(side_by_side, "run", in_this_process(called))
    with pytest.raises(ConfigError, match=r"topk-seed1 was made with other keys"):
        study.main([f"config={config}", word])
    assert not called


def test_a_run_that_was_ended_early_ends_the_study(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(side_by_side, "run", lambda commands: None)
    with pytest.raises(SystemExit) as ended:
        study.main([f"config={config}", f"dump_dir={tmp_path}/new"])
    assert ended.value.code == 130
    assert "topk-seed1 was ended before its last step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train=''"], "train is missing"),
        (["twin=none"], "twin=none is none of the runs: choose of topk, step, vanilla"),
        (["twin=topk"], "runs.topk is the twin and has TopK"),
        (["read=nope"], "read=nope is none of the runs"),
        (["parallel=0"], "parallel=0 is too small"),
        (["seeds=[1,1]"], "seeds=[1, 1] has one twice"),
        (["runs.a/b=[]"], "'a/b' cannot be a folder's name"),
        (["runs.other=[model.topk.kk=3]"], "model.topk.kk"),
        (["set=[steps=0]"], "steps=0 is too small"),
        (["paralel=2"], "paralel"),
        (["eval=nowhere.yaml"], "eval=nowhere.yaml is not there"),
        (["runs.other=[data.root_dir=/nowhere]"], "runs.other: /nowhere/text is not there"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_is_told_before_anything_is_written(config, tmp_path, words, said):
    with pytest.raises(ConfigError) as refused:
        study.main([f"config={config}", f"dump_dir={tmp_path}/new", *words])
    assert said in str(refused.value) and not list(tmp_path.iterdir())


def run_with(folder, kind, seed, by_source):
    run = Run(kind, seed, folder / f"{kind}{seed}", (), 1)
    run.evaluation.mkdir(parents=True)
    content = {source: {"nll_per_token": nll} for source, nll in by_source.items()}
    (run.evaluation / "validation.json").write_text(json.dumps(content | {"provenance": {}}))
    return run


def test_a_seed_is_compared_with_the_twin_of_its_own(tmp_path):
    runs = [
        run_with(tmp_path, "twin", 1, {"a|b": 4.0}),
        run_with(tmp_path, "twin", 2, {"a|b": 5.0}),
        run_with(tmp_path, "topk", 1, {"a|b": 4.0 + math.log(1.1)}),
        run_with(tmp_path, "topk", 2, {"a|b": 5.0 + math.log(1.2)}),
    ]
    rows = summary.rows_of(runs, "twin")
    assert [row.percent for row in rows] == pytest.approx([0, 0, 10, 20])
    text = summary.as_markdown(rows, "twin")
    mean = 100 * (math.sqrt(1.1 * 1.2) - 1)
    assert (
        f"| topk | 2 | {math.exp(4.5) * (1 + mean / 100):,.2f} | {mean:+.1f} (+10.0 to +20.0) |"
        in text
    )
    assert "| a\\|b | seeds" in text and "| twin | 2 | 90.02 | - |" in text


def test_an_evaluation_that_cannot_be_read_is_named(tmp_path):
    run = run_with(tmp_path, "twin", 1, {"a": 4.0})
    (run.evaluation / "validation.json").write_text('{"a": [1]}')
    with pytest.raises(DataError, match=r"is no evaluation .* run the study again"):
        summary.rows_of([run], "twin")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_shipped_studies_can_be_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    args = read_arguments([f"config={path}"], "")
    if args.analyze:
        with pytest.raises(ConfigError, match=r"vectors=data/study/vectors\.txt is not there"):
            runs_of(args)
    for size in ("4k", "32k"):
        (tmp_path / f"data/study/{size}/text").mkdir(parents=True)
    (tmp_path / "data/study/vectors.txt").touch()
    with pytest.raises(ConfigError, match=r"tokenizer\.model is not there .*prepare the text"):
        runs_of(args)
    for size in ("4k", "32k"):
        (tmp_path / f"data/study/{size}/tokenizer.model").touch()
    runs = runs_of(args)
    assert len(runs) == len(args.runs) * max(len(args.seeds), 1)
    assert Path(args.eval).is_file() and isinstance(args, StudyArgs)


@pytest.mark.parametrize("size", ["cpu", "gpu", "small"])
def test_what_a_study_trains_is_as_published_but_for_its_size(size):
    path = ROOT / f"configs/study/train/{size}.yaml"
    args = cli.merge(TopKTrainArgs, (OmegaConf.load(path), str(path)))
    topk, optim = args.model.topk, args.optim
    assert topk.k * 16 == args.model.dim and topk.activation == "relu"
    assert (topk.n_last_nontopk, topk.anneal_ratio, topk.anneal_schedule) == (2, 0.2, "linear")
    assert (optim.beta1, optim.beta2, optim.epsilon) == (0.9, 0.95, 1e-8)
    assert (optim.weight_decay, optim.clip) == (0.1, 10.0)
    assert optim.warmup * 10 == args.steps
    if size == "gpu":
        assert (args.model.dim, args.model.n_layers, topk.k, optim.lr) == (1024, 8, 64, 3e-4)
