"""Several runs from one config: what is trained, how far each is above its twin, and mistakes."""

import csv
import dataclasses
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
from apps.topk.studies.arguments import Run, read_arguments, runs_of
from apps.topk.studies.made_with import MADE_WITH, take
from lingua_topk.errors import ConfigError, DataError
from tests.apps.hostile import undisturbed
from tests.apps.real_text import write_stories
from tests.apps.tiny import CONFIG, SENTENCES, write_corpus

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs/study").glob("*pu.yaml"))
RUNS = {"topk": [], "step": ["model.topk.anneal_schedule=step"], "vanilla": ["model.topk=null"]}


def in_this_process(called):
    """What stands in for processes of their own, which would import torch one by one."""

    def statuses(commands, together=False):
        failed = {}
        for name, (program, *words) in commands.items():
            called.append(program)
            with pytest.MonkeyPatch.context() as patch, undisturbed():
                patch.setattr(sys, "argv", [program, *words])
                try:
                    importlib.import_module(program).main()
                except SystemExit as ended:
                    failed |= {name: ended.code} if ended.code else {}
        return failed

    return statuses


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
        patch.setattr(side_by_side, "statuses", in_this_process(called))
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
    monkeypatch.setattr(side_by_side, "statuses", in_this_process(called))
    before = (folder / "summary.csv").read_bytes()
    shutil.rmtree(folder / "vanilla-seed2/evals/study")
    study.main([f"config={config}", "read=null"])
    assert called == ["apps.topk.eval"] and (folder / "summary.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("set=[steps=5,logging.freq=2]", "topk-seed1 was trained with other keys .*steps=4 by"),
        ("runs.topk=[model.topk.k=3]", "topk-seed1 was trained with .*model.topk.k=4 by"),
        ("eval_set=[dtype=bf16]", "topk-seed1/evals/study was made with other keys .*dtype=null"),
    ],
)
def test_results_of_other_keys_are_not_taken_for_these(made, config, monkeypatch, word, said):
    called = []
    monkeypatch.setattr(side_by_side, "statuses", in_this_process(called))
    with pytest.raises(ConfigError, match=said):
        study.main([f"config={config}", word])
    assert not called


@pytest.mark.parametrize("name", ["train.yaml", "eval.yaml"])
def test_keys_count_wherever_they_were_written(made, config, name):
    """The files that a study names are read anew at every start of it."""
    path = config.parent / name
    before = path.read_text()
    added = OmegaConf.create({"optim": {"lr": 0.02}} if name == "train.yaml" else {"dtype": "bf16"})
    path.write_text(OmegaConf.to_yaml(OmegaConf.merge(OmegaConf.load(path), added)))
    try:
        with pytest.raises(ConfigError, match="with other keys than this study has"):
            study.main([f"config={config}"])
    finally:
        path.write_text(before)


def test_an_evaluation_that_is_not_there_can_be_another(made, config, tmp_path):
    """What was trained is of use although a key of the evaluation was wrong."""
    run = runs_of(read_arguments([f"config={config}"], ""))[0]
    moved = dataclasses.replace(run, folder=tmp_path / "run")
    shutil.copytree(run.folder, moved.folder)
    shutil.rmtree(moved.evaluation)
    take(moved, {"dtype": "bf16"})
    assert json.loads((moved.folder / MADE_WITH).read_text())["eval"] == {"dtype": "bf16"}


def test_a_run_that_fails_leaves_the_others_their_results(config, tmp_path, monkeypatch, capsys):
    """And the same command tries it again."""
    calls = []

    def statuses(commands, together=False):
        calls.append(list(commands))
        for name, (program, *_) in commands.items():
            if program == "apps.topk.train" and name != "step-seed1":
                (tmp_path / "new" / name / "checkpoints/0000000004").mkdir(parents=True)
            if program == "apps.topk.eval":
                evaluation = tmp_path / "new" / name / "evals/study"
                evaluation.mkdir(parents=True)
                numbers = {"text": {"nll_per_token": 4.0}, "provenance": {}}
                (evaluation / "validation.json").write_text(json.dumps(numbers))
                (evaluation / "provenance.json").write_text("{}")
        return {"step-seed1": 3} if "step-seed1" in commands else {}

    monkeypatch.setattr(side_by_side, "statuses", statuses)
    monkeypatch.setattr(study, "_compare", lambda *_: None)
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            study.main([f"config={config}", f"dump_dir={tmp_path}/new", "seeds=[1]", "read=null"])
        assert ended.value.code == 3
        assert "failed, as said above: step-seed1" in capsys.readouterr().out
        rows = list(csv.DictReader((tmp_path / "new/summary.csv").open()))
        assert [row["run"] for row in rows] == ["topk", "vanilla"]
    assert calls == [["topk-seed1", "step-seed1"], ["vanilla-seed1"],
                     ["topk-seed1", "vanilla-seed1"], ["step-seed1"]]  # fmt: skip


def test_without_its_twin_a_run_is_not_summed_up(config):
    runs = runs_of(read_arguments([f"config={config}"], ""))
    left = study._with_their_twins(runs, {"vanilla-seed1": 1, "step-seed2": 1}, "vanilla")
    assert [run.name for run in left] == ["topk-seed2", "vanilla-seed2"]


def test_nothing_is_begun_after_a_signal(config, monkeypatch):
    """A failed measure of steering leaves a page to make; the end of a time limit does not."""
    args = read_arguments([f"config={config}"], "")
    for error, expected in ((side_by_side.Stopped(143), 2), (SystemExit(1), 3)):
        called = []

        def run(commands, error=error, called=called):
            called.extend(commands)
            if "steer_eval" in commands:
                raise error

        monkeypatch.setattr(side_by_side, "run", run)
        with pytest.raises(SystemExit) as ended:
            study._read(args, runs_of(args))
        assert ended.value.code == error.code and len(called) == expected


def test_a_run_that_was_ended_early_ends_the_study(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(side_by_side, "statuses", lambda commands: {})
    with pytest.raises(SystemExit) as ended:
        study.main([f"config={config}", f"dump_dir={tmp_path}/new"])
    assert ended.value.code == 130
    assert "topk-seed1 was ended before its last step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train=''"], "train is missing"),
        (["twin=none"], "twin=none is none of the runs: choose of topk, step, vanilla"),
        (["twin=topk", "read=null"], "runs.topk: this is the twin and has TopK"),
        (["read=nope"], "read=nope is none of the runs"),
        (["read=vanilla"], "read=vanilla is none of the runs that are compared"),
        (["eval_set=[nonsense=1]"], "nonsense"),
        (["eval_set=[dtype=fp8]"], "dtype='fp8' is not known"),
        (["analyze.nonsense=1"], "analyze.nonsense is no known key"),
        (["steer.detlas=1"], "steer.detlas is no known key: did you mean deltas?"),
        (["set=[steps=4,nonfinite=maybe]"], "nonfinite='maybe'"),
        (["set=[steps=4,data.batch_size=0]"], "runs.topk: data.batch_size=0 is too small"),
        (["set=[steps=4,optim.lr=-1]"], "optim.lr=-1"),
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
    run = Run(kind, seed, folder / f"{kind}{seed}", (), {"steps": 1})
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


# As the configs and their README have them.
TOKENS = {"cpu": 1_228_800, "annealing_cpu": 307_200, "annealing_seeds_cpu": 307_200,
          "gpu": 91_750_400,
          "annealing_gpu": 32_768_000}  # fmt: skip


def tokens_of(config):
    data = config["data"]
    return config["steps"] * config["grad_acc_steps"] * data["batch_size"] * data["seq_len"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_shipped_studies_can_be_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    # The tasks of eval.yaml are made of text that is not here.
    has_tasks = OmegaConf.load(path).eval.endswith("eval.yaml")
    words = [f"config={path}", *(["eval_set=[harness=null]"] if has_tasks else [])]
    args = read_arguments(words, "")
    if args.analyze:
        with pytest.raises(ConfigError, match=r"vectors=data/study/vectors\.txt is not there"):
            runs_of(args)
    data = write_stories(tmp_path / "data/study/4k")
    (tmp_path / "data/study/32k").symlink_to(data)
    (tmp_path / "data/study/vectors.txt").touch()
    (data / "tokenizer.model").rename(tmp_path / "aside")
    with pytest.raises(ConfigError, match=r"tokenizer\.model is not there .*prepare the text"):
        runs_of(args)
    (tmp_path / "aside").rename(data / "tokenizer.model")
    with pytest.raises(ConfigError, match=r"enwiki.val.jsonl.xz is neither a file nor a folder"):
        runs_of(args)
    for name in ("enwiki", "books"):
        (tmp_path / f"data/study/{name}.val.jsonl.xz").touch()
    runs = runs_of(args)
    assert len(runs) == len(args.runs) * max(len(args.seeds), 1)
    assert {tokens_of(run.config) for run in runs} == {TOKENS[path.stem]}


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
