"""Measure what steering does: how far a concept is gained, and what that costs the text."""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apps.topk import cli
from apps.topk.corpus import flags
from apps.topk.defaults import BATCH_TOKENS
from apps.topk.prompts import read_prompts
from apps.topk.steering.settings import Settings
from lingua_topk.errors import ConfigError, DataError

PROGRAM = "apps.topk.steer_eval"
EXAMPLE = "--ckpt DUMP_DIR --twin TWIN_DUMP_DIR"
FOLDER = "steering"  # below the dump_dir
JOURNAL = "unfinished.jsonl"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; mistakes raise a UserError, for `cli.run` to report."""
    argv = sys.argv[1:] if argv is None else argv
    flags.call(steer_eval, PROGRAM, argv, EXAMPLE, repeatable=["neuron", "deltas"])


def steer_eval(
    *,
    ckpt: str,
    twin: str = "",
    neuron: str = "",
    n: int = Settings.n,
    candidates: int = Settings.candidates,
    deltas: str = "0.5,1,2,4,8",
    prompts: str = "",
    num_prompts: int = Settings.prompts,
    prompt_tokens: int = Settings.prompt_tokens,
    max_tokens: int = Settings.max_tokens,
    temperature: float = Settings.temperature,
    seed: int = 0,
    out: str = "",
    analysis: str = "",
    dtype: str = "fp32",
    device: str = "",
    batch_tokens: int = BATCH_TOKENS,
    quiet: bool = False,
) -> dict[str, Any]:
    """Measure what steering does: how far a concept is gained, and what that costs the text.

    Neurons are chosen by low semantic entropy and by output score (whether raising them makes
    the words likelier that they fire on), or named. Each is added to at several strengths while
    the model writes. Measured are the share of the generated tokens that belong to the neuron's
    words and its lift over unsteered text, the perplexity of the text under the vanilla twin, its
    variety (distinct-1, distinct-2), and a score of all three. The delta is chosen on other
    prompts and by other words (every other one of the neuron's) than those of the numbers.

    Beside it stand, measured alike: a random neuron of about the same firing rate, the direction
    between the mean values where the words stand and elsewhere, and with --twin both for the
    twin: its own neurons, chosen alike, and that direction.

    Needs the analysis of python -m apps.topk.analyze (with --twin for the twin's neurons). Writes
    OUT/steering.json, steering.csv, steering.md and lift.svg, which python -m apps.topk.report
    takes up. Stopped, the same command goes on from there.

    Args:
        ckpt: the checkpoint, such as DUMP_DIR/checkpoints/0000001000, or the dump_dir of a
            training run for its newest one.
        twin: the same of the vanilla twin; without it the perplexity is under the model itself,
            unsteered.
        neuron: which, as 3:417,2:15; by default they are chosen.
        n: how many are chosen.
        candidates: neurons of lowest semantic entropy whose output score is measured.
        deltas: strengths, in multiples of the neuron's maximum (of a direction's length).
        prompts: a file of texts to go on from, one a line, or .jsonl as for apps.topk.generate; a
            third is to choose by. By default pieces of the text that was analysed.
        num_prompts: prompts of the reported numbers; half as many are to choose by.
        prompt_tokens: tokens of a prompt.
        max_tokens: generated tokens a text.
        temperature: of the draws; 0 takes the likeliest token each time.
        seed: of the draws, the prompts and the random neurons.
        out: the folder to write; by default steering in the dump_dir of the run.
        analysis: the folder of the analysis; by default neurons in the dump_dir of the run.
        dtype: what the models compute in: fp64, fp32, bf16 or fp16.
        device: cpu or cuda; by default cuda where there is one.
        batch_tokens: tokens that are kept in memory at once, and that a model reads at once.
        quiet: print what the numbers come to, not the tables.

    Raises: ConfigError for an argument that is not allowed, CheckpointError for a checkpoint
    that cannot be used, DataError for an analysis that cannot.
    """
    # With torch and matplotlib, which take seconds that --help does not.
    from apps.topk.checkpoint import checkpoint_folder, open_checkpoint
    from apps.topk.devices import device_of
    from apps.topk.neurons.arguments import folder_in_run, listed
    from apps.topk.steering import results
    from apps.topk.steering.bench import analysis_folder
    from apps.topk.steering.experiment import Experiment

    settings = Settings(
        n, candidates, _deltas(deltas), num_prompts, prompt_tokens, max_tokens, temperature, seed
    )
    _check(settings, dtype, batch_tokens)
    place = device_of(device)
    given = (read_prompts([], prompts) or []) if prompts else []
    checkpoint = open_checkpoint(checkpoint_folder(ckpt))
    if checkpoint.model_args.topk is None:
        raise ConfigError(
            f"ckpt={ckpt!r} is a vanilla model, without TopK: give it as --twin, and as --ckpt a"
            " run with a section model.topk"
        )
    twin_checkpoint = open_checkpoint(checkpoint_folder(twin)) if twin else None
    if twin_checkpoint is not None:
        _check_twin(checkpoint, twin_checkpoint)
    found = analysis_folder(checkpoint, analysis)
    if found is None:
        raise DataError(
            f"{checkpoint.folder} has no analysis of its neurons: make one with python -m"
            f" apps.topk.analyze --ckpt {ckpt}, or give --analysis FOLDER"
        )
    folder = Path(out).expanduser() if out else folder_in_run(checkpoint, FOLDER)
    _check_folder(folder)
    experiment = Experiment(
        checkpoint, twin_checkpoint, found, listed(neuron), given, settings,
        device=place, dtype=dtype, batch_tokens=batch_tokens, journal=folder / JOURNAL,
    )  # fmt: skip
    with cli.alone(folder, "out"):
        content = _finished(folder, experiment.inputs())
        if content is None:
            experiment.run()
            content = results.content_of(experiment)
            results.write(folder, content)
            (folder / JOURNAL).unlink(missing_ok=True)
    _show(content, folder, quiet)
    return content


def _deltas(text: str) -> tuple[float, ...]:
    from apps.topk.steering.arguments import numbers

    found = numbers(text, "deltas")
    if min(found) <= 0:
        raise ConfigError(
            f"deltas={text!r}: {min(found):g} is not allowed: give numbers above 0, with commas"
        )
    return tuple(sorted(found))


def _check(settings: Settings, dtype: str, batch_tokens: int) -> None:
    from apps.topk.sampling import MAX_SEED
    from apps.topk.steering.arguments import check_generation

    least = {"n": 1, "candidates": 1, "prompts": 2, "prompt_tokens": 2, "max_tokens": 2}
    names = {"prompts": "num_prompts"}
    for name, lowest in least.items():
        value = getattr(settings, name)
        if value < lowest:
            raise ConfigError(
                f"{names.get(name, name)}={value} is too small: give at least {lowest}"
            )
    check_generation(dtype, batch_tokens)
    if not (math.isfinite(settings.temperature) and settings.temperature >= 0):
        raise ConfigError(f"temperature={settings.temperature} is not allowed: give at least 0")
    if not 0 <= settings.seed <= MAX_SEED:
        raise ConfigError(f"seed={settings.seed} is not allowed: give 0 to {MAX_SEED}")


def _check_twin(checkpoint: Any, twin: Any) -> None:
    """ConfigError where its perplexity would be of other tokens, or it is no vanilla model."""
    if twin.model_args.topk is not None:
        raise ConfigError(
            f"twin={str(twin.folder)!r} has TopK: give the vanilla twin, trained with"
            " model.topk=null"
        )
    own, other = checkpoint.describe(), twin.describe()
    for name in ("vocab_size", "dim", "n_layers"):
        if own[name] != other[name]:
            raise ConfigError(
                f"twin={str(twin.folder)!r} has {name}={other[name]}, the model {own[name]}: give"
                " the twin of this model"
            )
    if own["tokenizer"]["sha256"] != other["tokenizer"]["sha256"]:
        raise ConfigError(
            f"twin={str(twin.folder)!r} has another tokenizer than the model: give the twin of this"
            " model"
        )


def _check_folder(folder: Path) -> None:
    """ConfigError where it is something else, so that nothing of others is overwritten."""
    from apps.topk.steering.results import NAME

    if not folder.exists():
        return
    entries = folder.iterdir() if folder.is_dir() else (folder,)
    names = {one.name for one in entries if not one.name.startswith(".")}
    if names and not names & {NAME, JOURNAL}:
        raise ConfigError(f"out={str(folder)!r} is there and holds no steering: give another --out")


def _finished(folder: Path, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """What was measured before with the same; None where nothing was."""
    from apps.topk.steering.results import NAME

    path = folder / NAME
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        there = content["inputs"]
        different = [name for name in inputs if there.get(name) != inputs[name]]
        content["summary"], content["rows"], content["concepts"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        different = ["what it was made from"]
    if different:
        raise ConfigError(
            f"out={str(folder)!r} holds steering with another {different[0]}: give another --out,"
            " or remove it"
        )
    return content


def _show(content: dict[str, Any], folder: Path, quiet: bool) -> None:
    if not quiet:
        from rich.console import Console

        from apps.topk.steering.results import tables

        for table in tables(content):
            Console().print(table)
    print("\n".join(content["conclusion"]))
    print(f"written: {folder}")


if __name__ == "__main__":
    cli.run(main)
