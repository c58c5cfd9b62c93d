"""How fast the backends of the operator are beside `torch.topk` and a mask."""

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from apps.bench.rows import RESULTS, append, machine
from apps.topk import cli
from apps.topk.checkpoint import DTYPES
from apps.topk.corpus import flags
from apps.topk.provenance import provenance
from lingua_topk.errors import ConfigError
from lingua_topk.ops import backends, topk_sum
from lingua_topk.ops.definition import topk_sum_definition

PROGRAM = "apps.bench.operator"
EXAMPLE = "--rows 2048 --width 1024 --k 64"
WARM_UP = 3
# h, update, k, alpha -> y
Function = Callable[[Tensor, Tensor, int, float], Tensor]


def main(argv: Sequence[str] | None = None) -> None:
    flags.call(measure, PROGRAM, sys.argv[1:] if argv is None else argv, EXAMPLE)


def measure(
    *,
    device: str = "cpu",
    rows: int = 2048,
    width: int = 1024,
    k: int = 64,
    alpha: float = 0.0,
    dtype: str = "fp32",
    repeats: int = 30,
    save: bool = False,
) -> list[dict[str, Any]]:
    """Measure y = TopK(h + update), forward and with backward, of all that run on a device.

    In turns, in one process, on normal values: `torch.topk` with a threshold mask, `torch.topk`
    with a scatter, the definition, and each backend. `ratio` is the time of the first over the
    time of this one, in the same turn: its median, and the 10th and 90th percentile. Times are
    written for a GPU only; on a CPU the ratio is what carries over. A backend whose results and
    gradients are not the definition's, in this very run, is not reported: the program fails.

    Args:
        device: cpu or cuda.
        rows: rows of h.
        width: values a row, D.
        k: how many of them are kept.
        alpha: annealing coefficient; mask and scatter are measured in the hard form in any case.
        dtype: fp64, fp32, bf16 or fp16.
        repeats: turns that count; three before them do not.
        save: append rows to apps/bench/results/operator.csv.

    Returns: a row for each and each direction.
    """
    _check(device, rows, width, k, dtype, repeats)
    h, update, gradient = torch.randn(
        (3, rows, width), generator=torch.Generator().manual_seed(0), dtype=torch.float32
    ).to(device, DTYPES[dtype])
    functions = _functions(h)
    for name in list(functions)[3:]:
        _check_correct(name, functions[name], h, update, gradient, k, alpha)
    origin = {**_origin(device), "device": device, "dtype": dtype, "rows": rows, "width": width,
              "k": k, "alpha": alpha, "repeats": repeats}  # fmt: skip
    found = []
    for with_backward in (False, True):
        seconds = _in_turns(functions, h, update, gradient, k, alpha, with_backward, repeats)
        found += [
            {**origin, "direction": "forward+backward" if with_backward else "forward", **row}
            for row in _rows(seconds, list(functions), device)
        ]
    _show(found)
    for row in found if save else []:
        append(RESULTS / "operator.csv", row)
    return found


def _check(device: str, rows: int, width: int, k: int, dtype: str, repeats: int) -> None:
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"device={device!r} is not known: choose cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: torch sees no CUDA device here; choose cpu")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not known: choose one of {', '.join(DTYPES)}")
    if min(rows, repeats) < 1 or not 1 <= k < width:
        raise ConfigError(
            f"rows={rows}, width={width}, k={k}, repeats={repeats}: give at least one row and one"
            " repeat, and 1 <= k < width"
        )


def _origin(device: str) -> dict[str, Any]:
    made_by = provenance()
    return {
        "date": made_by["created_at"], "machine": machine(), "threads": torch.get_num_threads(),
        "commit": made_by["commit"], "torch": made_by["torch"], "numpy": np.__version__,
        "triton": _version("triton"),
    }  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _functions(h: Tensor) -> dict[str, Function]:
    """What is measured, the base of the ratios first; behind the third, the backends."""
    functions: dict[str, Function] = {
        "topk + mask": _mask,
        "topk + scatter": _scatter,
        "plain": partial(_by_backend, "plain"),
    }
    for name in ("cpu", "triton"):
        try:
            with backends.use(name):
                backends.backend_of(h)
        except ConfigError:
            continue
        functions[name] = partial(_by_backend, name)
    return functions


def _mask(h: Tensor, update: Tensor, k: int, alpha: float) -> Tensor:
    x = h + update
    threshold = torch.topk(x, k, dim=-1).values[..., -1:]
    return torch.relu(torch.where(x >= threshold, x, 0.0))


def _scatter(h: Tensor, update: Tensor, k: int, alpha: float) -> Tensor:
    x = h + update
    values, places = torch.topk(x, k, dim=-1)
    return torch.relu(torch.zeros_like(x).scatter(-1, places, values))


def _by_backend(name: str, h: Tensor, update: Tensor, k: int, alpha: float) -> Tensor:
    with backends.use(name):
        return topk_sum(h, update, k, alpha)


def _check_correct(
    name: str, function: Function, h: Tensor, update: Tensor, gradient: Tensor, k: int, alpha: float
) -> None:
    """RuntimeError where results or gradients differ from the definition's in any bit."""
    for case, (a, b) in {"normal": (h, update), "tied": (h.round(), update.round())}.items():
        a, b = a.clone(), b.clone()
        if case == "tied":
            a[0], a[-1, 0] = 0.0, float("nan")
        actual, expected = (
            _with_gradients(one, a, b, gradient, k, alpha) for one in (function, _definition)
        )
        for what, one, other in zip(("y", "dh", "dupdate"), actual, expected, strict=True):
            if not torch.allclose(one, other, rtol=0, atol=0, equal_nan=True):
                raise RuntimeError(
                    f"backend {name}: {what} of {case} rows is not the definition's; no time is"
                    " reported of what is not correct"
                )


def _definition(h: Tensor, update: Tensor, k: int, alpha: float) -> Tensor:
    return topk_sum_definition(h, update, k, alpha, "relu")


def _with_gradients(
    function: Function, h: Tensor, update: Tensor, gradient: Tensor, k: int, alpha: float
) -> tuple[Tensor, ...]:
    inputs = h.detach().requires_grad_(), update.detach().requires_grad_()
    y = function(*inputs, k, alpha)
    return (y.detach(), *torch.autograd.grad(y, inputs, gradient))


def _in_turns(
    functions: dict[str, Function], h: Tensor, update: Tensor, gradient: Tensor, k: int,
    alpha: float, with_backward: bool, repeats: int,
) -> np.ndarray:  # fmt: skip
    """Seconds: [repeats, functions]."""
    seconds = np.empty((WARM_UP + repeats, len(functions)))
    for turn in range(len(seconds)):
        for i, function in enumerate(functions.values()):
            start = _now(h)
            if with_backward:
                _with_gradients(function, h, update, gradient, k, alpha)
            else:
                function(h, update, k, alpha)
            seconds[turn, i] = _now(h) - start
    return seconds[WARM_UP:]


def _now(x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def _rows(seconds: np.ndarray, names: list[str], device: str) -> list[dict[str, Any]]:
    ratios = seconds[:, :1] / seconds  # [repeats, functions]
    tenth, median, ninetieth = np.percentile(ratios, (10, 50, 90), axis=0)
    microseconds = 1e6 * np.median(seconds, axis=0)
    return [
        {
            "what": name,
            "ratio": round(float(median[i]), 2),
            "ratio_p10": round(float(tenth[i]), 2),
            "ratio_p90": round(float(ninetieth[i]), 2),
            "microseconds": round(float(microseconds[i]), 1) if device == "cuda" else None,
        }
        for i, name in enumerate(names)
    ]


def _show(rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    shape = f"{first['rows']:,} rows of {first['width']:,}, k={first['k']}, {first['dtype']}"
    table = Table("direction", "what", "ratio", "10%", "90%", "us", title=shape)
    for row in rows:
        values = (row[name] for name in ("ratio", "ratio_p10", "ratio_p90"))
        time_shown = "" if row["microseconds"] is None else f"{row['microseconds']:,}"
        table.add_row(row["direction"], row["what"], *(f"{v:.2f}" for v in values), time_shown)
    Console().print(table)


if __name__ == "__main__":
    cli.run(main)
