"""The comparison of neurons in words, as Markdown and as tables for a terminal."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from apps.topk.cli import one_line
from apps.topk.comparison.markdown import escape
from apps.topk.neurons.folder import MODEL, RANDOM, TWIN

MARK = "<!-- written by apps.topk.analyze: it may be replaced by it -->"
CAPTION = (
    "Token entropy, semantic entropy and MonoScore over layers: medians of the neurons, with bars"
    " from the lower to the upper quartile, of the model, its twin and the controls"
)
SHUFFLED = "shuffled"
TITLES = {MODEL: "model", TWIN: "twin", RANDOM: "random weights", SHUFFLED: "shuffled"}
# As the last word of "than ...".
AGAINST = {TWIN: "the twin", RANDOM: "random weights", SHUFFLED: "their own shuffle"}
POOLED = "TopK layers together"
NONE = "\u2013"


class Measure(NamedTuple):
    """How a measure is written, with at least `digits` decimals.

    `hoped` is what would speak for neurons of one meaning.
    """

    title: str
    unit: str
    digits: int
    hoped: str


MEASURES = {
    "token_entropy": Measure("token entropy", " bits", 2, "lower"),
    "token_entropy_count": Measure("token entropy by count", " bits", 2, "lower"),
    "semantic_entropy": Measure("semantic entropy", " bits", 2, "lower"),
    "mono_score": Measure("MonoScore", "", 3, "higher"),
    "firing_rate": Measure("firing rate", "", 4, ""),
}
OTHER = {"lower": "higher", "higher": "lower"}

LEGEND = """\
- **model**: the checkpoint that was analysed. **twin**: the vanilla model that was trained alike, \
without TopK, the same layers of it. **random weights**: the model's architecture before any \
training. **shuffled**: the model's own values, put at places of the text drawn at random; how \
often and how strongly a neuron fires stays, what it fires on is lost.
- **token entropy**: over how many tokens of the vocabulary a neuron's |value| spreads, in bits: \
0 for one token, log2 n for n tokens evenly. **by count**: the same of how often it fires. \
**semantic entropy**: how much the cosine similarities differ among the pairs of words on which \
it fires most, in bits; low where all pairs are alike to the same degree, which words at random \
can be. **MonoScore**: how alike they are, weighted by its values; higher means more alike. \
**firing rate**: share of the tokens on which it fires, of all neurons, dead ones too.
- **scored, dead, too few**: neurons with a value; neurons that never fired; neurons that fired \
and have none, such as those with too few words for a semantic entropy.
- **median (quartiles)**: of the scored neurons.
- **difference of medians**: the model's median less the twin's, of all scored neurons. \
**Cliff's delta**: the chance that a neuron of the model is above one of the twin, less the \
chance that it is below: -1 all below, 0 neither, +1 all above. Neither is corrected for how often \
neurons fire.
- **matched**: a neuron of the model and a neuron of the other in the same layer that fire about \
as often, each in one pair at most. **pairs**: how many there are. **left over**: scored neurons \
of the model and of the other without a partner, about which the matched numbers say nothing. \
**rate ratio**: median over the pairs of the model's firing rate by the other's; 1 where the \
matching is even. Against the shuffle each neuron is paired with itself.
- **median of differences**: over the pairs, the model's value less the other's. **lower**, \
**higher**: share of the pairs in which the model's value is."""


def conclusion(content: Mapping[str, Any]) -> list[str]:
    """What the numbers say, a sentence or two each; nothing here is known beforehand."""
    if content["pooled"] is None:
        return ["The model has no TopK layer among those measured: nothing is concluded."]
    found = []
    if TWIN in content["parts"]:
        found += [
            _matched_line(content, "token_entropy", TWIN),
            _matched_line(content, "semantic_entropy", TWIN),
            _matched_line(content, "mono_score", TWIN),
            _unmatched_line(content, "token_entropy"),
            *_untrained_line(content),
        ]
    else:
        found.append("No twin was measured: the model is compared with the controls alone.")
    if RANDOM in content["parts"]:
        found.append(_matched_line(content, "token_entropy", RANDOM))
    found.append(_matched_line(content, "token_entropy", SHUFFLED))
    found.append(_semantic_control(content))
    found.append(_matched_line(content, "mono_score", SHUFFLED))
    if content["vectors"]:
        found.append(f"Vectors of words: {one_line(content['vectors'])}.")
    found.append(_firing_line(content))
    return found


def document(content: Mapping[str, Any]) -> str:
    """Markdown: conclusion, figure, a pair of tables a measure, legend."""
    parts = [MARK, "# Neurons compared", _listed(content["conclusion"])]
    parts.append(f"![{CAPTION}](entropy.svg)")
    for measure, about in MEASURES.items():
        parts.append(f"## {_sentence(about.title)}{_in_unit(about)}")
        parts += [_markdown(*rows) for rows in _measure_tables(content, measure)]
    parts += ["## What the columns are", f"{LEGEND}\n{_listed(_method(content))}"]
    return "\n\n".join(parts) + "\n"


def tables(content: Mapping[str, Any], *, every_layer: bool = False) -> list[Table]:
    """For a terminal: the TopK layers together, and each layer too where that is asked for.

    Without a TopK layer every layer is shown. What the numbers say stands below the last.
    """
    every_layer = every_layer or content["pooled"] is None
    rows = [row for row in _rows(content) if every_layer or row[0] == POOLED]
    found = [_populations_table(content, rows)]
    if TWIN in content["parts"]:
        found.append(_against_table(rows))
    found.append(_matched_table(rows))
    found[-1].caption = Text("\n".join(content["conclusion"]))
    return found


# Sentences ---------------------------------------------------------------------------------


def _matched_line(content: Mapping[str, Any], measure: str, other: str) -> str:
    """What the pairs say, as far as the interval of the layers together is off 0."""
    about, hoped = MEASURES[measure], MEASURES[measure].hoped
    how = "" if other == SHUFFLED else "at matched firing rate, "
    found = content["pooled"]["measures"][measure]["matched"][other]
    if found is None or found["median_difference"] is None:
        why = "not measured" if found is None else found["reason"]
        return _sentence(f"{how}{about.title} against {AGAINST[other]}: no number, {why}.")
    side = _side(found["median_difference"])
    than = f"{about.title} than {AGAINST[other]}"
    numbers = (
        f"median difference {_interval(about, found['median_difference'], about.unit)},"
        f" {found[f'share_{side or hoped}']:.0%} of {found['pairs']} pairs {side or hoped}"
    )
    where = _in_layers(content, measure, other, side or hoped)
    together = ", all taken together though in none alone"
    if side == hoped:
        return _sentence(f"{how}TopK layers have {hoped} {than}{where or together}: {numbers}.")
    if side:
        return _sentence(
            f"{how}TopK layers do not have {hoped} but {side} {than}{where or together}: {numbers}."
        )
    return _sentence(
        f"{how}TopK layers taken together have not been found to have {hoped} {than}: {numbers};"
        f" the interval includes 0 (it lies on that side{where or ' in no layer'})."
    )


def _untrained_line(content: Mapping[str, Any]) -> list[str]:
    """How much of the difference to the twin is there without any training."""
    found = content.get("untrained")
    if found is None or found["median_difference"] is None:
        return []
    about = MEASURES["token_entropy"]
    return [
        "Of the same two architectures with random weights, at matched firing rate, the one with"
        f" TopK differs from the one without by"
        f" {_interval(about, found['median_difference'], about.unit)} of token entropy: so much is"
        " there before any training."
    ]


def _semantic_control(content: Mapping[str, Any]) -> str:
    """Semantic entropy against the shuffle, and what it means where words at random have less."""
    line = _matched_line(content, "semantic_entropy", SHUFFLED)
    found = content["pooled"]["measures"]["semantic_entropy"]["matched"][SHUFFLED]
    if found is None or found["median_difference"] is None:
        return line
    if _side(found["median_difference"]) != "higher":
        return line
    return (
        f"{line} So words at random have the lowest here: their similarities all lie close to one"
        " another. A low semantic entropy does not show words of one meaning."
    )


def _in_layers(content: Mapping[str, Any], measure: str, other: str, side: str) -> str:
    """In how many TopK layers the interval lies wholly on that side of 0; "" for none."""
    layers = [one for one in content["layers"] if one["is_topk"]]
    found = [one["measures"][measure]["matched"][other] for one in layers]
    estimates = [one["median_difference"] for one in found if one is not None]
    n = sum(one is not None and _side(one) == side for one in estimates)
    return f" in {n} of {len(layers)} layer{'' if len(layers) == 1 else 's'}" if n else ""


def _side(estimate: Mapping[str, float]) -> str:
    """Where the whole interval lies: lower or higher than 0, "" for neither."""
    if estimate["high"] < 0:
        return "lower"
    return "higher" if estimate["low"] > 0 else ""


def _unmatched_line(content: Mapping[str, Any], measure: str) -> str:
    about = MEASURES[measure]
    found = content["pooled"]["measures"][measure]["against_twin"]
    if found is None or found["median_difference"] is None:
        why = "not measured" if found is None else found["reason"]
        return f"Whatever the firing rate, {about.title} against the twin: no number, {why}."
    return (
        f"Whatever the firing rate, the medians of {about.title} differ from the twin's by"
        f" {_interval(about, found['median_difference'], about.unit)}; Cliff's delta"
        f" {_delta(found['cliffs_delta'])}."
    )


def _firing_line(content: Mapping[str, Any]) -> str:
    measures = content["pooled"]["measures"]
    populations = measures["firing_rate"]["populations"]
    said = [
        f"{populations[name]['dead']} of {populations[name]['neurons']} neurons of the"
        f" {TITLES[name]} never fired and the median fires on {_percent(populations[name])}"
        for name in (MODEL, TWIN)
        if populations[name]
    ]
    matched = measures["token_entropy"]["matched"][TWIN]
    if matched is not None:
        n = matched["pairs"] + matched["unmatched_model"]
        said.append(f"{matched['pairs']} of {n} scored neurons of the model have a matched partner")
    return f"On {content['n_tokens']} tokens, in TopK layers: {'; '.join(said)}."


def _percent(population: Mapping[str, Any]) -> str:
    median = population["median"]
    return NONE if median is None else f"{100 * median:.3g}% of the tokens"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _method(content: Mapping[str, Any]) -> list[str]:
    kept = {one: None for layer in content["layers"] for one in _kept(layer)}
    return [
        f"[low, high]: a {content['interval']:.0%} bootstrap interval (percentile,"
        f" {content['resamples']} resamples, seed {content['seed']}): neurons, or pairs, drawn"
        " again with replacement, an index with all its layers. It is over neurons, not over"
        " training seeds: it says what other neurons of these models would have given, not what"
        " other runs of training would. No"
        f" interval is given for fewer than {content['min_items']}.",
        f"Matching: nearest in log firing rate first, within a factor of {content['caliper']},"
        " without replacement, within a layer, among neurons that have a value.",
        f"Values that were recorded: {'; '.join(kept)}.",
    ]


def _kept(layer: Mapping[str, Any]) -> Iterator[str]:
    for name, kept in layer["kept"].items():
        if name == TWIN:
            where = f"where the model has {'' if layer['is_topk'] else 'no '}TopK"
        else:
            where = f"layers with{'' if layer['is_topk'] else 'out'} TopK"
        yield f"{TITLES[name]}, {where}: {kept}"


def _has_topk(layer: Mapping[str, Any], name: str) -> bool:
    return layer["is_topk"] and name != TWIN


# Cells -------------------------------------------------------------------------------------


def _rows(content: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """A label and the measures, for each layer and for the TopK layers together."""
    rows = [
        (f"layer {one['layer']}{'' if one['is_topk'] else ' (no TopK)'}", one["measures"])
        for one in content["layers"]
    ]
    if content["pooled"] is not None:
        rows.append((POOLED, content["pooled"]["measures"]))
    return rows


def _population_cells(about: Measure, population: Mapping[str, Any] | None) -> tuple[str, str]:
    """Median with quartiles, and how many neurons are scored, dead, and too few."""
    if population is None:
        return NONE, NONE
    counts = f"{population['scored']}, {population['dead']}, {population['too_few']}"
    if population["median"] is None:
        return NONE, counts
    low, high = population["quartiles"]
    digits = about.digits
    return f"{population['median']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})", counts


def _against_cells(about: Measure, found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return [NONE, NONE]
    if found["median_difference"] is None:
        return [found["reason"], NONE]
    return [
        _interval(about, found["median_difference"]),
        _delta(found["cliffs_delta"]),
    ]


def _matched_cells(about: Measure, found: Mapping[str, Any] | None) -> list[str]:
    """Pairs, left over, rate ratio, median of differences, lower, higher."""
    if found is None:
        return [NONE] * 6
    left, ratio = NONE, NONE
    if "unmatched_model" in found:
        left = f"{found['unmatched_model']}, {found['unmatched_other']}"
        ratio = NONE if found["rate_ratio"] is None else f"{found['rate_ratio']:.3f}"
    if found["median_difference"] is None:
        return [str(found["pairs"]), left, ratio, found["reason"], NONE, NONE]
    shares = [f"{found[name]:.0%}" for name in ("share_lower", "share_higher")]
    return [
        str(found["pairs"]),
        left,
        ratio,
        _interval(about, found["median_difference"]),
        *shares,
    ]


def _interval(about: Measure, estimate: Mapping[str, float], unit: str = "") -> str:
    """Signed, with its interval: -0.81 bits [-0.90, -0.70]."""
    return _signed(estimate, about.digits, unit)


def _delta(estimate: Mapping[str, float]) -> str:
    return _signed(estimate, 2)


def _signed(estimate: Mapping[str, float], least_digits: int, unit: str = "") -> str:
    """With two digits of the interval's width, and no more than six decimals."""
    width = estimate["high"] - estimate["low"]
    digits = least_digits
    if width > 0:
        digits = min(6, max(digits, 1 - math.floor(math.log10(width))))
    value, low, high = (f"{estimate[name]:+.{digits}f}" for name in ("value", "low", "high"))
    return f"{value}{unit} [{low}, {high}]"


def _in_unit(about: Measure) -> str:
    return f" ({about.unit.strip()})" if about.unit else ""


# Markdown ----------------------------------------------------------------------------------

MATCHED_HEAD = ["pairs", "left over", "rate ratio", "median of differences", "lower", "higher"]


def _measure_tables(
    content: Mapping[str, Any], measure: str
) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Heading and rows of the tables of one measure."""
    about = MEASURES[measure]
    rows = [(label, measures[measure]) for label, measures in _rows(content)]
    there = _there(content, measure)
    head = [
        part
        for name in there
        for part in (f"{TITLES[name]}: median (quartiles)", "scored, dead, too few")
    ]
    yield (
        ["", *head],
        [
            [label, *(c for n in there for c in _population_cells(about, one["populations"][n]))]
            for label, one in rows
        ],
    )
    if TWIN in there:
        yield (
            ["all neurons against the twin", "difference of medians", "Cliff's delta"],
            [[label, *_against_cells(about, one["against_twin"])] for label, one in rows],
        )
    for other, title in AGAINST.items():
        found = [(label, one["matched"][other]) for label, one in rows]
        if any(one is not None for _, one in found):
            how = "against" if other == SHUFFLED else "matched with"
            yield (
                [f"{how} {title}", *MATCHED_HEAD],
                [[label, *_matched_cells(about, one)] for label, one in found],
            )


def _there(content: Mapping[str, Any], measure: str) -> list[str]:
    """The populations of which any layer has this measure."""
    return [
        name
        for name in TITLES
        if any(one["measures"][measure]["populations"][name] for one in content["layers"])
    ]


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _listed(lines: Sequence[str]) -> str:
    return "\n".join(f"- {escape(line)}" for line in lines)


# Terminal ----------------------------------------------------------------------------------


def _table(title: str, head: Sequence[str]) -> Table:
    table = Table(title=Text(title), caption_justify="left", title_justify="left")
    for i, name in enumerate(head):
        table.add_column(Text(name), justify="left" if i == 0 else "right", overflow="fold")
    return table


def _add(table: Table, rows: Sequence[Sequence[str]]) -> None:
    """A section. Cells are text, never markup: an interval's bracket would be taken for one."""
    for i, row in enumerate(rows):
        table.add_row(*map(Text, row), end_section=i == len(rows) - 1)


def _labelled(about: Measure, label: str) -> str:
    return about.title + _in_unit(about) + ("" if label == POOLED else f", {label}")


def _populations_table(
    content: Mapping[str, Any], rows: Sequence[tuple[str, Mapping[str, Any]]]
) -> Table:
    there = [name for name in TITLES if any(name in _there(content, m) for m in MEASURES)]
    table = _table(
        f"Neurons, {_whose(rows)}: median (quartiles)", ["", *(TITLES[name] for name in there)]
    )
    for measure, about in MEASURES.items():
        _add(
            table,
            [
                [_labelled(about, label), *(
                    _population_cells(about, measures[measure]["populations"][name])[0]
                    for name in there
                )]
                for label, measures in rows
            ],
        )  # fmt: skip
    return table


def _against_table(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    table = _table(
        f"All neurons against the twin, {_whose(rows)}",
        ["", "difference of medians", "Cliff's delta"],
    )
    for measure, about in MEASURES.items():
        _add(
            table,
            [
                [_labelled(about, label), *_against_cells(about, measures[measure]["against_twin"])]
                for label, measures in rows
            ],
        )
    return table


def _matched_table(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    table = _table(
        f"At matched firing rate, {_whose(rows)}",
        ["", "against", "pairs", "median of differences", "lower"],
    )
    for measure, about in MEASURES.items():
        found = []
        for label, measures in rows:
            for other, title in AGAINST.items():
                one = measures[measure]["matched"][other]
                if one is not None:
                    pairs, _, _, difference, lower, _ = _matched_cells(about, one)
                    found.append([_labelled(about, label), title, pairs, difference, lower])
        _add(table, found)
    return table


def _whose(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    return POOLED if [label for label, _ in rows] == [POOLED] else "by layer"
