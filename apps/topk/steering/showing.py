"""Unsteered and steered texts side by side on a terminal, the words of the concept highlighted.

What models write and what corpora hold is data: control characters are shown escaped, and
nothing in it is taken for markup.
"""

import math
import os
import textwrap
from collections.abc import Collection, Iterator, Sequence

from rich.box import SQUARE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from apps.topk.generation import Generation
from apps.topk.steering import turning
from apps.topk.steering.bench import Bench, Written
from apps.topk.steering.choosing import Choice
from apps.topk.steering.concept_words import count, spans_of
from apps.topk.steering.handles import Handle
from apps.topk.steering.turning import Turning, Variant
from apps.topk.terminal import shown

LEAST_COLUMN = 34  # characters: texts in narrower columns are hard to read
HIGHLIGHT = "bold underline magenta"
MARK = "*"  # around a word, where there are no colours
SHOWN_WORDS, LISTED_WORDS = 12, 8  # of a neuron in the header, of one in a list
ENDED = " (end of text)"


def console() -> Console:
    return Console(highlight=False)


def has_colours(out: Console) -> bool:
    """Whether highlighting can be seen: on a terminal, unless NO_COLOR asks for none."""
    return out.is_terminal and not out.is_dumb_terminal and not os.environ.get("NO_COLOR")


def concept_of(neurons: Sequence[Handle]) -> frozenset[str]:
    """The words that any of them fires on."""
    return frozenset(word for one in neurons for word in one.words)


# What is turned ----------------------------------------------------------------------------


def show_header(
    out: Console, bench: Bench, choice: Choice, how: Turning, variants: Sequence[Variant]
) -> None:
    """The neurons, their words, and what is done to them."""
    if choice.why:
        _print(out, choice.why)
    for i, one in enumerate(choice.neurons):
        _print(out, f"neuron {one.name}", "bold")
        for line in (*_facts(one), _turned(i, one, how, variants)):
            _print(out, f"  {line}")
    for note in bench.notes:
        _print(out, f"note: {note}")
    if concept_of(choice.neurons):
        marked = "highlighted" if has_colours(out) else f"{MARK}marked{MARK}"
        whose = "Its" if len(choice.neurons) == 1 else "Their"
        _print(out, f"{whose} words are {marked}; with each text stands their share of its words.")
    else:
        _print(
            out,
            "No words are known, so none are highlighted: python -m apps.topk.analyze --ckpt"
            f" {bench.checkpoint.folder} finds what neurons fire on.",
        )


def _facts(one: Handle) -> Iterator[str]:
    """What the analysis knows of it, a line each."""
    if one.words:
        yield f"words: {_words(one)}"
    if turning.is_known(one):
        parts = [f"fires on {100 * one.firing_rate:.3g}% of tokens"]
        parts.append(f"mean {one.mean:.3g}, maximum {one.maximum:.3g}")
        if not math.isnan(one.semantic_entropy):
            parts.append(f"semantic entropy {one.semantic_entropy:.2f} bits")
        if one.output_score is not None:
            parts.append(f"output score {one.output_score:.2f} nats")
        yield ", ".join(parts)


def _words(one: Handle, most: int = SHOWN_WORDS) -> str:
    rest = len(one.words) - most
    return ", ".join(one.words[:most]) + (f" and {rest} more" if rest > 0 else "")


def _turned(i: int, one: Handle, how: Turning, variants: Sequence[Variant]) -> str:
    """What is done to neuron number `i`, in both units where there are two."""
    where = {
        "all": "at all positions", "prompt": "at the prompt's positions",
        "generated": "at generated positions",
    }[how.where]  # fmt: skip
    when = "before the selection" if how.before_selection else "after the selection"
    numbers = [_number(variant, i) for variant in variants]
    text = ", ".join(number for number in numbers if number)
    own = [v.absolute[i] / one.maximum for v in variants if v.absolute and one.maximum > 0]
    if own:
        text += f" ({', '.join(f'{multiple:.3g}' for multiple in own)} x its maximum)"
    return f"{text}; {where}, {when}"


def _number(variant: Variant, i: int) -> str:
    """What a variant does to neuron number `i`, short."""
    if variant.mode == turning.ABLATE:
        return "ablated"
    if variant.mode == turning.SCALE:
        return f"times {variant.delta:.4g}"
    number = variant.absolute[i]
    return {
        turning.ADD: f"{number:+.4g}", turning.SET: f"set to {number:.4g}",
        turning.CLAMP: f"at most {number:.4g}",
    }[variant.mode]  # fmt: skip


def label(variant: Variant | None, neurons: Sequence[Handle], unit: str) -> str:
    """What stands above a text; in both units for a neuron alone."""
    if variant is None:
        return "unsteered"
    if len(neurons) == 1 and variant.absolute:
        (one,) = neurons
        other = turning.MEAN if unit == turning.MEAN else turning.MAXIMUM
        strength = getattr(one, other)
        more = f" ({variant.absolute[0] / strength:.3g} x {other})" if strength > 0 else ""
        return _number(variant, 0) + more
    if not variant.absolute or unit == turning.ABSOLUTE:
        return _number(variant, 0)
    lead = {turning.ADD: "", turning.SET: "set to ", turning.CLAMP: "at most "}[variant.mode]
    return f"{lead}{variant.delta:{'+' if variant.mode == turning.ADD else ''}.4g} x {unit}"


# The texts ---------------------------------------------------------------------------------


def show_texts(
    out: Console, written: Sequence[Written], choice: Choice, unit: str, num: int
) -> None:
    """Every prompt in turn; columns where they are wide enough, else one below the other.

    written: unsteered first; in each the prompts are repeated `num` times.
    """
    total = len(written[0].texts)
    n_prompts = total // num
    for index in range(n_prompts):
        for completion, i in enumerate(range(index, total, n_prompts)):
            if total > 1:
                which = f"prompt {index + 1} of {n_prompts}"
                which += f", completion {completion + 1} of {num}" if num > 1 else ""
                _print(out, f"=== {which}")
            _show_one(out, written, i, choice.neurons, unit)


def _show_one(
    out: Console, written: Sequence[Written], i: int, neurons: Sequence[Handle], unit: str
) -> None:
    words = concept_of(neurons)
    heads = [_text(label(one.variant, neurons, unit), "bold") for one in written]
    texts = [highlighted(one.texts[i], words, has_colours(out)) for one in written]
    feet = [_text(_foot(written, j, i, words), "italic") for j in range(len(written))]
    if column_width(out.width, len(written)) >= LEAST_COLUMN:
        out.print(_columns(heads, texts, feet))
        return
    for head, text, foot in zip(heads, texts, feet, strict=True):
        more = (": ", foot) if foot.plain else ()
        out.print(Text.assemble(("--- ", "bold"), head, *more))
        out.print(text)
        out.print()


def column_width(width: int, n_columns: int) -> int:
    """Characters of each of `n_columns` columns in a table of `width`."""
    return (width - 1) // n_columns - 3  # a line and a space on both sides


def _columns(heads: Sequence[Text], texts: Sequence[Text], feet: Sequence[Text]) -> Table:
    table = Table(box=SQUARE, expand=True)
    for head in heads:
        table.add_column(head, ratio=1, overflow="fold")
    table.add_row(*texts, end_section=True)
    if any(foot.plain for foot in feet):
        table.add_row(*feet)
    return table


def highlighted(one: Generation, words: Collection[str], coloured: bool) -> Text:
    """A prompt and what was written after it, there with the `words` marked."""
    whole, first = one.prompt + one.text, len(one.prompt)
    cell = Text()
    cell.append(shown(one.prompt), "dim")
    at = first
    for start, end in spans_of(words, whole, first):
        cell.append(shown(whole[at:start]))
        word = shown(whole[start:end])
        cell.append(word if coloured else f"{MARK}{word}{MARK}", HIGHLIGHT if coloured else "")
        at = end
    cell.append(shown(whole[at:]))
    cell.rstrip()
    if one.reason == "eos":
        cell.append(ENDED, "dim")
    return cell


def _foot(written: Sequence[Written], j: int, i: int, words: Collection[str]) -> str:
    """What stands with text `i` of `written[j]`: the share of the words, the perplexity."""
    parts = []
    if words:
        share = _share(written[j].texts[i], words)
        parts.append(f"{share} of words" if share else "no words")
        if j:
            parts[0] += f" (unsteered {_share(written[0].texts[i], words) or 'no words'})"
    perplexities = written[j].perplexities
    if perplexities is not None and not math.isnan(perplexities[i]):
        parts.append(f"perplexity under the twin {perplexities[i]:.4g}")
    return ", ".join(parts)


def _share(one: Generation, words: Collection[str]) -> str:
    """ "" for a text without words."""
    n, total = count(words, one.prompt, one.text)
    return f"{100 * n / total:.0f}%" if total else ""


# Handles -----------------------------------------------------------------------------------


def show_handles(out: Console, handles: Sequence[Handle]) -> None:
    """A table of neurons, one a line, with as many of their words as there is room for."""
    table = Table(box=SQUARE, expand=True)
    table.add_column("neuron", no_wrap=True)
    for name in ("output\nscore", "semantic\nentropy", "fires on\n%", "maximum"):
        table.add_column(name, justify="right")
    table.add_column("words", ratio=1, overflow="fold")
    for one in handles:
        score = "-" if one.output_score is None else f"{one.output_score:.2f}"
        entropy = "-" if math.isnan(one.semantic_entropy) else f"{one.semantic_entropy:.2f}"
        numbers = (score, entropy, f"{100 * one.firing_rate:.3g}", f"{one.maximum:.3g}")
        table.add_row(one.name, *numbers, _text(_words(one, LISTED_WORDS)))
    out.print(table)


def _text(text: str, style: str = "") -> Text:
    return Text(shown(text), style=style)


def _print(out: Console, text: str, style: str = "") -> None:
    """A paragraph; its further lines are indented below the first."""
    start = len(text) - len(text.lstrip())
    lines = textwrap.wrap(shown(text), out.width, subsequent_indent=" " * (start + 2))
    for line in lines:
        out.print(Text(line, style=style), soft_wrap=True)
