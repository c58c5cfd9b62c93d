"""How fast the operator is: its backends beside `torch.topk`, the kernels of others, and a copy."""

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from apps.bench.devices import check_device
from apps.bench.peers import peers
from apps.bench.rows import RESULTS, append, origin
from apps.topk import cli
from apps.topk.checkpoint import DTYPES
from apps.topk.corpus import flags
from lingua_topk.errors import ConfigError
from lingua_topk.ops import backends, topk_sum
from lingua_topk.ops.definition import topk_sum_definition

PROGRAM = "apps.bench.operator"
EXAMPLE = "--rows 2048 --width 1024 --k 64"
WARM_UP = 3
DIRECTIONS = ("forward", "backward", "forward+backward")
# Cycles for which a GPU waits, so that what is measured has been sent before it begins.
CYCLES_AHEAD = 2_000_000
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
    values: str = "survivors",
    dtype: str = "fp32",
    repeats: int = 30,
    save: bool = False,
) -> list[dict[str, Any]]:
    """Measure y = TopK(h + update), forward, backward and both, of all that run on a device.

    In turns, in one process: `torch.topk` with a threshold mask, `torch.topk`
    with a scatter, the definition, each backend, and the exact kernels of others that are
    installed (rtopk, quack; with a scatter, as they give values and places). `ratio` is the time
    of the first over the time of this one, in the same turn: its median, and the 10th and 90th
    percentile. On a GPU there are times as well, and `of_copy`: the bytes that have to be read
    and written, in that time, over the bandwidth of a copy in the same run. On a CPU the ratio is
    what carries over. A backend whose results and gradients are not the definition's, in this very
    run, is not reported: the program fails. A kernel of others that cannot run, or is wrong where
    no values tie, is named and left out.

    Args:
        device: cpu or cuda.
        rows: rows of h.
        width: values a row, D.
        k: how many of them are kept.
        alpha: annealing coefficient, of the backends; the others are measured in the hard form.
        values: survivors, h is what TopK left of normal values, as behind another layer; or
            normal. The update is normal, half as large.
        dtype: fp64, fp32, bf16 or fp16.
        repeats: turns that count; three before them do not.
        save: append rows to apps/bench/results/operator.csv.

    Returns: a row for each and each direction.
    """
    _check(device, rows, width, k, values, dtype, repeats)
    h, update, gradient = torch.randn(
        (3, rows, width), generator=torch.Generator().manual_seed(0), dtype=torch.float32
    ).to(device, DTYPES[dtype])
    if values == "survivors":
        h = _mask(h, torch.zeros_like(h), k, 0.0)
    update *= 0.5
    functions = _functions(h)
    for name in list(functions)[3:]:
        _check_correct(name, functions[name], h, update, gradient, k, alpha)
    functions |= _peers_that_run(h, update, k)
    fields = {**origin(), "device": device, "dtype": dtype, "rows": rows, "width": width,
              "k": k, "alpha": alpha, "values": values, "repeats": repeats}  # fmt: skip
    bandwidth = _copy_bandwidth(h, repeats) if h.is_cuda else None
    found = []
    for direction in DIRECTIONS:
        seconds = _in_turns(functions, h, update, gradient, k, alpha, direction, repeats)
        found += [
            {**fields, "direction": direction, **row}
            for row in _rows(seconds, list(functions), _bytes(h, direction, alpha), bandwidth)
        ]
    _show(found)
    for row in found if save else []:
        append(RESULTS / "operator.csv", row)
    return found


def _check(
    device: str, rows: int, width: int, k: int, values: str, dtype: str, repeats: int
) -> None:
    check_device(device)
    backends.chosen()  # all that can run are measured, but a variable that is wrong is told
    if values not in ("survivors", "normal"):
        raise ConfigError(f"values={values!r} is not known: choose survivors or normal")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not known: choose one of {', '.join(DTYPES)}")
    if min(rows, repeats) < 1 or not 1 <= k < width:
        raise ConfigError(
            f"rows={rows}, width={width}, k={k}, repeats={repeats}: give at least one row and one"
            " repeat, and 1 <= k < width"
        )


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


def _peers_that_run(h: Tensor, update: Tensor, k: int) -> dict[str, Function]:
    """The kernels of others that give what `torch.topk` gives here; of the rest, why not."""
    if not h.is_cuda:
        return {}
    expected = _scatter(h, update, k, 0.0)
    found = {}
    for name, topk in peers().items():
        function = partial(_by_places, topk)
        try:
            y = function(h, update, k, 0.0)
            # Of ties, each takes its own.
            wrong = not torch.equal(y.sort(-1).values, expected.sort(-1).values)
        except Exception as error:  # a stranger's kernel; whatever it is, the others go on
            first_line = (str(error).splitlines() or [""])[0]
            print(f"{name} is left out: {type(error).__name__}: {first_line}", file=sys.stderr)
            continue
        if wrong:
            print(f"{name} is left out: its values are not those of torch.topk", file=sys.stderr)
        else:
            found[name] = function
    return found


def _by_places(topk, h: Tensor, update: Tensor, k: int, alpha: float) -> Tensor:
    x = h + update
    values, places = topk(x, k)
    return torch.relu(torch.zeros_like(x).scatter(-1, places.long(), values))


def _with_gradients(
    function: Function, h: Tensor, update: Tensor, gradient: Tensor, k: int, alpha: float
) -> tuple[Tensor, ...]:
    inputs = h.detach().requires_grad_(), update.detach().requires_grad_()
    y = function(*inputs, k, alpha)
    return (y.detach(), *torch.autograd.grad(y, inputs, gradient))


def _work(
    function: Function, h: Tensor, update: Tensor, gradient: Tensor, k: int, alpha: float,
    direction: str,
) -> Callable[[], Any]:  # fmt: skip
    """What is timed."""
    if direction == "forward":
        return lambda: function(h, update, k, alpha)
    if direction == "forward+backward":
        return lambda: _with_gradients(function, h, update, gradient, k, alpha)
    inputs = h.detach().requires_grad_(), update.detach().requires_grad_()
    y = function(*inputs, k, alpha)
    return lambda: torch.autograd.grad(y, inputs, gradient, retain_graph=True)


def _in_turns(
    functions: dict[str, Function], h: Tensor, update: Tensor, gradient: Tensor, k: int,
    alpha: float, direction: str, repeats: int,
) -> np.ndarray:  # fmt: skip
    """Seconds: [repeats, functions]."""
    work = [
        _work(function, h, update, gradient, k, alpha, direction) for function in functions.values()
    ]
    seconds = [[_seconds(one, h.is_cuda) for one in work] for _ in range(WARM_UP + repeats)]
    return np.array(seconds[WARM_UP:])


def _seconds(work: Callable[[], Any], on_gpu: bool) -> float:
    if not on_gpu:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(CYCLES_AHEAD)
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _copy_bandwidth(x: Tensor, repeats: int) -> float:
    """Bytes a second, read and written, of a copy of x."""
    out = torch.empty_like(x)
    seconds = [_seconds(lambda: out.copy_(x), x.is_cuda) for _ in range(WARM_UP + repeats)]
    return 2 * x.nbytes / float(np.median(seconds[WARM_UP:]))


def _bytes(h: Tensor, direction: str, alpha: float) -> float:
    """What has to be read and written, with a bit a value between forward and backward.

    Two where it is annealed: kept or not, and positive or not.

    Forward reads h and update and writes y; backward reads a gradient and writes one, which is
    that of both.
    """
    bits = h.numel() * (2 if alpha else 1) / 8
    moved = {"forward": 3 * h.nbytes + bits, "backward": 2 * h.nbytes + bits}
    return moved.get(direction, sum(moved.values()))


def _rows(
    seconds: np.ndarray, names: list[str], n_bytes: float, bandwidth: float | None
) -> list[dict[str, Any]]:
    ratios = seconds[:, :1] / seconds  # [repeats, functions]
    tenth, median, ninetieth = np.percentile(ratios, (10, 50, 90), axis=0)
    medians = np.median(seconds, axis=0)
    return [
        {
            "what": name,
            "ratio": round(float(median[i]), 2),
            "ratio_p10": round(float(tenth[i]), 2),
            "ratio_p90": round(float(ninetieth[i]), 2),
            "microseconds": round(float(1e6 * medians[i]), 1) if bandwidth else None,
            "of_copy": round(float(n_bytes / medians[i] / bandwidth), 3) if bandwidth else None,
            "copy_gb_s": round(bandwidth / 1e9) if bandwidth else None,
        }
        for i, name in enumerate(names)
    ]


def _show(rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    shape = f"{first['rows']:,} rows of {first['width']:,}, k={first['k']}, {first['dtype']}"
    table = Table("direction", "what", "ratio", "10%", "90%", "us", "of copy", title=shape)
    for row in rows:
        values = (row[name] for name in ("ratio", "ratio_p10", "ratio_p90"))
        on_gpu = row["microseconds"] is not None
        times = (f"{row['microseconds']:,}", f"{row['of_copy']:.0%}") if on_gpu else ()
        table.add_row(row["direction"], row["what"], *(f"{v:.2f}" for v in values), *times)
    Console().print(table)


if __name__ == "__main__":
    cli.run(main)
