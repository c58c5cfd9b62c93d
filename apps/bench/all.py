"""Every benchmark that a device needs, one after another: `python -m apps.bench.all`."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from apps.bench.devices import check_device
from apps.topk import cli
from apps.topk.corpus import flags
from apps.topk.provenance import ROOT
from lingua_topk import host
from lingua_topk.errors import ConfigError

PROGRAM = "apps.bench.all"
EXAMPLE = "--device cuda --save"
# A program that could not end in less is not begun.
LEAST_SECONDS = 10.0
TESTS_LIMIT = {"cpu": 900.0, "cuda": 240.0}
NO_TESTS_COLLECTED = 5  # pytest's exit status
# The tests that must be green before a part is measured.
TESTS = {
    "operator": ("tests/ops", "tests/bench/test_bench_operator.py"),
    "training": (
        "tests/host/test_transformer.py",
        "tests/host/test_optim.py",
        "tests/host/test_loss.py",
        "tests/bench/test_bench_training.py",
    ),
    "decoding": (
        "tests/apps/test_generation.py",
        "tests/apps/test_inference.py",
        "tests/apps/test_decoding.py",
        "tests/ops/test_gathered.py",
        "tests/test_sparse.py",
    ),
    "startup": (),
}


@dataclass(frozen=True)
class Job:
    """One program: `arguments` behind the interpreter's name, and how long it may take."""

    part: str
    arguments: tuple[str, ...]
    limit_s: float

    def __str__(self) -> str:
        return " ".join(self.arguments).removeprefix("-m ")


def main(argv: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else argv
    if flags.call(measure, PROGRAM, arguments, EXAMPLE):
        raise SystemExit(1)


def measure(
    *, device: str = "cpu", part: str = "", budget_s: float = 0.0, save: bool = False
) -> list[str]:
    """Run every benchmark of a device, each as a process of its own with a time limit.

    Before a part its tests run, those for a GPU on CUDA only; a part whose tests are red is
    not measured. A failure is told at the end and the exit status is 1; the others go on.

    Args:
        device: cpu or cuda.
        part: some of operator,training,decoding,startup; by default all.
        budget_s: seconds for everything; what does not fit is left out and told. 0: no limit.
        save: append the rows to apps/bench/results/.

    Returns: what failed, a line each.
    """
    check_device(device)
    parts = _parts(part)
    if budget_s < 0:
        raise ConfigError(f"budget_s={budget_s:g} is too small: give seconds, or 0 for no limit")
    chosen = [job for job in jobs(device) if job.part in parts]
    results = _run_all(chosen, device, time.monotonic() + (budget_s or float("inf")), save)
    _show(results)
    return [f"{what}: {outcome}" for what, outcome, _ in results if outcome != "done"]


def _parts(part: str) -> list[str]:
    parts = part.split(",") if part else list(TESTS)
    for name in parts:
        if name not in TESTS:
            raise ConfigError(f"part: {name!r} is not known: choose of {', '.join(TESTS)}")
    return parts


def jobs(device: str) -> list[Job]:
    """What is measured on a device, in order: what is asked for most comes first."""
    return _gpu_jobs() if device == "cuda" else _cpu_jobs()


def _gpu_jobs() -> list[Job]:
    on = ("--device", "cuda", "--dtype", "bf16")
    rows = ("--rows", "65536", "--k", "64")
    operators = [
        Job("operator", _bench("operator", *on, *rows, "--width", width, "--alpha", alpha), 60.0)
        for width in ("1024", "2048")
        for alpha in ("0", "0.5")
    ]
    configs = ("configs/paper/topk_d1024_l8.yaml", "configs/paper/topk_d2048_l24.yaml")
    steps = ("--device", "cuda", "--steps", "10")
    trainings = [
        Job("training", _bench("training", *steps, "--config", config, *more), 180.0)
        for config, more in zip(configs, ((), ("--variants", "vanilla,topk,llama")), strict=True)
    ]
    decodings = [
        Job("decoding", _bench("decoding", *on, *_shape(dim, layers)), 90.0)
        for dim, layers in (("2048", "24"), ("1024", "8"))
    ]
    return [
        *operators,
        *trainings,
        *decodings,
        Job("startup", _bench("startup", "--repeats", "3"), 240.0),
    ]


def _cpu_jobs() -> list[Job]:
    on = ("--device", "cpu", "--dtype", "fp32")
    rows = ("--rows", "2048", "--width", "1024", "--k", "64")
    operators = [
        Job("operator", _bench("operator", *on, *rows, "--alpha", alpha), 300.0)
        for alpha in ("0", "0.5")
    ]
    return [
        *operators,
        Job("training", _bench("training", *on, "--dim", "1024", "--layers", "4"), 1800.0),
        Job("decoding", _bench("decoding", *on, *_shape("2048", "24")), 1800.0),
        Job("startup", _bench("startup"), 900.0),
    ]


def _bench(name: str, *arguments: str) -> tuple[str, ...]:
    return ("-m", f"apps.bench.{name}", *arguments)


def _shape(dim: str, layers: str) -> tuple[str, ...]:
    return ("--dim", dim, "--layers", layers, "--vocab", "32000", "--batch", "1")


def _run_all(
    chosen: Sequence[Job], device: str, deadline: float, save: bool
) -> list[tuple[str, str, float]]:
    """What ran, how it ended, and its seconds; `deadline` by the monotonic clock."""
    results: list[tuple[str, str, float]] = []
    of_tests: dict[str, str] = {}  # by part
    for number, job in enumerate(chosen, 1):
        if job.part not in of_tests:
            start = time.monotonic()
            of_tests[job.part] = _run_tests(job.part, device, deadline)
            if TESTS[job.part]:
                what = f"tests of {job.part}"
                results.append((what, of_tests[job.part], time.monotonic() - start))
        if of_tests[job.part] != "done":
            why = f"not measured, its tests: {of_tests[job.part]}"
            results.append((str(job), why, 0.0))
            continue
        print(f"[{number}/{len(chosen)}] {job}", flush=True)
        start = time.monotonic()
        arguments = (*job.arguments, "--save") if save else job.arguments
        outcome = _run(arguments, job.limit_s, deadline)
        results.append((str(job), outcome, time.monotonic() - start))
    return results


def _run_tests(part: str, device: str, deadline: float) -> str:
    if not TESTS[part]:
        return "done"
    print(f"tests of {part}", flush=True)
    # What has nothing to do with the device is the business of the suite.
    only = ("-m", "gpu") if device == "cuda" and part != "operator" else ()
    arguments = ("-m", "pytest", "-q", *TESTS[part], *only)
    outcome = _run(arguments, TESTS_LIMIT[device], deadline)
    return "no test of it for a GPU" if outcome == f"exit status {NO_TESTS_COLLECTED}" else outcome


def _run(arguments: Sequence[str], limit_s: float, deadline: float) -> str:
    """Run a program, its output as it comes; "done", or how it failed."""
    left = deadline - time.monotonic()
    if left < LEAST_SECONDS:
        return "left out: no time left"
    # A group of its own, which ends with all that it has started.
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, start_new_session=True,
        env={**os.environ, host.HOST_VARIABLE: "embedded"},
    )  # fmt: skip
    seconds = min(limit_s, left)
    try:
        status = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return "done" if status == 0 else f"exit status {status}"


def _show(results: Sequence[tuple[str, str, float]]) -> None:
    table = Table("what", "outcome", "seconds")
    for what, outcome, seconds in results:
        table.add_row(what, outcome, f"{seconds:.0f}")
    Console().print(table)


if __name__ == "__main__":
    cli.run(main)
