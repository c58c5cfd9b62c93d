"""The comparison as a Markdown document."""

import re
from typing import TYPE_CHECKING

from apps.topk.cli import one_line
from apps.topk.comparison import shown
from apps.topk.comparison.measures import Measure
from apps.topk.comparison.runs import Run

if TYPE_CHECKING:
    from apps.topk.comparison.table import Comparison

# The first line, by which a file of ours is known.
MARK = "<!-- written by apps.topk.compare: it may be replaced by it -->"

COLUMNS = """\
- **D**, **L**: width and number of blocks. **k**: components of the residual stream that survive. \
**non-TopK layers**: blocks without TopK. **tokens**: that the model was trained on.
- **perplexity**: exp of the mean negative log-likelihood a token, on held-out documents. \
**bits a byte**: the same likelihood by the bytes of the text, whatever the tokenizer.
- **L0**: mean number of neurons that fire for a token in a TopK layer, measured on the held-out \
documents.
- The other columns are tasks of lm-eval, named by task and metric; accuracies in percent, their \
differences in points. \u2191: higher is better, \u2193: lower is.
- **bold**: the best value of a column, where all runs in it were evaluated alike; it may be so by \
chance."""

ERRORS = """\
- Documents and questions are the independent units. A measure is a ratio r = sum(a) / sum(w) over \
its n items (nats by tokens, bits by bytes, correct answers by one each), its standard error \
sqrt(n / (n - 1) sum(e\u00b2)) / sum(w) with e = a - r w (the ratio estimator; of a mean it is \
sd / sqrt(n)).
- A paired difference is that ratio of the items' own differences, a = a(run) - a(twin). Of \
perplexities the logarithms are compared so, and shown as exp(d) - 1 with the error exp(d) se(d).
- An unpaired one has sqrt(se(run)\u00b2 + se(twin)\u00b2). No error stands where it is not \
known, or where the items show no spread at all."""


def document(comparison: "Comparison") -> str:
    """The table, notes, legend, and where each run comes from."""
    parts = [MARK, _table(comparison)]
    if comparison.notes:
        parts.append("Notes:\n\n" + _listed(comparison.notes))
    parts.append("Signs:\n\n" + _listed(shown.legend(comparison)))
    parts.append("Columns:\n\n" + COLUMNS)
    parts.append("Standard errors:\n\n" + ERRORS)
    parts.append("Runs:\n\n" + "\n".join(_origin(comparison, i) for i in range(_n(comparison))))
    return "\n\n".join(parts) + "\n"


def _n(comparison: "Comparison") -> int:
    return len(comparison.runs)


def escape(text: str) -> str:
    """Text from anywhere as one line that Markdown shows as it is, in a table as well."""
    text = re.sub(r"([\\`*\[\]<>|~&$#])", r"\\\1", one_line(text))
    # Within a word, as in lambada_openai, an underscore is no markup.
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)


def _listed(lines: list[str]) -> str:
    return "\n".join(f"- {escape(line)}" for line in lines)


def _table(comparison: "Comparison") -> str:
    heads = [shown.head(run.model) for run in comparison.runs]
    labels = [escape(shown.label(comparison, measure)) for measure in comparison.shown]
    rows = [["run", *heads[0], *labels], ["---", *["---:"] * (len(heads[0]) + len(labels))]]
    for i, run in enumerate(comparison.runs):
        cells = [_cell(comparison, i, measure) for measure in comparison.shown]
        rows.append([escape(run.name), *heads[i].values(), *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(comparison: "Comparison", index: int, measure: Measure) -> str:
    """The value, and below it the difference; both of our own making, but for the marks."""
    text = shown.value(measure, comparison.runs[index].results.get(measure))
    if index in comparison.best(measure):
        text = f"**{text}**"
    below = shown.difference(measure, comparison.differences.get((index, measure)))
    return text + (f"<br>{escape(below)}" if below else "")


def _origin(comparison: "Comparison", index: int) -> str:
    run, twin = comparison.runs[index], comparison.twins[index]
    step = run.model.step
    said = [
        f"run {run.name}: {_kind(run)}",
        f"steered: {run.steered}" if run.steered else "",
        f"twin: {twin.name}" if twin else "",
        f"checkpoint {run.checkpoint or 'unknown'}" + ("" if step is None else f" (step {step})"),
        f"evaluation {run.folder}",
        f"commit {run.commit}",
    ]
    return "- " + escape("; ".join(part for part in said if part))


def _kind(run: Run) -> str:
    topk = run.model.topk
    if topk is None:
        return "vanilla"
    layers = ", ".join(str(layer) for layer in topk.layers)
    return f"TopK k={topk.k}, site {topk.site}, activation {topk.activation}, layers {layers}"
