"""lm-eval's tasks within an evaluation: files, what a killed one repeats, what is refused."""

import json
import os
import shutil

import pytest
import torch
from omegaconf import OmegaConf

from apps.topk import cli
from apps.topk.checkpoint import Checkpoint, open_checkpoint
from apps.topk.corpus.tokenizer import train_tokenizer
from apps.topk.eval import EvalArgs, launch_eval
from apps.topk.evaluation import scoring
from apps.topk.evaluation import tasks as tasks_module
from apps.topk.evaluation.adapter import HarnessModel
from apps.topk.tasks import make_tasks
from lingua_topk.errors import CheckpointError, ConfigError, DataError
from tests import processes
from tests.apps import lm_eval_once
from tests.apps.real_text import PLACES, train_on, write_stories

TASKS = ["held_continuation", "held_last_word", "held_rolling"]
GENERATION_TASK = """\
task: finish
dataset_path: json
dataset_kwargs:
  data_files: {{test: "{file}"}}
test_split: test
output_type: generate_until
doc_to_text: prompt
doc_to_target: answer
generation_kwargs: {{until: ["."], max_gen_toks: 12, {sampling}}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module", autouse=True)
def read_once():
    with lm_eval_once.read_once():
        yield


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    return write_stories(tmp_path_factory.mktemp("stories"))


@pytest.fixture(scope="module")
def checkpoint(stories, tmp_path_factory):
    return train_on(stories, tmp_path_factory.mktemp("run") / "topk")


@pytest.fixture(scope="module")
def task_folder(stories, tmp_path_factory):
    """Tasks of held-out text, and two that generate: one greedy, one drawn."""
    folder = tmp_path_factory.mktemp("tasks") / "tasks"
    make_tasks(out=str(folder), text=str(stories / "text"), name="held", max_items=30)
    prompts = [{"prompt": f"In the {place} there", "answer": " was"} for place in PLACES]
    (folder / "finish.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    text = GENERATION_TASK.format(file=folder / "finish.jsonl", sampling="do_sample: false")
    (folder / "finish.yaml").write_text(text)
    drawn = GENERATION_TASK.format(
        file=folder / "finish.jsonl", sampling="do_sample: true, temperature: 0.9, top_p: 0.9"
    )
    (folder / "draw.yaml").write_text(drawn.replace("task: finish", "task: draw"))
    return folder


def evaluate(checkpoint, dump_dir, **fields):
    content = {"ckpt_dir": str(checkpoint), "dump_dir": str(dump_dir), **fields}
    return launch_eval(cli.merge(EvalArgs, (OmegaConf.create(content), "the test")))


def harness(folder, tasks=TASKS, **fields):
    return {"tasks": list(tasks), "include_path": str(folder), "bootstrap_iters": 0, **fields}


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def interrupted(*_):
    raise KeyboardInterrupt


def test_what_an_evaluation_writes(checkpoint, task_folder, tmp_path):
    out = tmp_path / "out"
    evaluate(
        checkpoint, out, harness=harness(task_folder, bootstrap_iters=100), global_step=7,
        metric_log_dir=str(tmp_path),
    )  # fmt: skip
    results = read(out / "results.json")
    # The keys that Meta Lingua writes, in lm-eval's form.
    keys = {"results", "configs", "versions", "n-shot", "higher_is_better", "n-samples", "samples"}
    assert keys < set(results) and list(results["results"]) == TASKS
    assert 0 < results["results"]["held_continuation"]["acc,none"] < 1
    assert results["results"]["held_last_word"]["perplexity,none"] > 1
    assert results["results"]["held_rolling"]["word_perplexity,none"] > 1
    assert len(results["samples"]["held_continuation"]) == 30
    origin = results["provenance"]
    assert origin["checkpoint"] == str(checkpoint) and origin["step"] == 60
    assert origin["model"]["topk"]["layers"] == [0, 1] and origin["model"]["dim"] == 32
    assert origin["model"]["tokens"] == 60 * 4 * 96
    assert read(out / "provenance.json")["checkpoint"] == str(checkpoint)
    assert read(out / "validation.json")["text"]["documents"] == 40
    assert len((out / "validation_documents.jsonl").read_text().splitlines()) == 40
    line = json.loads((tmp_path / "metrics.eval.jsonl").read_text(encoding="utf-8"))
    assert line["global_step"] == 7 and line["held_rolling"] == results["results"]["held_rolling"]
    assert not (out / "tasks").exists()
    config = OmegaConf.load(out / "config.yaml")
    assert config.harness.tasks == TASKS


def test_documents_add_up_to_what_is_reported(checkpoint, tmp_path):
    evaluate(checkpoint, tmp_path / "out")
    lines = (tmp_path / "out" / "validation_documents.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    result = read(tmp_path / "out" / "validation.json")["text"]
    tokens = sum(one["tokens"] for one in found)
    assert tokens == result["tokens"] and sum(one["bytes"] for one in found) == result["bytes"]
    assert sum(one["nll"] for one in found) / tokens == pytest.approx(result["nll_per_token"])
    low, high = result["perplexity_ci95"]
    assert low < result["perplexity"] < high
    width = 2 * 1.96 * result["nll_per_token_stderr"]
    assert torch.tensor(high / low).log().item() == pytest.approx(width, rel=1e-4)


def test_a_killed_evaluation_repeats_one_task_at_most(
    checkpoint, task_folder, tmp_path, monkeypatch
):
    whole = tmp_path / "whole"
    evaluate(checkpoint, whole, harness=harness(task_folder), validation=None)
    done, original = [], tasks_module._evaluate

    def killed_in_the_second(lm_eval, model, spec, *rest):
        if spec == TASKS[1] and spec not in done:
            done.append(spec)
            raise KeyboardInterrupt
        done.append(spec)
        return original(lm_eval, model, spec, *rest)

    monkeypatch.setattr(tasks_module, "_evaluate", killed_in_the_second)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        evaluate(checkpoint, out, harness=harness(task_folder), validation=None)
    assert done == TASKS[:2] and not (out / "results.json").exists()
    evaluate(checkpoint, out, harness=harness(task_folder), validation=None)
    assert done == [TASKS[0], TASKS[1], TASKS[1], TASKS[2]]
    here, there = read(out / "results.json"), read(whole / "results.json")
    assert here["results"] == there["results"] and here["samples"] == there["samples"]


def test_a_kill_after_the_tasks_repeats_none(checkpoint, task_folder, tmp_path, monkeypatch):
    out, done, original = tmp_path / "out", [], tasks_module._evaluate

    def noted(lm_eval, model, spec, *rest):
        done.append(spec)
        return original(lm_eval, model, spec, *rest)

    monkeypatch.setattr(tasks_module, "_evaluate", noted)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("apps.topk.eval.negative_log_likelihoods", interrupted)
        evaluate(checkpoint, out, harness=harness(task_folder, TASKS[:2]))
    evaluate(checkpoint, out, harness=harness(task_folder, TASKS[:2]))
    assert done == TASKS[:2]
    assert not (out / "tasks").exists() and (out / "provenance.json").exists()


@pytest.mark.parametrize("change", ["limit", "dtype", "file", "task"])
def test_what_was_done_with_other_settings_is_done_again(
    checkpoint, task_folder, tmp_path, monkeypatch, change
):
    out, asked = tmp_path / "out", []
    original = tasks_module._evaluate
    monkeypatch.setattr(tasks_module, "forget_work", lambda folder: None)
    monkeypatch.setattr("apps.topk.eval.forget_work", lambda folder: None)

    def noted(lm_eval, model, spec, *rest):
        asked.append(spec)
        return original(lm_eval, model, spec, *rest)

    monkeypatch.setattr(tasks_module, "_evaluate", noted)
    first = TASKS[:1]
    evaluate(checkpoint, out, harness=harness(task_folder, first, limit=5), validation=None)
    settings = {"harness": harness(task_folder, first, limit=5)}
    if change == "limit":
        settings["harness"]["limit"] = 6
    elif change == "dtype":
        settings["dtype"] = "fp64"
    elif change == "task":  # its documents are others now
        os.utime(task_folder / f"{first[0]}.jsonl", (1, 1))
    else:  # half written, by something else
        (out / "tasks" / f"{first[0]}.json").write_text("{")
    evaluate(checkpoint, out, validation=None, **settings)
    assert asked == first * 2
    evaluate(checkpoint, out, validation=None, **settings)
    assert asked == first * 2


def test_a_config_of_meta_lingua_is_understood(checkpoint, task_folder, tmp_path):
    generator = {"max_tokens": 8192, "dtype": "fp64", "temperature": 1.0, "top_p": 0.95}
    evaluate(
        checkpoint, tmp_path, generator=generator, wandb=None, validation={"max_steps": 3},
        harness=harness(task_folder, [{"task": "held_last_word", "num_fewshot": 1}]),
    )  # fmt: skip
    results = read(tmp_path / "results.json")
    assert results["n-shot"] == {"held_last_word": 1}
    assert results["config"]["model_dtype"] == "torch.float64"
    assert read(tmp_path / "validation.json")["text"]["documents"] == 3


def test_a_group_of_tasks_is_one(checkpoint, task_folder, tmp_path):
    group = tmp_path / "group"
    group.mkdir()
    for file in task_folder.iterdir():
        (group / file.name).write_bytes(file.read_bytes())
    (group / "both.yaml").write_text(
        "group: both\ntask: [held_continuation, held_last_word]\n"
        "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    out = tmp_path / "out"
    evaluate(checkpoint, out, harness=harness(group, ["both", "held_rolling"]), validation=None)
    results = read(out / "results.json")
    assert {"both", "held_continuation", "held_last_word", "held_rolling"} == set(
        results["results"]
    )
    assert not (out / "validation.json").exists()


def write_task(folder, name, documents, output_type, **fields):
    """A task of one's own in `folder`."""
    folder.mkdir(exist_ok=True)
    lines = (json.dumps(one) + "\n" for one in documents)
    (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    config = {
        "task": name, "dataset_path": "json", "test_split": "test", "output_type": output_type,
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "doc_to_text": "{{text}}", "doc_to_target": "{{end}}",
        "metric_list": [{"metric": "acc"}], **fields,
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(OmegaConf.to_yaml(config), encoding="utf-8")


def test_a_tag_with_other_settings_and_a_group_with_some(checkpoint, tmp_path):
    folder = tmp_path / "tasks"
    for name in ("one", "two"):
        documents = [{"text": f"{name} {i}", "end": " end"} for i in range(3)]
        write_task(folder, name, documents, "loglikelihood", tag="both_by_tag")
    (folder / "both.yaml").write_text("group: both\ntask: [one, two]\n")
    tag = {"task": "both_by_tag", "num_fewshot": 1}
    evaluate(checkpoint, tmp_path / "out", harness=harness(folder, [tag]), validation=None)
    results = read(tmp_path / "out" / "results.json")
    assert results["n-shot"] == {"one": 1, "two": 1}
    assert {name: n["effective"] for name, n in results["n-samples"].items()} == {
        "one": 3,
        "two": 3,
    }
    for group in ({"task": "both", "num_fewshot": 1}, {"group": "mine", "task": ["one", "two"]}):
        with pytest.raises(ConfigError, match="takes no settings for a group"):
            evaluate(checkpoint, tmp_path / "x", harness=harness(folder, [group]))


TEXT = [{"text": "a", "number": 3, "end": "b"}]


def test_documents_at_the_edge(checkpoint, tmp_path, caplog):
    """An empty continuation is certain; a token across the border is scored; no bos, no context."""
    documents = [
        {"text": "Anna foun", "end": "d"}, {"text": "Anna", "end": ""}, {"text": " ", "end": "of"},
    ]  # fmt: skip
    fields = {"doc_to_target": "{{end}}", "target_delimiter": ""}
    write_task(tmp_path / "tasks", "edge", documents, "loglikelihood", **fields)
    for add_bos in (True, False):
        out = tmp_path / str(add_bos)
        asked = harness(tmp_path / "tasks", ["edge"], add_bos=add_bos)
        evaluate(checkpoint, out, harness=asked, validation=None)
        answers = [s["resps"][0][0] for s in read(out / "results.json")["samples"]["edge"]]
        assert answers[1] == [0.0, True]
        assert answers[0][0] < 0 and answers[2][0] < 0
        assert "in 1 of 2 texts one token spans the end of the context" in caplog.text
        caplog.clear()
        assert read(out / "results.json")["provenance"]["bos"] is add_bos


@pytest.mark.parametrize(
    ("documents", "output_type", "fields", "message"),
    [
        (TEXT, "loglikelihood", {"doc_to_text": "number"}, "cannot be evaluated .*not a string"),
        (TEXT, "loglikelihood", {"unsafe_code": True}, "cannot be evaluated .*unsafe"),
        (
            TEXT, "generate_until", {"generation_kwargs": {"until": ["."], "top_p": 2.0}},
            "generation_kwargs: top_p=2.0",
        ),
        (TEXT, "loglikelihood", {"doc_to_text": "{{text|nofilter}}"}, "task cannot be loaded"),
    ],
)  # fmt: skip
def test_a_task_that_is_wrong_is_named(
    checkpoint, tmp_path, documents, output_type, fields, message
):
    write_task(tmp_path / "tasks", "task", documents, output_type, **fields)
    with pytest.raises(DataError, match=message):
        evaluate(
            checkpoint, tmp_path / "out", harness=harness(tmp_path / "tasks", ["task"]),
            validation=None,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tasks": []}, "harness.tasks is empty"),
        ({"tasks": ["held_rollin"]}, "'held_rollin' is no task .* did you mean held_rolling?"),
        ({"tasks": ["held_rolling"] * 2}, "names held_rolling more than once"),
        ({"include_path": "nowhere"}, "harness.include_path=nowhere is not a folder"),
        ({"batch_tokens": 0}, "harness.batch_tokens=0 is too small"),
        ({"limit": 0}, "harness.limit=0"),
        ({"limit": float("nan")}, "harness.limit=nan"),
        ({"apply_chat_template": True}, "have no chat template"),
        ({"use_cache": "answers"}, "would answer for another checkpoint"),
        ({"cache_requests": True}, "would answer for another checkpoint"),
    ],
)
def test_mistakes_are_named(checkpoint, task_folder, tmp_path, fields, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(checkpoint, tmp_path / "out", harness={**harness(task_folder), **fields})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"generator": {"dtyp": "fp32"}}, "generator.dtyp is no known key: did you mean dtype?"),
        ({"generator": {"dtype": "fp8"}}, "dtype='fp8' is not known"),
        ({"generator": "fp32"}, "generator=fp32 is no section"),
        ({"validation": None}, "nothing is left to evaluate"),
        ({"validation": {"max_steps": 0}}, "validation.max_steps=0 is too small"),
    ],
)
def test_mistakes_outside_the_tasks_are_named(checkpoint, tmp_path, fields, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(checkpoint, tmp_path / "out", **fields)


def test_documents_that_cannot_be_had(checkpoint, task_folder, tmp_path):
    own = tmp_path / "tasks"
    own.mkdir()
    text = (task_folder / "held_rolling.yaml").read_text()
    (own / "lost.yaml").write_text(
        text.replace("held_rolling.jsonl", "lost.jsonl").replace("held_rolling", "lost")
    )
    with pytest.raises(DataError, match=r"lost cannot be loaded .*HF_DATASETS_OFFLINE"):
        evaluate(checkpoint, tmp_path / "out", harness=harness(own, ["lost"]))


def test_a_run_that_was_moved_is_evaluated_again_in_its_place(checkpoint, tmp_path):
    there, run = checkpoint.parent.parent, tmp_path / "moved"
    shutil.copytree(checkpoint, run / "checkpoints" / checkpoint.name)
    evaluate(checkpoint, there / "evals" / "elsewhere", validation={"max_documents": 1})
    shutil.move(there / "evals" / "elsewhere", run / "evals" / checkpoint.name)
    here = run / "checkpoints" / checkpoint.name
    evaluate(here, run / "evals" / checkpoint.name, validation={"max_documents": 1})
    written = json.loads((run / "evals" / checkpoint.name / "validation.json").read_text())
    assert written["provenance"]["checkpoint"] == str(here)


def test_the_evaluation_of_another_checkpoint_is_not_overwritten(checkpoint, tmp_path):
    evaluate(checkpoint, tmp_path / "out", validation={"max_documents": 1})
    other = checkpoint.parent / "0000000050"
    before = (tmp_path / "out" / "validation.json").read_bytes()
    with pytest.raises(ConfigError, match=r"holds the evaluation of .*0000000060: give another"):
        evaluate(other, tmp_path / "out", validation={"max_documents": 1})
    assert (tmp_path / "out" / "validation.json").read_bytes() == before
    evaluate(checkpoint, tmp_path / "out", validation={"max_documents": 2})
    assert read(tmp_path / "out" / "validation.json")["text"]["documents"] == 2


def test_an_evaluation_is_not_done_until_it_is(checkpoint, tmp_path, monkeypatch):
    evaluate(checkpoint, tmp_path / "out")
    monkeypatch.chdir(checkpoint.parent)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("apps.topk.eval.negative_log_likelihoods", interrupted)
        evaluate(checkpoint.name, tmp_path / "out")  # the same one, by another path
    assert not (tmp_path / "out" / "provenance.json").exists()


def test_a_folder_that_cannot_be_written_is_found_out_first(checkpoint, tmp_path):
    (tmp_path / "file").touch()
    for name in ("dump_dir", "metric_log_dir"):
        fields = {"dump_dir": tmp_path / "out", name: str(tmp_path / "file")}
        with pytest.raises(ConfigError, match=f"{name}=.*file cannot be written"):
            evaluate(checkpoint, **fields)


def test_another_tokenizer_is_noticed(stories, tmp_path):
    root = tmp_path / "corpus"
    shutil.copytree(stories, root)
    checkpoint = train_on(root, tmp_path / "run", "steps=2")
    texts = ["Something else is written here, and nobody saw it before. " * 3] * 40
    (root / "tokenizer.model").write_bytes(train_tokenizer(texts, 300))
    with pytest.raises(CheckpointError, match=r"is another one than the model was trained with"):
        evaluate(checkpoint, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"is another file than the run in .* began with"):
        train_on(root, tmp_path / "run", "steps=4")


def test_a_model_that_has_diverged_is_said_to_have(checkpoint, tmp_path, monkeypatch):
    original = Checkpoint.model

    def diverged(self, *arguments):
        model = original(self, *arguments)
        model.output.weight.mul_(1e4)
        return model

    monkeypatch.setattr(Checkpoint, "model", diverged)
    with pytest.raises(CheckpointError, match="nats a token: it has diverged"):
        evaluate(checkpoint, tmp_path / "out")


def test_bos_as_in_training_is_the_same_everywhere(stories, task_folder, tmp_path, monkeypatch):
    checkpoint = train_on(stories, tmp_path / "run", "data.add_bos=false", "steps=2")
    tokenizer = open_checkpoint(checkpoint).tokenizer()
    asked = []
    original = scoring.rows_of

    def noted(requests, *rest):
        asked.extend(requests)
        return original(requests, *rest)

    monkeypatch.setattr(scoring, "rows_of", noted)
    evaluate(checkpoint, tmp_path / "out", harness=harness(task_folder))
    assert not any(tokenizer.bos_id in one.context for one in asked)
    assert read(tmp_path / "out" / "validation.json")["text"]["bos"] is False
    # What has no context follows eos, as in training.
    assert {one.context for one in asked if len(one.context) == 1} >= {(tokenizer.eos_id,)}


def test_a_source_of_the_hub_is_read_like_a_file(checkpoint, stories, tmp_path):
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes((stories / "text" / "text.val.jsonl").read_bytes())
    name = f"hf:{folder}"
    sources = [name, str(folder)]
    results = evaluate(checkpoint, tmp_path / "out", validation={"sources": sources})
    assert results[name] == results["text"] == results["dataset"]


def test_bos_is_given_as_in_training(checkpoint):
    opened = open_checkpoint(checkpoint)
    tokenizer = opened.tokenizer()
    model = opened.model("cpu", torch.float32)
    adapter = HarnessModel(model, tokenizer, 96, 512)
    plain = HarnessModel(model, tokenizer, 96, 512, add_bos=False)
    assert adapter.tok_encode("Anna")[0] == tokenizer.bos_id == adapter.prefix_token_id
    assert adapter.tok_encode("Anna", add_special_tokens=False) == plain.tok_encode("Anna")
    assert adapter.tok_encode("Anna")[1:] == plain.tok_encode("Anna")
    # What looks like a special token in a text is text.
    assert tokenizer.bos_id not in plain.tok_encode("<s>Anna</s>")


SHARED = ["held_continuation", "held_last_word", "held_rolling", "finish", "draw"]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp64", 1e-9), ("fp32", 1e-4)])
def test_two_processes_and_one_agree(checkpoint, task_folder, tmp_path, dtype, tolerance):
    (tmp_path / "empty.yaml").write_text("{}")
    done = processes.run(
        2, "apps.topk.eval", f"config={tmp_path / 'empty.yaml'}", f"ckpt_dir={checkpoint}",
        f"dtype={dtype}", f"harness.include_path={task_folder}",
        f"harness.tasks=[{','.join(SHARED)}]", "harness.bootstrap_iters=0",
        "harness.batch_tokens=512", f"dump_dir={tmp_path / '2'}",
        imported=["tests.apps.lm_eval_imported"],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    settings = harness(task_folder, SHARED, batch_tokens=512)
    evaluate(checkpoint, tmp_path / "1", dtype=dtype, harness=settings)
    one, two = (read(tmp_path / str(size) / "results.json") for size in (1, 2))
    for task in SHARED:
        for here, there in zip(one["samples"][task], two["samples"][task], strict=True):
            assert here["doc_id"] == there["doc_id"]
            for (a,), (b,) in zip(here["resps"], there["resps"], strict=True):
                if isinstance(a, str):
                    assert a == b
                    continue
                numbers = (a, b) if isinstance(a, float) else (a[0], b[0])
                assert numbers[0] == pytest.approx(numbers[1], abs=tolerance)
    texts = [sample["resps"][0][0] for sample in one["samples"]["draw"]]
    assert len(set(texts)) > 2  # drawn, each by itself
    here, there = (read(tmp_path / str(size) / "validation.json")["text"] for size in (1, 2))
    assert here["nll_per_token"] == pytest.approx(there["nll_per_token"], abs=tolerance)
    assert here["l0"] == pytest.approx(there["l0"])
