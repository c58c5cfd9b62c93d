"""Folders of evaluations in, differences and notes out."""

import csv
import io
import json
import math

import numpy as np
import pytest

from apps.topk.comparison import compare
from apps.topk.comparison.measures import HARNESS, L0, VALIDATION, Measure
from apps.topk.train import train
from lingua_topk.errors import ConfigError, DataError
from tests.apps.compared_runs import (
    MODEL,
    SOURCE,
    TOPK,
    mean_task,
    provenance,
    samples,
    weighted_task,
    write_harness,
    write_json,
    write_validation,
)
from tests.apps.tiny import train_args, write_corpus

PERPLEXITY = Measure(VALIDATION, SOURCE, "perplexity")
BITS = Measure(VALIDATION, SOURCE, "bits a byte")
# Three documents: nats of two models, tokens, bytes.
NLL, TWIN_NLL = [44.0, 90.0, 66.0], [40.0, 80.0, 60.0]
TOKENS, SIZES = [10, 20, 20], [40, 80, 100]


def pair(tmp_path, run=(), twin=()):
    """The validation of a TopK run and of its twin, each with changes of its own."""
    here = [{"nll": NLL, "topk": TOPK, "name": "sparse"}, {"nll": TWIN_NLL, "name": "plain"}]
    base = {"scored": TOKENS, "sizes": SIZES}
    return {
        one["name"]: write_validation(tmp_path / one["name"], **base | one | dict(change))
        for one, change in zip(here, (run, twin), strict=True)
    }


def harness_pair(tmp_path, run: dict, twin: dict, **changes):
    folders = {"sparse": tmp_path / "sparse", "plain": tmp_path / "plain"}
    write_harness(folders["sparse"], run, topk=TOPK, **changes)
    write_harness(folders["plain"], twin)
    return folders


def only(comparison):
    """The one measure of a comparison, and its difference in the first run."""
    (measure,) = comparison.measures
    return measure, comparison.differences.get((0, measure))


def rows(comparison) -> list[dict]:
    return list(csv.DictReader(io.StringIO(comparison.csv())))


def test_perplexity_is_compared_document_by_document(tmp_path):
    found = compare(pair(tmp_path)).differences[0, PERPLEXITY]
    # d = (200 - 180) / 50 = 0.4 nats a token; residuals 4 - 4, 10 - 8, 6 - 8.
    stderr = math.sqrt(3 / 2 * 8) / 50
    assert found.is_paired and found.is_relative and found.is_significant
    assert found.estimate == pytest.approx((math.exp(0.4) - 1, math.exp(0.4) * stderr))
    assert found.settings == ""


def test_bits_a_byte_are_compared_document_by_document(tmp_path):
    comparison = compare(pair(tmp_path))
    found = comparison.differences[0, BITS]
    # d = 20 / 220 nats a byte; in bits by ln 2.
    residuals = np.array([4, 10, 6]) - 20 / 220 * np.array(SIZES)
    stderr = math.sqrt(3 / 2 * (residuals**2).sum()) / 220 / math.log(2)
    assert found.is_paired and not found.is_relative
    assert found.estimate == pytest.approx((20 / 220 / math.log(2), stderr))
    # The twin has neither a difference nor a note on it.
    assert all(index == 0 for index, _ in comparison.differences)
    assert comparison.notes == []


def test_the_errors_of_the_values_are_those_of_the_evaluation(tmp_path):
    result = compare(pair(tmp_path)).runs[1].results[PERPLEXITY]
    # r = 3.6; residuals 4, 8, -12.
    stderr = math.sqrt(3 / 2 * 224) / 50
    assert result.estimate == pytest.approx((math.exp(3.6), math.exp(3.6) * stderr))


def test_without_the_documents_errors_are_added_and_marked(tmp_path):
    comparison = compare(pair(tmp_path, twin={"with_documents": False}))
    found = comparison.differences[0, PERPLEXITY]
    run, twin = (one.results[PERPLEXITY].estimate for one in comparison.runs)
    stderr = math.hypot(run.stderr / run.value, twin.stderr / twin.value)
    assert not found.is_paired
    assert found.estimate == pytest.approx((math.exp(0.4) - 1, math.exp(0.4) * stderr))
    # Of bits a byte the twin's file tells no error: none is made up.
    assert comparison.differences[0, BITS].estimate.stderr is None
    assert not comparison.differences[0, BITS].is_significant
    assert "\u2020" in comparison.markdown()
    assert {row["paired"] for row in rows(comparison) if row["difference"]} == {"no"}


def test_a_single_document_has_no_error(tmp_path):
    one = {"scored": [10], "sizes": [40]}
    folders = pair(tmp_path, {"nll": [44.0], **one}, {"nll": [40.0], **one})
    found = compare(folders).differences[0, PERPLEXITY]
    assert found.estimate.stderr is None and not found.is_significant
    assert "+49.2 %" in compare(folders).markdown()


def test_other_tokens_are_compared_by_bytes_alone(tmp_path):
    comparison = compare(pair(tmp_path, run={"scored": [11, 20, 19]}))
    assert (0, PERPLEXITY) not in comparison.differences
    assert comparison.differences[0, BITS].is_paired
    assert any("the tokenizers differ" in note for note in comparison.notes)


def test_other_tokenizers_are_noticed_without_the_documents(tmp_path):
    other = {"tokenizer": {"name": "sp", "path": "t.model", "sha256": "other"}}
    comparison = compare(pair(tmp_path, run={"with_documents": False, **other}))
    assert (0, PERPLEXITY) not in comparison.differences
    assert (0, BITS) in comparison.differences
    assert comparison.best(PERPLEXITY) == set()
    assert comparison.best(BITS) == {1}


def test_documents_of_another_evaluation_are_not_used(tmp_path):
    folders = pair(tmp_path)
    path = folders["sparse"] / "validation_documents.jsonl"
    path.write_text(path.read_text().replace('"nll": 44.0', '"nll": 45.0'))
    comparison = compare(folders)
    assert not comparison.differences[0, PERPLEXITY].is_paired
    assert any("does not add up" in note for note in comparison.notes)


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"settings": {"window": 32}}, "window 32, in the twin 64"),
        ({"settings": {"bos": False}}, "bos False, in the twin not given"),
        ({"settings": {"context": 8}}, "context 8, in the twin 32"),
        ({"dtype": "bf16"}, "dtype bf16, in the twin fp32"),
        ({"nll": NLL[:2], "scored": TOKENS[:2], "sizes": SIZES[:2]}, "documents 2, in the twin 3"),
    ],
)
def test_other_settings_are_noted(tmp_path, change, note):
    comparison = compare(pair(tmp_path, run=change))
    assert any(note in one for one in comparison.notes)
    assert comparison.differences[0, PERPLEXITY].settings
    assert comparison.best(PERPLEXITY) == set()
    assert "\u2021" in comparison.markdown()


def test_accuracies_are_compared_question_by_question(tmp_path):
    folders = harness_pair(
        tmp_path, {"arc": mean_task([1, 1, 0, 1])}, {"arc": mean_task([0, 1, 0, 0])}
    )
    measure, found = only(compare(folders))
    assert measure == Measure(HARNESS, "arc", "acc")
    assert found.is_paired and not found.is_relative
    assert found.estimate == pytest.approx((0.5, math.sqrt(1 / 3) / 2))
    assert "75.0 \u00b1 10.0**<br>+50.0 \u00b1 28.9" in compare(folders).markdown()


def test_word_perplexity_is_compared_on_the_log_scale(tmp_path):
    words = [3, 6]
    folders = harness_pair(
        tmp_path,
        {"wikitext": weighted_task([-10, -20], words)},
        {"wikitext": weighted_task([-9, -18], words)},
    )
    comparison = compare(folders)
    measure, found = only(comparison)  # what repeats the same likelihood is left out
    assert measure.metric == "word_perplexity"
    assert found.is_paired and found.estimate.value == pytest.approx(math.exp(3 / 9) - 1)
    # Both documents give 1/3 nats a word more: no spread, hence no error.
    assert found.estimate.stderr is None
    # lm-eval has none of its own ("N/A"); r = 30 / 9, residuals 0.
    assert comparison.runs[0].results[measure].estimate.stderr is None


def test_the_error_that_lm_eval_does_not_give_comes_from_its_samples(tmp_path):
    folder = write_harness(tmp_path / "x", {"wikitext": weighted_task([-10, -14], [4, 4])})
    comparison = compare({"x": folder})
    estimate = comparison.runs[0].results[comparison.measures[0]].estimate
    # r = 3, residuals -2 and 2, sqrt(2 * 8) / 8 = 1/2.
    assert estimate == pytest.approx((math.exp(3), math.exp(3) / 2))


def test_perplexity_by_the_mean_log_likelihood(tmp_path):
    def task(values):
        return {
            "results": {"perplexity,none": math.exp(-np.mean(values)), "perplexity_stderr,none": 1},
            "metric_list": [{"metric": "perplexity", "aggregation": "perplexity"}],
            "samples": samples({"perplexity": values}),
        }

    folders = harness_pair(tmp_path, {"l": task([-2.0, -4.0])}, {"l": task([-1.0, -2.0])})
    _, found = only(compare(folders))
    # Differences 1 and 2 nats: 1.5 +- 0.5.
    assert found.estimate == pytest.approx((math.exp(1.5) - 1, math.exp(1.5) * 0.5))


def test_bits_per_byte_of_lm_eval_are_differences_in_bits(tmp_path):
    def task(values):
        pairs = [[x * math.log(2), 2] for x in values]
        return {
            "results": {"bits_per_byte,none": -sum(values) / 4, "bits_per_byte_stderr,none": "N/A"},
            "samples": samples({"bits_per_byte": pairs}),
        }

    folders = harness_pair(tmp_path, {"b": task([-4.0, -6.0])}, {"b": task([-3.0, -3.0])})
    _, found = only(compare(folders))
    # d = 4 / 4 = 1 bit a byte; residuals 1 - 2 and 3 - 2; sqrt(2 * 2) / 4.
    assert found.estimate == pytest.approx((1.0, 0.5)) and not found.is_relative


def test_without_samples_errors_are_added(tmp_path):
    folders = harness_pair(
        tmp_path,
        {"arc": mean_task([1, 1, 0, 1], 0.3, with_samples=False)},
        {"arc": mean_task([0, 1, 0, 0], 0.4)},
    )
    _, found = only(compare(folders))
    assert not found.is_paired and found.estimate == pytest.approx((0.5, 0.5))


def test_other_questions_are_not_paired(tmp_path):
    def other(content):
        content["samples"]["arc"][0]["doc_hash"] = "another"

    tasks = [{"arc": mean_task([1, 0, 0, 1])} for _ in range(2)]
    _, found = only(compare(harness_pair(tmp_path, *tasks, change=other)))
    assert not found.is_paired


def test_samples_that_do_not_give_the_value_are_not_used(tmp_path):
    task = mean_task([1, 0, 0, 1])
    task["results"]["acc,none"] = 0.9  # as by an aggregation that is not known here
    _, found = only(compare(harness_pair(tmp_path, {"arc": task}, {"arc": mean_task([1, 0, 1])})))
    assert not found.is_paired


def test_an_unknown_error_of_lm_eval_is_none(tmp_path):
    task = mean_task([1, 0], "N/A", with_samples=False)
    comparison = compare(harness_pair(tmp_path, {"arc": task}, {"arc": task}))
    _, found = only(comparison)
    assert found.estimate == (0.0, None)
    assert "50.0<br>+0.0 \u2020" in comparison.markdown()


def test_other_settings_of_a_task_are_noted(tmp_path):
    def other(content):
        content["n-shot"]["arc"] = 5
        content["versions"]["arc"] = 2.0
        content["config"]["limit"] = 10

    task = {"arc": mean_task([1, 0, 0, 1])}
    comparison = compare(harness_pair(tmp_path, task, task, change=other))
    (note,) = comparison.notes
    for part in ("task version 2.0, in the twin 1.0", "num_fewshot 5, in the twin 0", "limit 10"):
        assert part in note


def test_a_group_is_compared_by_the_questions_of_its_tasks(tmp_path):
    def group(content):
        content["results"]["both"] = {"acc,none": 0.6, "acc_stderr,none": 0.2, "sample_len": 5}
        content["groups"] = {"both": content["results"]["both"]}
        content["group_subtasks"] = {"both": ["a", "b"]}

    tasks = {"a": mean_task([1, 0, 1]), "b": mean_task([1, 0])}
    folder = write_harness(tmp_path / "x", tasks, group)
    comparison = compare({"x": folder, "y": write_harness(tmp_path / "y", tasks, group)}, "x")
    assert [one.task for one in comparison.shown] == ["both"]
    assert comparison.differences[1, comparison.shown[0]].is_paired
    assert {row["task"] for row in rows(comparison)} == {"a", "b", "both"}
    assert any("in the CSV only" in note for note in comparison.notes)


def test_the_order_of_the_columns(tmp_path):
    folder = tmp_path / "x"
    tasks = {name: mean_task([1, 0]) for name in ("zebra", "hellaswag", "winogrande")}
    write_harness(folder, tasks | {"wikitext": weighted_task([-1, -2], [1, 1])}, topk=TOPK)
    write_validation(folder, NLL, TOKENS, SIZES, topk=TOPK)
    names = [one.task or one.metric for one in compare({"x": folder}).measures]
    assert names == [SOURCE, SOURCE, "L0", "wikitext", "winogrande", "hellaswag", "zebra"]


def test_l0_is_the_mean_over_layers_and_tokens(tmp_path):
    folder = write_validation(tmp_path / "x", NLL, TOKENS, SIZES, topk=TOPK)
    content = json.loads((folder / "validation.json").read_text())
    # 50 tokens at (15.5 + 16.5) / 2 and 150 at 20.
    content["other"] = content[SOURCE] | {"tokens": 150, "l0": {"0": 20.0}}
    write_json(folder / "validation.json", content)
    assert compare({"x": folder}).runs[0].results[L0].estimate == (19.0, None)


def test_the_newest_evaluation_of_a_run_is_taken(tmp_path):
    for step in ("0000000100", "0000000090"):
        write_validation(tmp_path / "evals" / step, NLL, TOKENS, SIZES)
    (tmp_path / "evals" / "0000000110").mkdir()
    write_validation(tmp_path / "evals" / "again", NLL, TOKENS, SIZES)
    assert compare({"x": tmp_path}).runs[0].folder.name == "0000000100"


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ({"dim": 128}, "plain has D 64, not 128"),
        ({"n_layers": 9}, "L 8, not 9"),
        ({"vocab_size": 7}, "vocabulary 500, not 7"),
        ({"parameters": 7}, "parameters 4213504, not 7"),
        ({"tokens": 7}, "tokens trained 1024000, not 7"),
        ({"steps": 7}, "steps planned 100, not 7"),
        ({"step": 7}, "step evaluated 100, not 7"),
    ],
)
def test_another_model_is_no_twin(tmp_path, model, reason):
    comparison = compare(pair(tmp_path, run=model))
    assert comparison.differences == {}
    (note,) = comparison.notes
    assert note.startswith("sparse: no differences, since no vanilla run fits") and reason in note
    forced = compare(pair(tmp_path, run=model), twin="plain")
    assert forced.differences
    assert any("not a twin of plain in all but TopK" in note for note in forced.notes)


def test_one_of_several_twins_must_be_chosen(tmp_path):
    folders = pair(tmp_path)
    folders["second"] = write_validation(tmp_path / "second", NLL, TOKENS, SIZES)
    comparison = compare(folders)
    assert comparison.differences == {}
    assert "several vanilla runs fit (plain, second): --twin NAME" in comparison.notes[0]
    chosen = compare(folders, "second")
    assert {index for index, _ in chosen.differences} == {0, 1}
    with pytest.raises(ConfigError, match="--twin='third' is none of the runs: choose one of"):
        compare(folders, "third")


def test_a_single_run_has_no_differences(tmp_path):
    comparison = compare({"sparse": pair(tmp_path)["sparse"]})
    assert comparison.differences == {}
    assert comparison.notes == [
        "sparse: no differences, since no vanilla run was given to compare it with"
    ]
    assert "**" not in comparison.markdown().split("Notes:")[0]


def test_what_only_one_run_was_measured_by_has_a_dash_and_a_note(tmp_path):
    folders = pair(tmp_path)
    write_harness(folders["sparse"], {"arc": mean_task([1, 0])}, topk=TOPK, name="sparse")
    comparison = compare(folders)
    assert "sparse: arc acc %: not measured for plain" in comparison.notes
    assert comparison.markdown().split("\n")[5].endswith("| \u2013 |")


def test_a_value_that_is_no_number_is_left_out_and_said(tmp_path):
    task = mean_task([1, 0])
    task["results"]["f1,none"] = float("nan")
    comparison = compare({"x": write_harness(tmp_path / "x", {"arc": task})})
    assert comparison.notes == ["x: arc f1 is no finite number and is left out"]


def test_files_of_two_checkpoints_are_refused(tmp_path):
    write_validation(tmp_path, NLL, TOKENS, SIZES, topk=TOPK)
    write_harness(tmp_path, {"arc": mean_task([1, 0])}, topk=TOPK, step=90)
    with pytest.raises(DataError, match="are of different checkpoints"):
        compare({"x": tmp_path})


def test_an_older_evaluation_asks_its_checkpoint(tmp_path):
    root = write_corpus(tmp_path / "data")
    train(train_args(root, tmp_path / "run", "steps=2", "name=older"))
    folder = write_validation(tmp_path / "x", NLL, TOKENS, SIZES)
    content = json.loads((folder / "validation.json").read_text())
    del content["provenance"]["model"]
    content["provenance"]["checkpoint"] = str(tmp_path / "run" / "checkpoints" / "0000000002")
    write_json(folder / "validation.json", content)
    model = compare({"x": folder}).runs[0].model
    assert (model.name, model.dim, model.n_layers, model.step) == ("older", 32, 3, 2)
    assert model.topk.k == 4 and model.n_nontopk_layers == 1 and model.parameters > 0

    content["provenance"]["checkpoint"] = str(tmp_path / "gone")
    write_json(folder / "validation.json", content)
    with pytest.raises(DataError, match="does not describe the model, and its checkpoint"):
        compare({"x": folder})


def test_the_csv_has_every_number_in_full(tmp_path):
    comparison = compare(pair(tmp_path))
    first = rows(comparison)[0]
    found = comparison.differences[0, PERPLEXITY].estimate
    assert float(first["value"]) == comparison.runs[0].results[PERPLEXITY].estimate.value
    assert float(first["difference"]) == found.value
    assert float(first["difference_stderr"]) == found.stderr
    told = {name: first[name] for name in ("twin", "paired", "difference_kind", "items", "k")}
    assert told == {
        "twin": "plain", "paired": "yes", "difference_kind": "relative", "items": "3", "k": "16",
    }  # fmt: skip
    assert first["parameters"] == str(MODEL["parameters"])
    assert first["commit"] == provenance()["commit"]
