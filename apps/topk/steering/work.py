"""What apps.topk.steer does with a model: choose neurons, show them, and write texts."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from apps.topk import result_lines
from apps.topk.provenance import provenance
from apps.topk.sampling import Sampling
from apps.topk.steering import choosing, interactive, output, showing
from apps.topk.steering.bench import Bench
from apps.topk.steering.choosing import Choice
from apps.topk.steering.handles import Handle
from apps.topk.steering.turning import MAXIMUM, Turning, variants


def chosen(bench: Bench, neuron: str, concept: str, n: int) -> Choice:
    if neuron:
        return choosing.named(bench, neuron)
    return choosing.of_word(bench, concept, n) if concept else choosing.proposed(bench, n)


def check_default(bench: Bench, delta: str, how: Turning) -> None:
    if bench.handles is None and not delta and how.unit == MAXIMUM and how.deltas:
        bench.needed_handles(
            "without --delta (such as --delta 4,8,16) multiples of the neuron's maximum are taken,"
            " which"
        )


def converse(
    bench: Bench, prompt: str, sampling: Sampling, choice: Choice, how: Turning, num: int
) -> None:
    state = interactive.State(prompt, sampling, choice, how)
    interactive.Desk(bench, state, num).converse()


def compare(
    bench: Bench, prompts: Sequence[str], sampling: Sampling, choice: Choice, how: Turning,
    num: int, out: Path | None, origin: dict[str, Any],
) -> None:  # fmt: skip
    """Continue the prompts without and with steering; show that, or write it to `out`."""
    turned = variants(how, choice.neurons)
    written = bench.write([*prompts] * num, sampling, turned)
    if out is None:
        screen = showing.console()
        showing.show_header(screen, bench, choice, how, turned)
        showing.show_texts(screen, written, choice, how.unit, num)
        return
    origin = _origin(
        bench, neurons=_lines(choice.neurons), why=choice.why, turning=asdict(how),
        sampling=asdict(sampling), **origin,
    )  # fmt: skip
    n = result_lines.write(out, output.text_lines(written, choice.neurons, how.unit, num), origin)
    print(f"written: {out} ({n} texts)")


def list_neurons(
    bench: Bench, concept: str, n: int, out: Path | None, origin: dict[str, Any]
) -> None:
    found = (
        choosing.candidates_of_word(bench, concept)
        if concept
        else choosing.candidates_of_all(bench)
    )[:n]
    if out is None:
        showing.show_handles(showing.console(), found)
        return
    result_lines.write(out, _lines(found), _origin(bench, concept=concept, **origin))
    print(f"written: {out} ({len(found)} neurons)")


def _lines(neurons: Sequence[Handle]) -> list[dict[str, Any]]:
    return [output.handle_line(one) for one in neurons]


def _origin(bench: Bench, **fields: Any) -> dict[str, Any]:
    return provenance(
        ckpt=str(bench.checkpoint.folder), step=bench.checkpoint.step,
        analysis=bench.analysis and str(bench.analysis), **fields,
    )  # fmt: skip
