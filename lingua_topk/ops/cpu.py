"""TopK on a CPU: the threshold by numpy's quickselect, the rest a few passes over rows in cache.

Quickselect finds the k-th largest of a row without sorting anything, with vector
instructions, and in a share of the rows on every thread. `relu` has kernels of its own,
since training runs it: they add h and update as well, and backward takes the result, or the
inputs and the thresholds, and selects nothing. The other activations are the definition's own
expressions around the faster selection.
"""

import functools
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lingua_topk.ops.definition import is_whole, topk_definition, wide_sum

# Values that a thread works on at a time: enough that the calls cost nothing beside the work,
# few enough that these and a copy of them stay in cache.
CHUNK = 1 << 17
# Inputs with fewer values than this are done as soon or sooner by the definition: seen for up to
# 131,072 values, forward and backward between other operators, on two cores.
SMALLEST = 1 << 18

Array = NDArray[Any]


def topk_cpu(x: Tensor, k: int, alpha: float | Tensor, activation: str) -> Tensor:
    """`topk_definition`, bit for bit (but for the sign of a zero), of a tensor on the CPU."""
    if _has_kernel(x, k, alpha, activation):
        return _relu_kernel(x, None, k, alpha)
    return topk_definition(x, k, alpha, activation, select_cpu)


def topk_sum_cpu(
    h: Tensor, update: Tensor, k: int, alpha: float | Tensor, activation: str
) -> Tensor:
    """`topk_sum_definition`, as above."""
    if _has_kernel(h, k, alpha, activation):
        return _relu_kernel(h, update, k, alpha)
    y = topk_definition(wide_sum(h, update), k, alpha, activation, select_cpu)
    return y.to(torch.promote_types(h.dtype, update.dtype))


def _has_kernel(x: Tensor, k: int, alpha: float | Tensor, activation: str) -> bool:
    return activation == "relu" and not isinstance(alpha, Tensor) and not is_whole(x, k, alpha)


def _relu_kernel(h: Tensor, update: Tensor | None, k: int, alpha: float) -> Tensor:
    if alpha == 0:
        return _hard_relu(h, update, k)
    # A tensor, as a compiled model that is given another number would be compiled again.
    return _annealed_relu(h, update, k, alpha * torch.ones((), dtype=torch.float64))[0]


@torch.no_grad()
def select_cpu(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As `select_definition`."""
    threshold = _threshold(x, k)  # [..., 1]
    return x >= threshold, torch.where(threshold.isnan(), threshold, 0.0)


# --- operators: one node each for torch.compile; numpy works on what they are given at run time ---


@torch.library.custom_op("lingua_topk::cpu_threshold", mutates_args=())
def _threshold(x: Tensor, k: int) -> Tensor:
    """The k-th largest of each row, [..., 1], dtype of x; NaN for a row that holds a NaN."""
    threshold = _empty(x, x.dtype, 1)
    values, thresholds = _rows_of(x), _rows_of(threshold)

    def work(rows: slice, _: Array, buffer: Array) -> None:
        thresholds[rows] = _threshold_of(values[rows], k, buffer)

    _in_chunks(work, values)
    return threshold.to(x.dtype)


@torch.library.custom_op("lingua_topk::cpu_hard_relu", mutates_args=())
def _hard_relu(h: Tensor, update: Tensor | None, k: int) -> Tensor:
    """relu of what is kept of h + update, 0 elsewhere: [..., D], dtype of both; 1 <= k < D."""
    return _relu(h, update, k, 0.0)[0]


@torch.library.custom_op("lingua_topk::cpu_hard_relu_backward", mutates_args=())
def _hard_relu_backward(gradient: Tensor, y: Tensor) -> Tensor:
    """The gradient where y > 0, else 0: [..., D]. A row that is NaN passes none."""
    out = _empty(gradient, gradient.dtype)
    gradients, results, passed = _rows_of(gradient), _rows_of(y), _rows_of(out)

    def work(rows: slice, _: Array, __: Array) -> None:
        _copy_where(gradients[rows], results[rows] > 0, passed[rows])

    _in_chunks(work, gradients)
    return out.to(gradient.dtype)


@torch.library.custom_op("lingua_topk::cpu_annealed_relu", mutates_args=())
def _annealed_relu(
    h: Tensor, update: Tensor | None, k: int, alpha: Tensor
) -> tuple[Tensor, Tensor]:
    """relu of what is kept, alpha times it elsewhere, [..., D]; and the thresholds, [..., 1].

    alpha: float64 []; here and in its backward. The thresholds are as wide as the sum is.
    """
    return _relu(h, update, k, alpha.item())


@torch.library.custom_op("lingua_topk::cpu_annealed_relu_backward", mutates_args=())
def _annealed_relu_backward(
    gradient: Tensor, h: Tensor, update: Tensor | None, threshold: Tensor, alpha: Tensor
) -> Tensor:
    """The gradient where h + update is positive and kept, alpha times it where only positive."""
    out = _empty(gradient, gradient.dtype)
    gradients, thresholds, passed = _rows_of(gradient), _rows_of(threshold), _rows_of(out)
    read = _reader(h, update)
    scale, bits = gradients.dtype.type(alpha), _bits(gradients.dtype)

    def work(rows: slice, buffer: Array, other: Array) -> None:
        values = read(rows, buffer)
        kept = _is_kept(values, thresholds[rows])  # [n, D]
        # As torch has it, relu of a NaN passes a gradient.
        only_positive = ~((values <= 0) | kept)
        scaled = np.multiply(gradients[rows], scale, out=other)
        _copy_where(scaled, only_positive, other)
        _copy_where(gradients[rows], kept, passed[rows])
        # One of them is 0.
        whole = passed[rows].view(bits)
        np.bitwise_or(whole, other.view(bits), out=whole)

    _in_chunks(work, gradients)
    return out.to(gradient.dtype)


@_threshold.register_fake
def _(x: Tensor, k: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], 1)


@_hard_relu.register_fake
def _(h: Tensor, update: Tensor | None, k: int) -> Tensor:
    return h.new_empty(h.shape, dtype=_sum_dtype(h, update))


@_hard_relu_backward.register_fake
def _(gradient: Tensor, y: Tensor) -> Tensor:
    return gradient.new_empty(gradient.shape)


@_annealed_relu.register_fake
def _(h: Tensor, update: Tensor | None, k: int, alpha: Tensor) -> tuple[Tensor, Tensor]:
    dtype = _sum_dtype(h, update)
    return h.new_empty(h.shape, dtype=dtype), h.new_empty(*h.shape[:-1], 1, dtype=_wide(dtype))


@_annealed_relu_backward.register_fake
def _(gradient, h, update, threshold, alpha) -> Tensor:
    return gradient.new_empty(gradient.shape)


# --- their gradients. Backward is linear in the gradient, so its own gradient is itself again ---


def _save_for_hard(ctx, inputs: tuple[Any, ...], output: Tensor) -> None:
    h, update, _ = inputs
    _save_dtypes(ctx, h, update)
    ctx.save_for_backward(output)


def _save_for_annealed(ctx, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    h, update, _, alpha = inputs
    _save_dtypes(ctx, h, update)
    ctx.save_for_backward(h, update, output[1], alpha)
    ctx.mark_non_differentiable(output[1])


def _save_dtypes(ctx, h: Tensor, update: Tensor | None) -> None:
    ctx.dtypes = h.dtype, None if update is None else update.dtype


def _save_all_but_the_gradient(ctx, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _of_both(ctx, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
    of_h, of_update = ctx.dtypes
    return gradient.to(of_h), None if of_update is None else gradient.to(of_update)


def _backward_of_hard(ctx, gradient: Tensor) -> tuple[Any, ...]:
    return *_of_both(ctx, _hard_relu_backward(gradient, *ctx.saved_tensors)), None


def _backward_of_hard_backward(ctx, gradient: Tensor) -> tuple[Any, ...]:
    return _hard_relu_backward(gradient, *ctx.saved_tensors), None


def _backward_of_annealed(ctx, gradient: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    return *_of_both(ctx, _annealed_relu_backward(gradient, *ctx.saved_tensors)), None, None


def _backward_of_annealed_backward(ctx, gradient: Tensor) -> tuple[Any, ...]:
    return _annealed_relu_backward(gradient, *ctx.saved_tensors), None, None, None, None


_hard_relu.register_autograd(_backward_of_hard, setup_context=_save_for_hard)
_hard_relu_backward.register_autograd(
    _backward_of_hard_backward, setup_context=_save_all_but_the_gradient
)
_annealed_relu.register_autograd(_backward_of_annealed, setup_context=_save_for_annealed)
_annealed_relu_backward.register_autograd(
    _backward_of_annealed_backward, setup_context=_save_all_but_the_gradient
)


# --- numpy ---


def _sum_dtype(h: Tensor, update: Tensor | None) -> torch.dtype:
    return h.dtype if update is None else torch.promote_types(h.dtype, update.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What numpy computes in: float64, or float32, which holds half precision."""
    return torch.promote_types(dtype, torch.float32)


def _rows_of(x: Tensor, dtype: torch.dtype | None = None) -> Array:
    """x as rows [N, D], float64 or float32; of that dtype if one is given."""
    wide = x.to(_wide(dtype or x.dtype))
    return wide.detach().reshape(-1, x.shape[-1]).contiguous().numpy()


def _empty(like: Tensor, dtype: torch.dtype, width: int | None = None) -> Tensor:
    """For rows of that width (of `like`, [..., D], if None), as wide as `_rows_of` makes them.

    `_rows_of` the result shares its memory. It is no view: FSDP2 warns of results that are.
    """
    return torch.empty((*like.shape[:-1], width or like.shape[-1]), dtype=_wide(dtype))


def _reader(h: Tensor, update: Tensor | None) -> Callable[[slice, Array], Array]:
    """read(rows, buffer): those rows of h + update, in the buffer or where they lie."""
    dtype = _sum_dtype(h, update)
    first = _rows_of(h, dtype)
    if update is None:
        return lambda rows, buffer: first[rows]
    second = _rows_of(update, dtype)
    return lambda rows, buffer: np.add(first[rows], second[rows], out=buffer)


def _relu(h: Tensor, update: Tensor | None, k: int, alpha: float) -> tuple[Tensor, Tensor]:
    dtype = _sum_dtype(h, update)
    y, threshold = _empty(h, dtype), _empty(h, dtype, 1)
    results, thresholds, read = _rows_of(y), _rows_of(threshold), _reader(h, update)
    scale = results.dtype.type(alpha)

    def work(rows: slice, buffer: Array, other: Array) -> None:
        values = read(rows, buffer)
        thresholds[rows] = _threshold_of(values, k, other)
        _relu_above(values, thresholds[rows], scale, other, out=results[rows])

    _in_chunks(work, results)
    return y.to(dtype), threshold


def _threshold_of(values: Array, k: int, buffer: Array) -> Array:
    """The k-th largest of each row of values [N, D], or NaN: [N, 1]. buffer: [N, D], lost."""
    last = values.shape[1] - k
    np.copyto(buffer, values)
    buffer.partition(last, axis=1)  # NaN counts as the largest
    largest = np.maximum.reduce(buffer[:, last:], axis=1, keepdims=True)  # or NaN
    return np.where(np.isnan(largest), largest, buffer[:, last : last + 1])


def _relu_above(values: Array, threshold: Array, alpha: Any, buffer: Array, out: Array) -> None:
    """TopK with relu of values [N, D], given their thresholds [N, 1], into out [N, D]."""
    _copy_where(values, _is_kept(values, threshold), out)
    if alpha:
        np.maximum(out, np.multiply(values, alpha, out=buffer), out=out)
    poisoned = np.isnan(threshold[:, 0])
    if poisoned.any():
        out[poisoned] = np.nan


def _is_kept(values: Array, threshold: Array) -> Array:
    """What is kept of values [N, D] and positive: what is not gives 0 either way. bool [N, D]."""
    return values >= np.maximum(threshold, np.finfo(values.dtype).smallest_subnormal)


def _copy_where(values: Array, where: Array, out: Array) -> None:
    """out = values where it is true, else 0; both [N, D] of one floating dtype.

    The bits of a value times 1 or 0, which takes half the time of numpy's own `where`; the
    value itself may be infinite, and infinity times 0 is not 0.
    """
    bits = _bits(values.dtype)
    np.multiply(values.view(bits), where, out=out.view(bits))


def _bits(dtype: np.dtype) -> np.dtype:
    """The integers of a floating dtype's width."""
    return np.dtype(f"i{dtype.itemsize}")


def _in_chunks(work: Callable[[slice, Array, Array], None], values: Array) -> None:
    """work(rows, buffer, other) for all rows of values [N, D], on torch's number of threads.

    buffer, other: of the shape and dtype of those rows, the thread's own.
    """
    n_rows, width = values.shape
    step = max(1, CHUNK // max(1, width))
    # All threads take from it: one that is held up takes fewer.
    starts = iter(range(0, n_rows, step))

    def share() -> None:
        buffers = np.empty_like(values, shape=(2, min(step, n_rows), width))
        with np.errstate(invalid="ignore", over="ignore", under="ignore"):  # as torch
            for start in starts:
                stop = min(start + step, n_rows)
                work(slice(start, stop), *buffers[:, : stop - start])

    threads = min(torch.get_num_threads(), -(-n_rows // step))
    others = _submitted(share, threads - 1)
    share()
    for other in others:
        other.result()


def _submitted(work: Callable[[], None], times: int) -> list[Future]:
    """Threads of the pool that do it; none at the end of the process, when no more may begin."""
    begun: list[Future] = []
    with suppress(RuntimeError):
        for _ in range(times):
            begun.append(_pool(os.getpid()).submit(work))
    return begun


@functools.lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    """Threads of this process: a forked one has none of its parent's."""
    return ThreadPoolExecutor(os.cpu_count(), "lingua_topk")
