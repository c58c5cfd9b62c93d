"""y = TopK(h + update) as one Triton kernel; its naive reference is `topk_sum_definition`.

A program takes a row, keeps it in registers and looks for the threshold: it counts how many values
reach a first guess, right for a normal row, and goes on to a better one, within a bracket that
closes. It ends as soon as exactly k reach it, or takes the last few values one after the other. Of
the passes over the row and of what a pass costs a value (a comparison and a sum) comes the time
that is spent beside that of reading and writing. By a simulation they are four on normal rows,
five to six on those of a small trained model, ten to thirty on rows that are far from normal or
full of ties; every fourth halves the bracket, so that they end.

The forward pass leaves a bit a value behind, by which backward passes gradients on: nothing is
selected twice, and of relu nothing else is kept.

Under TRITON_INTERPRET=1 (set before Triton is imported) the same code runs on a CPU.
"""

from statistics import NormalDist
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lingua_topk.ops.definition import is_whole, topk_definition, topk_sum_definition, wide_sum

INTERPRETED = triton.knobs.runtime.interpret
LARGEST_WIDTH = 8192
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# So many values in the bracket, or fewer, are taken one after the other.
FEW = tl.constexpr(4)
WORD = 32  # bits


# --- kernels ---


@triton.jit
def _key(x, WIDE: tl.constexpr):
    """The bits of a float as a signed integer; integers are ordered as the floats are."""
    if WIDE:
        bits = x.to(tl.int64, bitcast=True)
        return tl.where(bits < 0, bits ^ 0x7FFFFFFFFFFFFFFF, bits)
    else:
        bits = x.to(tl.int32, bitcast=True)
        return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _value(key, WIDE: tl.constexpr):
    """The float of a key."""
    if WIDE:
        return tl.where(key < 0, key ^ 0x7FFFFFFFFFFFFFFF, key).to(tl.float64, bitcast=True)
    else:
        return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _count(values, threshold):
    return tl.sum((values >= threshold).to(tl.int32), axis=0)


@triton.jit
def _next_probe(
    low, high, above_low, above_high, above, probe, step, k, mean, deviation, unit,
    WIDE: tl.constexpr,
):  # fmt: skip
    """The key to look at after `probe`, above which `above` values are; within the bracket."""
    real: tl.constexpr = tl.float64 if WIDE else tl.float32
    # Halfway, without overflow. Every fourth time it is this, whatever the values are.
    middle = (low >> 1) + (high >> 1) + (low & high & 1)
    key = middle
    least: tl.constexpr = -0x7FF0000000000001 if WIDE else -0x7F800001
    if step % 4 != 0:
        if (low != least) & (high != -least):
            # Behind the threshold of a row values thin out as powers do, or faster: the
            # logarithm of how many are above falls on a line with the key.
            fall = tl.log2(above_low / tl.maximum(above_high, 0.5))
            share = tl.log2(above_low / (k - 0.5)) / fall
            key = low + ((high.to(real) - low.to(real)) * share).to(low.dtype)
        else:
            # One end is still open. Near the aim, Newton's step on a normal density and somewhat
            # more, to the other side; else to the mean, or as far again from it.
            missing = (above - k).to(tl.float32)
            far = tl.abs(missing) > 4 * tl.sqrt(k.to(tl.float32))
            more = 1 + 0.5 * tl.sqrt(tl.abs(missing))
            near = probe + (missing + tl.where(above >= k, more, -more)) * unit
            outwards = mean + tl.where(above >= k, 2 * (probe - mean) + deviation, 0.0)
            guess = tl.where(far, outwards, near)
            key = tl.where(guess == guess, _key(guess, WIDE), middle)
    return tl.where((key > low) & (key < high), key, middle)


@triton.jit
def _threshold(values, total, squares, k, guess, unit, width, WIDE: tl.constexpr):
    """A float that as many of `values` reach as reach the k-th largest.

    values: [BLOCK], no NaN; what is no value is -inf. total, squares: their sum, and that of their
    squares. guess, unit: where the k-th of `width` standard normal values is to be expected, and
    the inverse density of values there.
    """
    mean = total / width
    deviation = tl.sqrt(tl.maximum(squares / width - mean * mean, 0.0))
    unit = (unit * deviation).to(tl.float32)
    # Keys: k values or more reach `low`, fewer reach `high`.
    low = tl.full((), -0x7FF0000000000001 if WIDE else -0x7F800001, tl.int64 if WIDE else tl.int32)
    high = -low
    above_low = width
    above_high = 0
    probe = mean + guess * deviation
    key = _key(probe, WIDE)
    probe = tl.where((key > low) & (key < high), probe, 0.0)
    step = 1
    searching = True
    while searching:
        above = _count(values, probe)
        key = _key(probe, WIDE)
        low = tl.where(above >= k, key, low)
        above_low = tl.where(above >= k, above, above_low)
        high = tl.where(above >= k, high, key)
        above_high = tl.where(above >= k, above_high, above)
        searching = (above_low != k) & (above_low - above_high > FEW) & (high - 1 > low)
        if searching:
            key = _next_probe(
                low, high, above_low, above_high, above, probe, step, k, mean, deviation, unit, WIDE
            )
            probe = _value(key, WIDE)
            step += 1
    threshold = _value(low, WIDE)
    # Few values are left between: the largest of them, one after the other.
    walking = (above_low != k) & (high - 1 > low)
    ceiling = _value(high, WIDE)
    while walking:
        ceiling = tl.max(tl.where(values >= ceiling, float("-inf"), values), axis=0)
        threshold = ceiling
        walking = _count(values, threshold) < k
    return threshold


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        return tl.where((x > 0) | (x != x), x, 0.0)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "silu":
        return x / (1 + tl.exp(-x))
    else:
        return x


@triton.jit
def _places(BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """Of every value of a row, its bit in its word: int32 [32 / VECTOR, words, VECTOR], flattened.

    A thread loads VECTOR values at a time, and the 32 of a word are those of one thread.
    """
    high = tl.arange(0, 32 // VECTOR)[:, None, None] * VECTOR
    places = high + tl.arange(0, VECTOR)[None, None, :]
    return tl.broadcast_to(places, (32 // VECTOR, BLOCK // 32, VECTOR))


@triton.jit
def _store_bits(pointer, bits, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """bool [BLOCK] as int32 words [BLOCK / 32]."""
    shaped = bits.to(tl.int32).reshape(32 // VECTOR, BLOCK // 32, VECTOR)
    words = tl.sum(tl.sum(shaped << _places(BLOCK, VECTOR), axis=2), axis=0)
    tl.store(pointer + tl.arange(0, BLOCK // 32), words)


@triton.jit
def _load_bits(pointer, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    words = tl.load(pointer + tl.arange(0, BLOCK // 32))
    return (((words[None, :, None] >> _places(BLOCK, VECTOR)) & 1) != 0).reshape(BLOCK)


# A k of 1 would else become a constant, which has no dtype.
@triton.jit(do_not_specialize=["k"])
def _forward_kernel(
    h_pointer, update_pointer, alpha_pointer, y_pointer, bits_pointer, rms_pointer,
    k, guess, unit, epsilon, width,
    HAS_UPDATE: tl.constexpr, HARD: tl.constexpr, ACTIVATION: tl.constexpr,
    MASKS: tl.constexpr, HAS_RMS: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr, VECTOR: tl.constexpr, IS_EVEN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = None if IS_EVEN else columns < width
    other = None if IS_EVEN else 0.0
    real: tl.constexpr = tl.float64 if WIDE else tl.float32
    x = tl.load(h_pointer + row * width + columns, mask=mask, other=other).to(real)
    if HAS_UPDATE:
        x += tl.load(update_pointer + row * width + columns, mask=mask, other=other).to(real)

    total = tl.sum(x, axis=0)
    squares = tl.sum(x * x, axis=0)
    has_nan = squares != squares  # squares add up to NaN only if one of them is
    threshold = tl.full((), float("nan"), real)  # which nothing reaches
    if has_nan == 0:
        values = x if IS_EVEN else tl.where(mask, x, float("-inf"))
        threshold = _threshold(values, total, squares, k, guess, unit, width, WIDE)
    if ACTIVATION == "relu":
        # What is not positive gives 0 either way, and what lies beyond the row is 0.
        smallest = _value(tl.full((), 1, tl.int64 if WIDE else tl.int32), WIDE)
        kept = x >= tl.where(threshold < smallest, smallest, threshold)
    else:
        kept = (x >= threshold) if IS_EVEN else (x >= threshold) & mask

    stored = y_pointer.dtype.element_ty
    f_x = x if ACTIVATION == "relu" and HARD else _activated(x, ACTIVATION)
    if not HAS_UPDATE:
        f_x = f_x.to(stored).to(real)  # as the definition, which rounds twice there
    if HARD:
        y = tl.where(kept, f_x, tl.where(has_nan, float("nan"), 0.0))
    else:
        alpha = tl.load(alpha_pointer).to(real)
        scaled = tl.where(alpha == 0, 0.0, alpha * f_x)
        y = tl.where(kept, f_x, tl.where(has_nan, float("nan"), scaled))
        y = tl.where(alpha == 1, f_x, y)
    y = y.to(stored)
    tl.store(y_pointer + row * width + columns, y, mask=mask)
    if HAS_RMS:
        wide = y.to(real)
        if not IS_EVEN:
            wide = tl.where(mask, wide, 0.0)
        tl.store(rms_pointer + row, tl.rsqrt(tl.sum(wide * wide, axis=0) / width + epsilon))

    first = bits_pointer + row * MASKS * (BLOCK // 32)
    _store_bits(first, kept, BLOCK, VECTOR)
    if MASKS == 2:
        _store_bits(first + BLOCK // 32, (x > 0) | (x != x), BLOCK, VECTOR)


@triton.jit
def _backward_kernel(
    gradient_pointer, bits_pointer, alpha_pointer, out_pointer, width,
    HARD: tl.constexpr, MASKS: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr, VECTOR: tl.constexpr, IS_EVEN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = None if IS_EVEN else columns < width
    other = None if IS_EVEN else 0.0
    gradient = tl.load(gradient_pointer + row * width + columns, mask=mask, other=other)
    gradient = gradient.to(tl.float64 if WIDE else tl.float32)
    first = bits_pointer + row * MASKS * (BLOCK // 32)
    kept = _load_bits(first, BLOCK, VECTOR)
    if HARD:
        out = tl.where(kept, gradient, 0.0)
    else:
        alpha = tl.load(alpha_pointer).to(gradient.dtype)
        out = tl.where(kept, gradient, tl.where(alpha == 0, 0.0, alpha * gradient))
        if MASKS == 2:
            out = tl.where(_load_bits(first + BLOCK // 32, BLOCK, VECTOR), out, 0.0)
    tl.store(out_pointer + row * width + columns, out.to(out_pointer.dtype.element_ty), mask=mask)


# --- operators ---


def _block_of(width: int) -> int:
    return max(WORD, triton.next_power_of_2(width))


def _shape_of(x: Tensor) -> dict[str, Any]:
    """A row of x [..., D] a warp up to 2,048 values, more warps beyond."""
    width, block = x.shape[-1], _block_of(x.shape[-1])
    return {
        "width": width, "BLOCK": block, "IS_EVEN": block == width,
        "WIDE": x.dtype == torch.float64, "num_warps": max(1, block // 2048),
    }  # fmt: skip


def _vector_of(dtype: torch.dtype) -> int:
    """How many values of y a thread loads at a time, by which the bits lie."""
    return 16 // dtype.itemsize


def _guess_of(width: int, k: int) -> tuple[float, float]:
    """Where the k-th largest of `width` standard normal values is to be expected.

    And by how much one value more lies below it: the inverse of their density there.
    """
    normal = NormalDist()
    place = normal.inv_cdf(1 - k / width)
    return place, 1 / (width * normal.pdf(place))


def _on_device(alpha: Tensor, x: Tensor) -> Tensor:
    """alpha [] in float64 beside x. One that lies on the CPU is read there: nothing waits."""
    if alpha.device == x.device:
        return alpha.double()
    return torch.full((), alpha.item(), dtype=torch.float64, device=x.device)


@torch.library.custom_op("lingua_topk::triton_topk", mutates_args=())
def _forward(
    h: Tensor, update: Tensor | None, k: int, alpha: Tensor | None, activation: str,
    epsilon: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """TopK(h + update) with 1 <= k < D; alpha None is the hard form.

    h, update: [..., D]; alpha: []. Returns y [..., D]; what backward needs, int32
    [..., masks, words]; and 1 / sqrt(mean(y^2) + epsilon), [...], empty if epsilon is None.
    """
    y, bits, rms = _outputs(h, update, alpha, activation, epsilon)
    width = h.shape[-1]
    if y.numel() == 0:
        return y, bits, rms
    with torch.cuda.device_of(h):  # Triton starts kernels on the current device
        _forward_kernel[(y.numel() // width,)](
            h.contiguous(), y if update is None else update.contiguous(),
            y if alpha is None else _on_device(alpha, h), y, bits, rms,
            k, *_guess_of(width, k), epsilon or 0.0,
            HAS_UPDATE=update is not None, HARD=alpha is None, ACTIVATION=activation,
            MASKS=bits.shape[-2], HAS_RMS=epsilon is not None, VECTOR=_vector_of(y.dtype),
            **_shape_of(y),
        )  # fmt: skip
    return y, bits, rms


@_forward.register_fake
def _(h, update, k, alpha, activation, epsilon):
    return _outputs(h, update, alpha, activation, epsilon)


def _outputs(h, update, alpha, activation, epsilon) -> tuple[Tensor, Tensor, Tensor]:
    dtype = h.dtype if update is None else torch.promote_types(h.dtype, update.dtype)
    *rows, width = h.shape
    masks = 2 if activation == "relu" and alpha is not None else 1
    return (
        h.new_empty((*rows, width), dtype=dtype),
        h.new_empty((*rows, masks, _block_of(width) // WORD), dtype=torch.int32),
        h.new_empty(
            rows if epsilon is not None else 0, dtype=torch.promote_types(dtype, torch.float32)
        ),
    )


@torch.library.custom_op("lingua_topk::triton_topk_backward", mutates_args=())
def _backward(gradient: Tensor, bits: Tensor, alpha: Tensor | None, vector: int) -> Tensor:
    """The gradient where the first bit is set, alpha times it elsewhere; 0 without the second.

    vector: of the dtype of y, whatever that of the gradient is.
    """
    out, width = gradient.new_empty(gradient.shape), gradient.shape[-1]
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(gradient):
        _backward_kernel[(out.numel() // width,)](
            gradient.contiguous(), bits, out if alpha is None else _on_device(alpha, gradient), out,
            HARD=alpha is None, MASKS=bits.shape[-2], VECTOR=vector, **_shape_of(out),
        )  # fmt: skip
    return out


@_backward.register_fake
def _(gradient, bits, alpha, vector):
    return gradient.new_empty(gradient.shape)


def _save(ctx, inputs, output) -> None:
    h, update, _, alpha, ctx.activation, ctx.epsilon = inputs
    y, bits, rms = output
    ctx.mark_non_differentiable(bits)
    ctx.vector = _vector_of(y.dtype)
    ctx.dtypes = h.dtype, None if update is None else update.dtype
    needs_x = ctx.activation in ("gelu", "silu")
    x = (h, update) if needs_x else (None, None)
    result = (None, None) if ctx.epsilon is None else (y, rms)
    ctx.save_for_backward(bits, alpha, *x, *result)


def _backward_of_forward(ctx, gradient: Tensor, _, rms_gradient: Tensor):
    bits, alpha, h, update, y, rms = ctx.saved_tensors
    if ctx.epsilon is not None:
        slope = rms_gradient * rms**3 / y.shape[-1]  # [...]
        gradient = gradient - (slope[..., None] * y).to(gradient.dtype)
    gradient = _backward(gradient, bits, alpha, ctx.vector)
    if h is not None:
        wide = torch.promote_types(h.dtype, torch.float32)
        x = h.to(wide) if update is None else wide_sum(h, update)
        # With alpha = 0 nothing infinite may meet a zero: what is dropped has the slope at 0.
        x = _backward(x, bits, None, ctx.vector) if alpha is None else x
        gradient = _SLOPES[ctx.activation](gradient.to(x.dtype), x)
    of_h, of_update = ctx.dtypes
    return (
        gradient.to(of_h), None if of_update is None else gradient.to(of_update),
        None, None, None, None,
    )  # fmt: skip


def _save_mask(ctx, inputs, output) -> None:
    _, bits, alpha, ctx.vector = inputs
    ctx.save_for_backward(bits, alpha)


def _backward_of_backward(ctx, gradient: Tensor):
    return _backward(gradient, *ctx.saved_tensors, ctx.vector), None, None, None


def _silu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    """aten's own cannot be differentiated again."""
    sigmoid = torch.sigmoid(x)
    return gradient * (sigmoid * (1 + x * (1 - sigmoid)))


_SLOPES = {"gelu": torch.ops.aten.gelu_backward, "silu": _silu_backward}
_forward.register_autograd(_backward_of_forward, setup_context=_save)
_backward.register_autograd(_backward_of_backward, setup_context=_save_mask)


# --- the backend ---


def topk_triton(x: Tensor, k: int, alpha: float | Tensor, activation: str) -> Tensor:
    """`topk_definition` by the kernel; where nothing is selected, by torch."""
    if is_whole(x, k, alpha):
        return topk_definition(x, k, alpha, activation)
    return _forward(x, None, k, _as_tensor(alpha), activation, None)[0]


def topk_sum_triton(
    h: Tensor, update: Tensor, k: int, alpha: float | Tensor, activation: str
) -> Tensor:
    """`topk_sum_definition`, as above."""
    if is_whole(h, k, alpha):
        return topk_sum_definition(h, update, k, alpha, activation)
    return _forward(h, update, k, _as_tensor(alpha), activation, None)[0]


def topk_sum_rms_triton(
    h: Tensor, update: Tensor, k: int, alpha: float | Tensor, activation: str, epsilon: float
) -> tuple[Tensor, Tensor]:
    """`topk_sum_rms_definition` by the same kernel."""
    if is_whole(h, k, alpha):
        return topk_sum_rms_definition(h, update, k, alpha, activation, epsilon)
    y, _, rms = _forward(h, update, k, _as_tensor(alpha), activation, epsilon)
    return y, rms


def topk_sum_rms_definition(
    h: Tensor, update: Tensor, k: int, alpha: float | Tensor, activation: str, epsilon: float
) -> tuple[Tensor, Tensor]:
    """TopK(h + update) and, of it, 1 / sqrt(mean(y^2) + epsilon), as RMSNorm takes it.

    h, update, y: [..., D]; the second: [...], float32, or float64 where y is.
    """
    y = topk_sum_definition(h, update, k, alpha, activation)
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    return y, torch.rsqrt(wide.square().mean(dim=-1) + epsilon)


def _as_tensor(alpha: float | Tensor) -> Tensor | None:
    if isinstance(alpha, Tensor):
        return alpha
    # A tensor, as a compiled model that is given another number would be compiled again.
    return None if alpha == 0 else alpha * torch.ones((), dtype=torch.float64)


def why_not(x: Tensor) -> str | None:
    """Why the kernel cannot run for x [..., D], or None."""
    if not x.is_cuda and not (x.device.type == "cpu" and INTERPRETED):
        return f"x is on {x.device}, and Triton runs on GPUs (on a CPU with TRITON_INTERPRET=1)"
    if x.shape[-1] > LARGEST_WIDTH:
        return f"a row has {x.shape[-1]} values, and the kernel takes up to {LARGEST_WIDTH}"
    return None if x.dtype in DTYPES else f"x is {x.dtype}"
