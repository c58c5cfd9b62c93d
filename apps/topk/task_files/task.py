"""A task of lm-evaluation-harness: its items, and the config by which the harness reads them.

A config names fields of the items and holds no template, so the harness gives what is in a
field to the model as it is: braces, brackets and line ends mean nothing to it.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VERSION = 1.0
# How a metric is aggregated, and whether more of it is better.
METRICS = {
    "acc": ("mean", True),
    "acc_norm": ("mean", True),
    "perplexity": ("perplexity", False),
    "word_perplexity": ("weighted_perplexity", False),
    "byte_perplexity": ("weighted_perplexity", False),
    "bits_per_byte": ("bits_per_byte", False),
}
# A column of nothing but these becomes one of timestamps in the harness's reader of JSON.
_DATE = re.compile(r"\s*\d{4}-\d{1,2}-\d{1,2}([ T].*)?", re.DOTALL)


@dataclass(frozen=True)
class Task:
    """`items` have the same fields each; `prompt` is what the config says of those fields."""

    name: str
    output_type: str
    prompt: dict[str, str]
    metrics: tuple[str, ...]
    items: list[dict[str, Any]]

    def config(self, items_file: Path) -> dict[str, Any]:
        """The harness's config of this task, with its items in `items_file`."""
        return {
            "task": self.name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(items_file)}},
            "output_type": self.output_type,
            "test_split": "test",
            # Said, so that the harness leaves out the item itself where it gives examples.
            "fewshot_split": "test",
            **self.prompt,
            "metric_list": [
                {
                    "metric": metric,
                    "aggregation": METRICS[metric][0],
                    "higher_is_better": METRICS[metric][1],
                }
                for metric in self.metrics
            ],
            "metadata": {"version": VERSION},
        }

    def field_of_dates(self) -> str | None:
        """A field whose texts all look like dates, so that they would not be read as text."""
        for field in self.items[0]:
            values = [value for item in self.items for value in _texts(item[field])]
            if values and all(_DATE.fullmatch(value) for value in values):
                return field
        return None


def choice_task(name: str, items: list[dict[str, Any]]) -> Task:
    """Which of several continuations is most likely.

    An item is {"query": text, "choices": texts, "gold": index of the right one}.
    """
    prompt = {"doc_to_text": "query", "doc_to_target": "gold", "doc_to_choice": "choices"}
    return Task(name, "multiple_choice", prompt, ("acc", "acc_norm"), items)


def rolling_task(name: str, texts: list[str]) -> Task:
    """How likely whole documents are."""
    prompt = {"doc_to_text": "", "doc_to_target": "text"}
    metrics = ("word_perplexity", "byte_perplexity", "bits_per_byte")
    items = [{"text": text} for text in texts]
    return Task(name, "loglikelihood_rolling", prompt, metrics, items)


def last_word_task(name: str, items: list[dict[str, Any]]) -> Task:
    """How likely the last word is; an item is {"context": text, "word": a space and the word}."""
    # No delimiter: it would come before the space of `word` in few-shot examples.
    prompt = {"doc_to_text": "context", "doc_to_target": "word", "target_delimiter": ""}
    return Task(name, "loglikelihood", prompt, ("perplexity", "acc"), items)


def _texts(value: Any) -> list[str]:
    return [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)]
