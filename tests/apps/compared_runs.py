"""Folders as the evaluations leave them, with numbers that a test chooses."""

import json
import math
from pathlib import Path

import numpy as np

SOURCE = "docs"
MODEL = {
    "name": "plain", "dim": 64, "n_layers": 8, "vocab_size": 500, "parameters": 4_213_504,
    "tokens": 1_024_000, "steps": 100, "topk": None,
    "tokenizer": {"name": "sp", "path": "t.model", "sha256": "ab12"},
}  # fmt: skip
TOPK = {
    "k": 16, "n_last_nontopk": 2, "activation": "relu", "site": "residual",
    "layers": [0, 1, 2, 3, 4, 5],
}  # fmt: skip


def provenance(**model) -> dict:
    step = model.pop("step", 100)
    dtype = model.pop("dtype", "fp32")
    return {
        "lingua_topk": "0.1", "commit": "c0ffee", "checkpoint": "dumps/x/checkpoints/0000000100",
        "step": step, "dtype": dtype, "args": {"as_trained": False}, "model": MODEL | model,
    }  # fmt: skip


def write_json(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_validation(
    folder: Path, nll, scored, sizes, with_documents=True, settings=(), source=SOURCE, **model
) -> Path:
    """nll, scored, sizes: of each document, in nats, tokens and bytes."""
    nll, tokens = np.asarray(nll, float), np.asarray(scored)
    mean, n = nll.sum() / tokens.sum(), len(nll)
    residuals = nll - mean * tokens
    error = math.sqrt(n / (n - 1) * (residuals**2).sum()) / tokens.sum() if n > 1 else None
    is_topk = model.get("topk") is not None
    measured = {
        "documents": n, "tokens": int(tokens.sum()), "bytes": int(np.sum(sizes)),
        "nll_per_token": mean, "nll_per_token_stderr": error, "perplexity": math.exp(mean),
        "perplexity_ci95": None, "bits_per_byte": nll.sum() / math.log(2) / np.sum(sizes),
        "nll_per_char": 1.0, "avg_seqlen": tokens.mean(), "window": 64, "context": 32,
        "l0": {"0": 15.5, "1": 16.5} if is_topk else {},
    }  # fmt: skip
    content = {source: measured | dict(settings), "provenance": provenance(**model)}
    write_json(folder / "validation.json", content)
    if with_documents:
        lines = [
            {"source": source, "document": i, "tokens": int(t), "bytes": int(b), "nll": float(x)}
            for i, (x, t, b) in enumerate(zip(nll, tokens, sizes, strict=True))
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "validation_documents.jsonl").write_text(text, encoding="utf-8")
    return folder


def samples(metrics: dict[str, list], answer="none") -> list[dict]:
    n = len(next(iter(metrics.values())))
    return [
        {
            "doc_id": i, "filter": answer, "doc_hash": f"hash{i}", "metrics": list(metrics),
            **{name: values[i] for name, values in metrics.items()},
        }
        for i in range(n)
    ]  # fmt: skip


def write_harness(folder: Path, tasks: dict[str, dict], change=None, **model) -> Path:
    """tasks: by name {"results": {...}, "samples": [...] or absent, "metric_list": ...}.

    change: a function that alters the whole content before it is written.
    """
    content = {
        "results": {
            name: {"alias": name, "name": name, **task["results"]} for name, task in tasks.items()
        },
        "configs": {
            name: {"metric_list": task.get("metric_list", [])} for name, task in tasks.items()
        },
        "versions": {name: 1.0 for name in tasks},
        "n-shot": {name: 0 for name in tasks},
        "n-samples": {
            name: {"original": 9, "effective": len(task.get("samples", range(9)))}
            for name, task in tasks.items()
        },
        "higher_is_better": {},
        "config": {"limit": None},
        "samples": {name: task["samples"] for name, task in tasks.items() if "samples" in task},
        "provenance": provenance(**model),
    }  # fmt: skip
    if change:
        change(content)
    write_json(folder / "results.json", content)
    return folder


def mean_task(values, stderr=0.1, with_samples=True) -> dict:
    task = {
        "results": {"acc,none": float(np.mean(values)), "acc_stderr,none": stderr},
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    return task | ({"samples": samples({"acc": list(values)})} if with_samples else {})


def weighted_task(likelihoods, words) -> dict:
    """word_perplexity as of wikitext, whose config names no aggregation."""
    rate = -np.sum(likelihoods) / np.sum(words)
    pairs = [[float(x), int(w)] for x, w in zip(likelihoods, words, strict=True)]
    return {
        "results": {
            "word_perplexity,none": math.exp(rate), "word_perplexity_stderr,none": "N/A",
            "byte_perplexity,none": 2.0, "bits_per_byte,none": 1.0,
        },
        "metric_list": [{"metric": "word_perplexity"}],
        "samples": samples({"word_perplexity": pairs}),
    }  # fmt: skip
