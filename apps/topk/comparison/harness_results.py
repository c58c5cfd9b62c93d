"""What lm-eval gave: the dictionary of `lm_eval.simple_evaluate` in results.json."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from apps.topk.comparison.estimates import Estimate, Items, usable_stderr
from apps.topk.comparison.fields import Fields, as_number
from apps.topk.comparison.measures import HARNESS, NO_FILTER, Measure, Result, reproduced
from apps.topk.evaluation.results import PROVENANCE, steering_told

# The task and what lm-eval logged of one of its documents.
Sample = tuple[str, dict[str, Any]]
STDERR = "_stderr"
# The answer of lm-eval's "bypass": nothing was measured.
BYPASS = "bypass"
# What lm-eval aggregates by where a task does not say; any other metric by its mean.
AGGREGATIONS = {
    "perplexity": "perplexity",
    "word_perplexity": "weighted_perplexity",
    "byte_perplexity": "weighted_perplexity",
    "bits_per_byte": "bits_per_byte",
}
LOG_SCALE = ("perplexity", "weighted_perplexity")
LOWER_IS_BETTER = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier")
# The same likelihood as word_perplexity, counted by other units.
REPEATED = {"word_perplexity": ("byte_perplexity", "bits_per_byte")}
# Of a task's config, what makes it another test.
TASK_KEYS = (
    "dataset_path", "dataset_name", "test_split", "validation_split", "doc_to_text",
    "doc_to_target", "doc_to_choice", "description", "target_delimiter", "fewshot_delimiter",
)  # fmt: skip
RUN_KEYS = ("limit", "fewshot_seed", "gen_kwargs")
TOP_KEYS = ("lm_eval_version", "max_length", "system_instruction_sha", "chat_template_sha")


def read_harness(content: Fields) -> tuple[dict[Measure, Result], list[str]]:
    """The measures in results.json by lm-eval's order, and notes on what was left out."""
    results: dict[Measure, Result] = {}
    notes: list[str] = []
    tasks = content.section("results")
    for task in tasks.content:
        reported = tasks.section(task)
        settings = _settings(content, task)
        samples = _samples(content, task)
        for metric, by_filter in _shown_metrics(reported):
            measure = Measure(HARNESS, task, metric, by_filter)
            value = as_number(reported.content[f"{metric},{by_filter}"])
            if value is None:
                notes.append(f"{measure.label} is no finite number and is left out")
                continue
            results[measure] = _result(content, measure, value, samples, settings)
    return results, notes


def members_of_groups(content: Fields) -> set[str]:
    """The tasks and groups that are part of a group that has measures itself."""
    children = content.section("group_subtasks").content
    found: set[str] = set()
    for group in content.section("groups").content:
        names = children.get(group)
        found |= {str(name) for name in names} if isinstance(names, list) else set()
    return found


def _shown_metrics(reported: Fields) -> Iterator[tuple[str, str]]:
    """Metric and filter of what a task reports, each measure of it once."""
    found = [tuple(key.split(",", 1)) for key in reported.content if "," in key]
    names = {metric for metric, _ in found}
    repeated = {other for name in names for other in REPEATED.get(name, ())}
    for metric, by_filter in found:
        if not metric.endswith(STDERR) and metric != BYPASS and metric not in repeated:
            yield metric, by_filter


def _result(
    content: Fields, measure: Measure, value: float, samples: list[Sample], settings: dict[str, Any]
) -> Result:
    listed = _listed_metric(content, measure)
    aggregation = listed.text("aggregation") or AGGREGATIONS.get(measure.metric, "mean")
    is_log = aggregation in LOG_SCALE and value > 0
    items = _items(samples, measure, aggregation)
    again = reproduced(items, value, is_log)
    reported = content.section("results").section(measure.task)
    error = usable_stderr(reported.content.get(f"{measure.metric}{STDERR},{measure.filter}"))
    if error is None and again is not None:
        error = again.stderr
    return Result(
        Estimate(value, error),
        better=_better(content, measure, listed),
        is_log=is_log,
        n=settings["documents"],
        items=items if again else None,
        settings=settings,
    )


def _listed_metric(content: Fields, measure: Measure) -> Fields:
    """What the task's config says of a metric, empty for a group."""
    config = content.section("configs").section(measure.task)
    metrics = config.content.get("metric_list")
    for one in metrics if isinstance(metrics, list) else []:
        if isinstance(one, dict) and one.get("metric") == measure.metric:
            return Fields(one, config.place)
    return Fields({}, config.place)


def _better(content: Fields, measure: Measure, listed: Fields) -> int:
    told = content.section("higher_is_better").section(measure.task).content.get(measure.metric)
    told = listed.content.get("higher_is_better") if told is None else told
    if isinstance(told, bool):
        return 1 if told else -1
    if measure.metric.startswith(LOWER_IS_BETTER):
        return -1
    return 1 if measure.is_share else 0


def _settings(content: Fields, task: str) -> dict[str, Any]:
    origin, run = content.section(PROVENANCE), content.section("config")
    config = content.section("configs").section(task)
    counted = content.section("n-samples").section(task).content.get("effective")
    if counted is None:  # a group
        counted = content.section("results").section(task).content.get("sample_len")
    told = {
        "documents": counted if isinstance(counted, int) else None,
        "task version": content.section("versions").content.get(task),
        "num_fewshot": content.section("n-shot").content.get(task),
        "dtype": origin.text("dtype"),
        "bos": origin.content.get("bos"),
        "as_trained": bool(origin.section("args").content.get("as_trained", False)),
        "steered": steering_told(origin.content.get("steer")) or "by nothing",
    }
    told |= {key: run.content.get(key) for key in RUN_KEYS}
    told |= {key: content.content.get(key) for key in TOP_KEYS}
    told |= {key: config.content.get(key) for key in TASK_KEYS}
    # A function is written with its address, which differs between any two processes.
    return {key: value for key, value in told.items() if " at 0x" not in str(value)}


def _samples(content: Fields, task: str) -> list[Sample]:
    """The samples of a task with their tasks, of a group those of all that it is made of."""
    listed = content.section("samples").content
    children = content.section("group_subtasks").content
    found: list[Sample] = []
    seen: set[str] = set()
    rest = [task]
    while rest:
        name = rest.pop(0)
        if name in seen:
            continue
        seen.add(name)
        own, parts = listed.get(name), children.get(name)
        found += [(name, one) for one in own if isinstance(one, dict)] if _is_list(own) else []
        rest += [part for part in parts if isinstance(part, str)] if _is_list(parts) else []
    return found


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _items(samples: list[Sample], measure: Measure, aggregation: str) -> Items | None:
    """An item a document; None where they are not there, or not of a form that is known.

    For a group these are the items of all its tasks together, which is right where it weighs
    tasks by their size; `reproduced` tells.
    """
    read = _READERS.get(aggregation)
    found: dict[tuple[str, int], tuple[str, tuple[float, float]]] = {}
    for task, sample in samples:
        if sample.get("filter", NO_FILTER) != measure.filter:
            continue
        if measure.metric not in sample:  # lm-eval lets a document say nothing of a metric
            continue
        document, told = sample.get("doc_id"), sample.get("doc_hash")
        pair = read(sample[measure.metric]) if read else None
        known = isinstance(document, int) and isinstance(told, str)
        if pair is None or not known or (task, document) in found:
            return None
        found[task, document] = (told, pair)
    if not found:
        return None
    order = sorted(found)
    return Items(
        ids=tuple((document, found[document][0]) for document in order),
        amounts=np.array([found[document][1][0] for document in order]),
        weights=np.array([found[document][1][1] for document in order]),
    )


def _one(value: Any, unit: float) -> tuple[float, float] | None:
    number = as_number(value)
    return None if number is None else (number / unit, 1.0)


def _weighted(value: Any, unit: float) -> tuple[float, float] | None:
    if not isinstance(value, list | tuple) or len(value) != 2:
        return None
    amount, weight = as_number(value[0]), as_number(value[1])
    return None if amount is None or weight is None else (amount / unit, weight)


# Amount and weight of an item by the aggregation (lm_eval/api/metrics.py):
#   mean: sum(x) / n;  perplexity: exp(-sum(ll) / n);  weighted_perplexity: exp(-sum(ll) / sum(w));
#   bits_per_byte: -sum(ll) / sum(w) / ln 2
_READERS: dict[str, Callable[[Any], tuple[float, float] | None]] = {
    "mean": lambda value: _one(value, 1.0),
    "perplexity": lambda value: _one(value, -1.0),
    "weighted_perplexity": lambda value: _weighted(value, -1.0),
    "bits_per_byte": lambda value: _weighted(value, -math.log(2)),
}
