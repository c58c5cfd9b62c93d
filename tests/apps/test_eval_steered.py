"""The evaluation of a steered model: its numbers, and that they are not taken for its own."""

import csv
import json
import logging
import shutil
import sys

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from omegaconf import OmegaConf

from apps.topk import cli, compare
from apps.topk.checkpoint import Checkpoint, newest_checkpoint, open_checkpoint
from apps.topk.comparison.runs import read_run
from apps.topk.eval import PROGRAM, EvalArgs, launch_eval
from apps.topk.evaluation import scoring, steered
from apps.topk.evaluation import tasks as tasks_module
from apps.topk.evaluation.adapter import HarnessModel
from apps.topk.evaluation.scoring import Request, score
from apps.topk.evaluation.steered import read_steering
from apps.topk.generation import Generator
from apps.topk.neurons.folder import write_analysis
from apps.topk.sampling import Sampling
from apps.topk.train import train
from lingua_topk.errors import CheckpointError, ConfigError, DataError
from lingua_topk.steering import Ablate, Add, Clamp, Scale, Set, steer
from tests import processes
from tests.apps import lm_eval_once
from tests.apps.made_up_analysis import write_part
from tests.apps.tiny import SENTENCES, train_args, write_corpus

D = 32  # of the run
CHOICES = """\
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/choices.jsonl"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{ends}}}}"
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""
FINISH = """\
task: finish
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/choices.jsonl"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{ends[0]}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module", autouse=True)
def read_once():
    with lm_eval_once.read_once():
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A TopK run of 20 steps, TopK in blocks 0 and 1 of 3; its folder."""
    root = write_corpus(tmp_path_factory.mktemp("corpus"))
    folder = tmp_path_factory.mktemp("run") / "topk"
    handlers = list(logging.getLogger().handlers)
    train(train_args(root, folder, "steps=20", "model.topk.anneal_ratio=0.5"))
    logging.getLogger().handlers[:] = handlers
    return folder


@pytest.fixture(scope="module")
def checkpoint(trained):
    return newest_checkpoint(trained)


@pytest.fixture(scope="module")
def model(checkpoint):
    return open_checkpoint(checkpoint).model("cpu", torch.float64)


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return open_checkpoint(checkpoint).tokenizer()


@pytest.fixture(scope="module")
def neuron(model, tokenizer):
    """The one of layer 1 that fires most, so that to be without it is a difference."""
    counts = torch.zeros(D, dtype=torch.int64)

    def count(module, inputs, y):
        counts.add_((y[0] != 0).sum(dim=0))

    hook = model.layers[1].topk.register_forward_hook(count)
    for text in SENTENCES:
        model(torch.tensor([tokenizer.encode(text, add_bos=True, add_eos=False)[:32]]))
    hook.remove()
    return int(counts.argmax())


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    """Choices after a shared context, and texts to be finished."""
    folder = tmp_path_factory.mktemp("tasks")
    documents = [
        {"text": text, "ends": [" fox", " hill", " dog sleeps"]}
        for text in ("The quick brown", "A stream of wa", "Every good boy", "The lazy dog an")
    ]
    lines = "".join(json.dumps(one) + "\n" for one in documents)
    (folder / "choices.jsonl").write_text(lines, encoding="utf-8")
    for name, text in (("choices", CHOICES), ("finish", FINISH)):
        (folder / f"{name}.yaml").write_text(text.format(folder=folder), encoding="utf-8")
    return folder


def evaluate(checkpoint, out, **fields):
    content = {"ckpt_dir": str(checkpoint), "dump_dir": str(out), "dtype": "fp64", **fields}
    return launch_eval(cli.merge(EvalArgs, (OmegaConf.create(content), "the test")))


def harness(folder, *tasks):
    return {
        "tasks": list(tasks) or ["choices", "finish"], "include_path": str(folder),
        "bootstrap_iters": 0,
    }  # fmt: skip


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def numbers(out):
    """What was measured, without where it comes from."""
    validation = read(out / "validation.json")["text"]
    if not (out / "results.json").is_file():
        return validation
    samples = read(out / "results.json")["samples"]
    return validation, {task: [one["resps"] for one in found] for task, found in samples.items()}


@pytest.fixture(scope="module")
def plain(checkpoint, task_folder, tmp_path_factory):
    """The evaluation of the model as it is, with tasks."""
    out = tmp_path_factory.mktemp("plain") / "plain"
    evaluate(checkpoint, out, harness=harness(task_folder))
    return out


@pytest.fixture(scope="module")
def turned(checkpoint, task_folder, neuron, tmp_path_factory):
    """That of the model with 6 added to its neuron."""
    out = tmp_path_factory.mktemp("turned") / "turned"
    asked = [{"neuron": f"1:{neuron}", "delta": 6}]
    evaluate(checkpoint, out, harness=harness(task_folder), steer=asked)
    return out


# Its numbers -----------------------------------------------------------------------------------


def test_a_delta_of_zero_changes_no_bit(checkpoint, task_folder, neuron, plain, tmp_path):
    asked = [{"neuron": f"1:{neuron}", "delta": 0}, {"neuron": "0:3", "delta": 0.0}]
    evaluate(checkpoint, tmp_path / "out", harness=harness(task_folder), steer=asked)
    assert numbers(tmp_path / "out") == numbers(plain)


def test_a_steered_model_has_other_numbers_everywhere(plain, turned):
    (before, tasks_before), (after, tasks_after) = numbers(plain), numbers(turned)
    assert before["tokens"] == after["tokens"]
    assert before["nll_per_token"] != pytest.approx(after["nll_per_token"], abs=1e-3)
    for task, answers in tasks_before.items():
        assert answers != tasks_after[task]
    assert before["l0"]["1"] <= after["l0"]["1"] <= before["l0"]["1"] + 1


def test_ablate_is_a_model_without_the_column(
    checkpoint, task_folder, neuron, plain, tmp_path, monkeypatch
):
    asked = [{"neuron": f"1:{neuron}", "mode": "ablate"}]
    evaluate(checkpoint, tmp_path / "out", harness=harness(task_folder), steer=asked)
    original = Checkpoint.model

    def without_it(self, *arguments):
        model = original(self, *arguments)

        def zeroed(module, inputs, y):
            y = y.clone()
            y[..., neuron] = 0
            return y

        model.layers[1].topk.register_forward_hook(zeroed)
        return model

    monkeypatch.setattr(Checkpoint, "model", without_it)
    evaluate(checkpoint, tmp_path / "by_hand", harness=harness(task_folder))
    assert numbers(tmp_path / "out") == numbers(tmp_path / "by_hand") != numbers(plain)


@pytest.mark.parametrize("where", ["all", "prompt"])
@pytest.mark.parametrize("before_selection", [False, True])
def test_shared_contexts_are_steered_as_texts_alone(
    model, tokenizer, neuron, monkeypatch, where, before_selection
):
    """A likelihood's text is a prompt throughout, so that both places are the same."""
    one = Add(1, neuron, 6.0, where=where, before_selection=before_selection)
    arguments = [
        (text, end)
        for text in ("The quick brown", "A stream of water")
        for end in (" fox jumps", " hill", " dog")
    ]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(arguments)]
    rows = []
    original = scoring.rows_of
    monkeypatch.setattr(scoring, "rows_of", lambda *a: rows.append(original(*a)) or rows[-1])
    adapter = HarnessModel(model, tokenizer, 32, 64)
    with steer(model, [one]):
        shared = adapter.loglikelihood(requests)
        assert len(rows[0]) < len(requests)
        encoded = [adapter._encode_pair(*pair) for pair in arguments]
        asked = [Request(tuple(context), tuple(end)) for context, end in encoded]
        alone = score(model, asked, 32, 64, share_contexts=False)
    found = torch.tensor([nats for nats, _ in shared], dtype=torch.float64)
    assert torch.allclose(found, alone.log_likelihoods, rtol=0, atol=1e-10)
    unsteered = score(model, asked, 32, 64).log_likelihoods
    assert not torch.allclose(found, unsteered, rtol=0, atol=1e-3)


@pytest.mark.parametrize("where", ["all", "prompt", "generated"])
def test_texts_are_finished_as_the_generator_does(model, tokenizer, neuron, where):
    prompts = ["The quick", "A stream of", "Every"]
    kwargs = {"max_gen_toks": 8, "do_sample": False, "until": []}
    requests = [Instance("generate_until", {}, (p, kwargs), i) for i, p in enumerate(prompts)]
    sampling = Sampling(max_tokens=8, temperature=0.0)
    plain = [one.text for one in Generator(model, tokenizer).generate(prompts, sampling)]
    with steer(model, [Add(1, neuron, 30.0, where=where)]):
        found = HarnessModel(model, tokenizer, 32, 64).generate_until(requests)
        expected = Generator(model, tokenizer).generate(prompts, sampling)
    assert found == [one.text for one in expected] != plain


def test_generated_texts_are_steered_in_a_whole_evaluation(
    checkpoint, task_folder, neuron, plain, tmp_path
):
    """Where only generated tokens are turned, no likelihood is another, and no bit of it."""
    asked = [{"neuron": f"1:{neuron}", "delta": 30, "where": "generated"}]
    evaluate(checkpoint, tmp_path / "out", harness=harness(task_folder), steer=asked)
    (before, tasks_before), (after, tasks_after) = numbers(plain), numbers(tmp_path / "out")
    assert after == before and tasks_after["choices"] == tasks_before["choices"]
    assert tasks_after["finish"] != tasks_before["finish"]


@pytest.mark.slow
def test_two_processes_and_one_agree(checkpoint, task_folder, neuron, turned, tmp_path):
    (tmp_path / "empty.yaml").write_text("{}")
    done = processes.run(
        2, PROGRAM,
        f"config={tmp_path / 'empty.yaml'}", f"ckpt_dir={checkpoint}", "dtype=fp64",
        f"dump_dir={tmp_path / '2'}", f'steer=[{{neuron: "1:{neuron}", delta: 6}}]',
        f"harness.include_path={task_folder}", "harness.tasks=[choices,finish]",
        "harness.bootstrap_iters=0", imported=["tests.apps.lm_eval_imported"],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert f"[steered: 1:{neuron} + 6]" in done.stdout + done.stderr
    (one, tasks_one), (two, tasks_two) = numbers(turned), numbers(tmp_path / "2")
    assert two["nll_per_token"] == pytest.approx(one["nll_per_token"], abs=1e-9)
    assert two["l0"] == pytest.approx(one["l0"])
    assert tasks_two["finish"] == tasks_one["finish"]
    for here, there in zip(tasks_one["choices"], tasks_two["choices"], strict=True):
        assert [r[0][0] for r in here] == pytest.approx([r[0][0] for r in there], abs=1e-9)


# What it is asked for --------------------------------------------------------------------------


def told(checkpoint, *entries, analysis=None):
    """The interventions of a list, and how they are told."""
    found = read_steering(list(entries), open_checkpoint(checkpoint), analysis)
    return list(found.interventions), found.told


def test_every_mode_is_understood(checkpoint):
    found, text = told(
        checkpoint,
        {"neuron": "0:1", "delta": -2.5},
        {"neuron": "1:2", "mode": "set", "value": 3, "where": "prompt"},
        {"neuron": "1:3", "mode": "clamp", "minimum": 1},
        {"neuron": "1:3", "mode": "clamp", "minimum": 1, "maximum": 2.5},
        {"neuron": "1:4", "mode": "scale", "factor": 0.5, "before_selection": True},
        {"neuron": "1:5", "mode": "ablate", "where": "generated", "before_selection": True},
    )
    kinds = [Add, Set, Clamp, Clamp, Scale, Ablate]
    assert [type(one) for one in found] == kinds
    assert [(one.layer, one.neuron) for one in found[:2]] == [(0, 1), (1, 2)]
    assert found[0].delta == -2.5 and found[1].value == 3 and found[4].factor == 0.5
    assert (found[2].minimum, found[2].maximum) == (1, float("inf"))
    assert (found[3].minimum, found[3].maximum) == (1, 2.5)
    assert text == (
        "0:1 - 2.5, 1:2 = 3 (prompt), 1:3 at least 1, 1:3 at least 1 and at most 2.5,"
        " 1:4 times 0.5 (before selection), 1:5 ablated (generated, before selection)"
    )


def test_the_command_line_and_a_file_say_the_same(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "steer:\n- {neuron: '1:17', delta: 8}\n- neuron: '0:5'\n  mode: ablate\n", encoding="utf-8"
    )
    (tmp_path / "empty.yaml").write_text("{}")
    line = """steer=[{neuron: "1:17", delta: 8}, {neuron: "0:5", mode: ablate}]"""
    by_file = cli.read_config(EvalArgs, PROGRAM, "", argv=[f"config={tmp_path / 'c.yaml'}"])
    by_line = cli.read_config(EvalArgs, PROGRAM, "", argv=[f"config={tmp_path}/empty.yaml", line])
    expected = [{"neuron": "1:17", "delta": 8}, {"neuron": "0:5", "mode": "ablate"}]
    assert by_file.steer == by_line.steer == expected
    overruled = [f"config={tmp_path / 'c.yaml'}", "steer=null"]
    assert cli.read_config(EvalArgs, PROGRAM, "", argv=overruled).steer is None


def made_analysis(folder, width=D, step=20, layers=(0, 1)):
    """An analysis of two layers: neuron n has the mean n and the maximum 10 n; 0 never fires."""
    strengths = np.arange(width, dtype=np.float64)
    found = {
        "counts": np.arange(width), "mean": strengths, "maximum": 10 * strengths,
        "semantic_entropy": strengths, "firing_rate": strengths / width,
    }  # fmt: skip
    write_part(folder / "model", [found] * len(layers), topk=layers)
    write_analysis(folder, {"step": step})
    return str(folder)


def test_units_are_the_neurons_own(checkpoint, tmp_path, caplog):
    folder = made_analysis(tmp_path / "neurons")
    found, text = told(
        checkpoint,
        {"neuron": "1:7", "delta": 2, "unit": "maximum"},
        {"neuron": "0:3", "mode": "clamp", "maximum": 0.5, "unit": "mean"},
        {"neuron": "0:3", "delta": 2, "unit": "absolute"},
        analysis=folder,
    )
    assert (found[0].delta, found[1].maximum, found[2].delta) == (140.0, 1.5, 2)
    assert text == "1:7 + 140, 0:3 at most 1.5, 0:3 + 2" and not caplog.records


def test_the_analysis_of_the_run_is_found_and_its_step_compared(checkpoint, tmp_path, caplog):
    run = tmp_path / "run"
    shutil.copytree(checkpoint, run / "checkpoints" / checkpoint.name)
    here = run / "checkpoints" / checkpoint.name
    entry = {"neuron": "1:7", "delta": 2, "unit": "mean"}
    with pytest.raises(ConfigError, match=r"^steer\[0\].unit=mean: there is no analysis of"):
        told(here, entry)
    made_analysis(run / "neurons", step=10)
    assert told(here, entry)[1] == "1:7 + 14"
    assert "is of step 10, the checkpoint of step 20" in caplog.text


@pytest.mark.parametrize(
    ("made", "entry", "message"),
    [
        ({}, {"neuron": "1:0"}, r"^steer\[0\].unit=mean: neuron 1:0 was not seen to fire"),
        ({"width": 16}, {"neuron": "1:3"}, "layer 0 has 16 neurons, that of the checkpoint 32"),
        ({"layers": (0,)}, {"neuron": "1:3"}, r"unit=mean: .*layer 1 is not one .* nearest is 0"),
        (None, {"neuron": "1:3"}, r"^steer\[0\].unit=mean: .* holds no finished analysis"),
    ],
)
def test_an_analysis_that_does_not_fit_is_named(checkpoint, tmp_path, made, entry, message):
    if made is not None:
        made_analysis(tmp_path / "neurons", **made)
    with pytest.raises((ConfigError, DataError), match=message):
        told(checkpoint, {**entry, "delta": 1, "unit": "mean"}, analysis=str(tmp_path / "neurons"))


GOOD = {"neuron": "1:3", "delta": 8}
MISTAKES = [
    (GOOD, r"steer=.* is no list of interventions: write for example steer='\[\{neuron: "),
    ("1:3", "steer='1:3' is no list"),
    ([], r"steer=\[\] is no list .* or null"),
    ([GOOD, "1:3"], r"steer\[1\]='1:3' is no intervention"),
    ([{**GOOD, "delt": 8}], r"steer\[0\].delt is no known key: did you mean delta\?"),
    ([{3: 8}], r"steer\[0\].3 is no known key: allowed are"),
    ([{"delta": 8}], r"steer\[0\].neuron is missing: give LAYER:NEURON in quotes"),
    ([{**GOOD, "neuron": 63}], r'steer\[0\].neuron=63 is no text: .* in quotes, such as "3:417"'),
    ([{**GOOD, "neuron": "1-3"}], r"steer\[0\].neuron='1-3' is no neuron: give LAYER:NEURON"),
    ([GOOD, {**GOOD, "neuron": "1:32"}], r"steer\[1\].neuron: .*0 to 31; the nearest is 31"),
    ([{**GOOD, "neuron": "2:3"}], r"steer\[0\].neuron: layer=2 is not a TopK .* nearest is 1"),
    ([{**GOOD, "neuron": "9:3"}], r"steer\[0\].neuron: layer=9 is not there: .* nearest is 1"),
    ([{"neuron": "1:3"}], r"steer\[0\].delta is missing: mode=add needs delta, a number"),
    ([{"neuron": "1:3", "mode": "clamp"}], r"mode=clamp needs minimum or maximum, a number"),
    ([{**GOOD, "delta": float("nan")}], r"steer\[0\].delta=nan is not a number"),
    ([{**GOOD, "delta": float("inf")}], r"steer\[0\].delta=inf is not a number"),
    ([{**GOOD, "delta": 10**400}], r"steer\[0\].delta=1000*0 is not a number"),
    ([{**GOOD, "delta": "8"}], r"steer\[0\].delta='8' is not a number"),
    ([{**GOOD, "delta": True}], r"steer\[0\].delta=True is not a number"),
    ([{**GOOD, "delta": None}], r"steer\[0\].delta=None is not a number"),
    ([{**GOOD, "delta": [8]}], r"steer\[0\].delta=\[8\] is not a number"),
    ([{**GOOD, "mode": "ad"}], r"steer\[0\].mode='ad' is not known: did you mean add\?"),
    ([{**GOOD, "mode": ["add"]}], r"steer\[0\].mode=\['add'\] is not known"),
    ([{**GOOD, "mode": "set"}], r"steer\[0\].delta has no meaning with mode=set: give value"),
    ([{**GOOD, "mode": "ablate"}], r"steer\[0\].delta has no meaning with mode=ablate: leave"),
    (
        [{"neuron": "1:3", "mode": "scale", "factor": 2, "unit": "mean"}],
        r"steer\[0\].unit has no meaning with mode=scale",
    ),
    ([{**GOOD, "unit": "max"}], r"steer\[0\].unit='max' is not known: did you mean maximum\?"),
    ([{**GOOD, "where": "promt"}], r"steer\[0\].where='promt' is not known: did you mean prompt"),
    ([{**GOOD, "before_selection": "yes"}], r"steer\[0\].before_selection='yes' is not known"),
    (
        [{"neuron": "1:3", "mode": "clamp", "minimum": 2, "maximum": 1}],
        r"steer\[0\]: minimum=2.0 is above maximum=1.0",
    ),
    ([{**GOOD, "where": "generated"}], "where=generated changes nothing where nothing is"),
]


@pytest.mark.parametrize(("asked", "message"), MISTAKES)
def test_mistakes_are_named_before_any_work(checkpoint, tmp_path, monkeypatch, asked, message):
    monkeypatch.setattr(Checkpoint, "model", lambda *_: pytest.fail("the model was loaded"))
    args = EvalArgs(ckpt_dir=str(checkpoint), dump_dir=str(tmp_path / "out"), steer=asked)
    with pytest.raises(ConfigError, match=message) as raised:
        launch_eval(args)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_vanilla_model_is_not_steered(checkpoint):
    opened = open_checkpoint(checkpoint)
    opened.model_args.topk = None
    with pytest.raises(ConfigError, match=r"has no TopK layer.*evaluate a TopK model"):
        read_steering([GOOD], opened)


def test_a_delta_that_is_too_large_is_the_deltas_fault(checkpoint, tmp_path):
    asked = [{"neuron": "1:3", "delta": 1e300}]
    with pytest.raises(ConfigError, match=r"steered by 1:3 \+ 1e\+300 the model gives no usable"):
        evaluate(checkpoint, tmp_path / "out", dtype="fp32", steer=asked)


def test_other_errors_of_a_checkpoint_stay_what_they_are(checkpoint, tmp_path, monkeypatch):
    def damaged(*_):
        raise CheckpointError("it is damaged")

    monkeypatch.setattr(Checkpoint, "model", damaged)
    with pytest.raises(CheckpointError, match=r"^it is damaged$"):
        evaluate(checkpoint, tmp_path / "out", steer=[GOOD])


# That nobody takes it for the model's own --------------------------------------------------------


def test_every_file_says_it(turned, plain, neuron):
    expected = {
        "told": f"1:{neuron} + 6",
        "interventions": [
            {
                "kind": "Add", "layer": 1, "neuron": neuron, "delta": 6, "where": "all",
                "before_selection": False,
            }
        ],
        "analysis": None,
    }  # fmt: skip
    results = read(turned / "results.json")
    origins = [
        read(turned / "validation.json")["provenance"], results["provenance"],
        read(turned / "provenance.json"),
    ]  # fmt: skip
    assert [origin["steer"] for origin in origins] == [expected] * 3
    assert results["config"]["model_revision"].endswith(f"[steered: 1:{neuron} + 6]")
    config = OmegaConf.to_container(OmegaConf.load(turned / "config.yaml"))
    assert config["steer"] == [{"neuron": f"1:{neuron}", "delta": 6}]
    assert read(plain / "provenance.json")["steer"] is None


def test_the_lines_of_the_log_say_it(checkpoint, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "apps.topk.eval"):
        evaluate(checkpoint, tmp_path / "steered", steer=[GOOD])
        evaluate(checkpoint, tmp_path / "plain")
    first, second = (line for line in caplog.messages if line.startswith("text: perplexity"))
    assert "documents [steered: 1:3 + 8] (in " in first and "steered" not in second


def test_a_finished_task_is_not_taken_for_one_steered_otherwise(
    checkpoint, task_folder, tmp_path, monkeypatch
):
    asked, original = [], tasks_module._evaluate
    monkeypatch.setattr("apps.topk.eval.forget_work", lambda folder: None)
    monkeypatch.setattr(
        tasks_module, "_evaluate", lambda *a: asked.append(a[2]) or original(*a)
    )  # fmt: skip

    def interrupted(*_):
        raise KeyboardInterrupt

    def stopped_after_the_task(**fields):
        # Nothing but the task's own file is in the folder then.
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("apps.topk.evaluation.results.write_tasks", interrupted)
            evaluate(
                checkpoint, tmp_path / "out", harness=harness(task_folder, "choices"), **fields
            )

    stopped_after_the_task()
    for n_done, steering in enumerate([[GOOD], [{**GOOD, "delta": 9}]], start=2):
        stopped_after_the_task(steer=steering)
        assert len(asked) == n_done
        stopped_after_the_task(steer=steering)  # this one is
        assert len(asked) == n_done


def test_a_folder_holds_one_kind_of_evaluation(checkpoint, turned, plain, neuron):
    before = (turned / "validation.json").read_bytes()
    own = [{"neuron": f"1:{neuron}", "delta": 6}]
    for out, steering, message in (
        (turned, None, rf"the model steered by 1:{neuron} \+ 6: .* for that of the model as it is"),
        (turned, [GOOD], r"give another folder for that of the model steered by 1:3 \+ 8"),
        (plain, own, "holds the evaluation of the model as it is: give another folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluate(checkpoint, out, steer=steering)
    assert (turned / "validation.json").read_bytes() == before
    evaluate(checkpoint, turned, steer=own)  # the same again
    assert read(turned / "validation.json")["text"] == json.loads(before)["text"]


def test_the_records_and_the_place_of_a_run_are_not_for_it(checkpoint, trained, tmp_path):
    with pytest.raises(ConfigError, match=r"metric_log_dir=.* leave one of them out"):
        evaluate(checkpoint, tmp_path / "out", steer=[GOOD], metric_log_dir=str(tmp_path))
    place = trained / "evals" / checkpoint.name
    with pytest.raises(ConfigError, match=r"is the place of the run's own .*0000000020-steered"):
        evaluate(checkpoint, place, steer=[GOOD])
    assert not list(tmp_path.iterdir()) and not place.exists()


def test_training_evaluates_the_model_as_it_is(tmp_path):
    root = write_corpus(tmp_path / "corpus")
    section = {"eval": {"validation": {}, "steer": [GOOD]}}
    args = train_args(root, tmp_path / "run")
    args.eval = section["eval"]
    with pytest.raises(ConfigError, match=r"eval.steer is set, and training evaluates the model"):
        train(args)
    assert not (tmp_path / "run").exists()


# Beside the unsteered one ------------------------------------------------------------------------


def test_the_cost_is_shown_next_to_the_model_as_it_is(plain, turned, neuron, capsys, tmp_path):
    out = tmp_path / "cost.md"
    compare.main([str(plain), str(turned), "--out", str(out)])
    capsys.readouterr()
    text = out.read_text(encoding="utf-8")
    name = f"{read_run(plain).model.name}, steered"
    assert f"| {name} |" in text and f"{name}: the model is steered: 1:{neuron} + 6" in text
    assert "perplexity" in text and f"steered 1:{neuron} + 6, in the twin by nothing" in text
    (line,) = [one for one in text.splitlines() if one.startswith(f"| {name} |")]
    # Every measure with its difference, and over the same documents: none is marked as unpaired.
    assert line.count("<br>") == 4 and "\u2020" not in line
    with open(out.with_suffix(".csv"), encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["steered"] for row in rows} == {"", f"1:{neuron} + 6"}
    (cost,) = (row for row in rows if row["steered"] and row["metric"] == "perplexity")
    before, after = (numbers(one)[0]["perplexity"] for one in (plain, turned))
    assert float(cost["difference"]) == pytest.approx(after / before - 1)
    assert cost["paired"] == "yes" and float(cost["difference_stderr"]) > 0


def test_a_steered_evaluation_alone_has_no_differences(turned, capsys, tmp_path):
    compare.main([str(turned), "--out", str(tmp_path / "t.md")])
    text = (tmp_path / "t.md").read_text(encoding="utf-8")
    assert "no evaluation of its checkpoint without steering was given" in text


def test_a_run_is_never_its_steered_self(plain, turned, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(turned, run / "evals" / "0000000020")
    with pytest.raises(DataError, match="has no evaluation but of steered models"):
        read_run(run)
    shutil.copytree(plain, run / "evals" / "0000000010")
    assert read_run(run).folder.name == "0000000010"
    assert read_run(run).steered == ""


def test_files_of_two_kinds_are_refused(plain, turned, tmp_path):
    shutil.copytree(turned, tmp_path / "both")
    shutil.copy(plain / "validation.json", tmp_path / "both")
    with pytest.raises(DataError, match="are of different interventions"):
        read_run(tmp_path / "both")


@pytest.mark.parametrize("content", [3, "x", [], {"told": 3}, {"told": "a\nb"}])
def test_what_somebody_else_wrote_is_still_told_as_steered(turned, tmp_path, content):
    shutil.copytree(turned, tmp_path / "other")
    for name in ("validation.json", "results.json"):
        found = read(tmp_path / "other" / name)
        found["provenance"]["steer"] = content
        (tmp_path / "other" / name).write_text(json.dumps(found), encoding="utf-8")
    said = read_run(tmp_path / "other").steered
    assert said == ("a b" if content == {"told": "a\nb"} else "something that is not told")


def test_the_help_shows_it_with_every_key(monkeypatch, capsys):
    from apps.topk import eval as program

    monkeypatch.setattr(sys, "argv", [PROGRAM, "--help"])
    with pytest.raises(SystemExit):
        program.main()
    shown = capsys.readouterr().out
    for key in (*steered.KEYS, *steered.MODES, *steered.UNITS):
        assert key in shown
