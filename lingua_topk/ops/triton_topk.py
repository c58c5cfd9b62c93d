"""y = TopK(h + update) as one Triton kernel; its naive reference is `topk_sum_definition`.

A program takes a row and keeps it in registers. It bisects the threshold on the bits of
the values, ordered as integers, between two guesses that hold for normal rows, and ends
as soon as exactly k values are above. The forward pass leaves a bit a value behind, by
which backward passes gradients on: nothing is selected twice, and of relu nothing else
is kept.

Under TRITON_INTERPRET=1 (set before Triton is imported) the same code runs on a CPU.
"""

from statistics import NormalDist

import torch
import triton
import triton.language as tl
from torch import Tensor

from lingua_topk.ops.definition import is_whole, topk_definition, topk_sum_definition, wide_sum

INTERPRETED = triton.knobs.runtime.interpret
LARGEST_WIDTH = 8192
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Half the width of the first bracket, in standard deviations of the row.
BRACKET = 0.25
WORD = 32  # bits


# --- kernels ---


@triton.jit
def _ordered(x, WIDE: tl.constexpr):
    """The bits of floats as signed integers that are ordered as the floats are.

    NaN counts as 0 (its row is NaN whatever is kept): a GPU's own NaN would be the largest
    integer, and the bracket's upper end, one more, would overflow.
    """
    x = tl.where((x == 0) | (x != x), 0.0, x)  # -0.0 ties with 0.0
    if WIDE:
        bits = x.to(tl.int64, bitcast=True)
        return tl.where(bits < 0, bits ^ 0x7FFFFFFFFFFFFFFF, bits)
    else:
        bits = x.to(tl.int32, bitcast=True)
        return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _narrowed(keys, k, low, high, above_low, probe):
    """The bracket after a look at `probe`, which may lie outside."""
    above = tl.sum((keys >= probe).to(tl.int32), axis=0)
    is_low = (above >= k) & (probe > low)
    is_high = (above < k) & (probe < high)
    return (
        tl.where(is_low, probe, low),
        tl.where(is_high, probe, high),
        tl.where(is_low, above, above_low),
    )


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
def _store_bits(pointer, bits, n_words, BLOCK: tl.constexpr):
    """bool [BLOCK] as int32 words, the first value in the lowest bit."""
    places = (bits.to(tl.int32)).reshape(BLOCK // 32, 32) << tl.arange(0, 32)[None, :]
    words = tl.arange(0, BLOCK // 32)
    tl.store(pointer + words, tl.sum(places, axis=1), mask=words < n_words)


@triton.jit
def _load_bits(pointer, columns, mask):
    return ((tl.load(pointer + columns // 32, mask=mask, other=0) >> (columns % 32)) & 1) != 0


@triton.jit
def _forward_kernel(
    h_pointer, update_pointer, alpha_pointer, y_pointer, bits_pointer, rms_pointer,
    k, guess, epsilon, width, n_words,
    HAS_UPDATE: tl.constexpr, HARD: tl.constexpr, ACTIVATION: tl.constexpr,
    MASKS: tl.constexpr, HAS_RMS: tl.constexpr, BRACKET: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    real = tl.float64 if WIDE else tl.float32
    x = tl.load(h_pointer + row * width + columns, mask=mask, other=0.0).to(real)
    if HAS_UPDATE:
        x += tl.load(update_pointer + row * width + columns, mask=mask, other=0.0).to(real)
    has_nan = tl.max((x != x).to(tl.int32), axis=0) != 0

    keys = _ordered(x, WIDE)
    # What lies beyond the row gets a key below all in it.
    largest = tl.max(keys, axis=0)
    lowest = tl.min(tl.where(mask, keys, largest), axis=0)
    high = tl.max(tl.where(mask, keys, lowest), axis=0) + 1
    keys = tl.where(mask, keys, lowest - 1)
    low = lowest
    above_low = width
    mean = tl.sum(x, axis=0) / width
    spread = tl.where(mask, x - mean, 0.0)
    deviation = tl.sqrt(tl.sum(spread * spread, axis=0) / width)
    for side in tl.static_range(2):
        probe = mean + (guess + (2 * side - 1) * BRACKET) * deviation
        low, high, above_low = _narrowed(keys, k, low, high, above_low, _ordered(probe, WIDE))
    # Floor of the mean without overflow; it is `low` once nothing lies between.
    middle = (low >> 1) + (high >> 1) + (low & high & 1)
    while (middle != low) & (above_low != k):
        low, high, above_low = _narrowed(keys, k, low, high, above_low, middle)
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
    kept = (keys >= low) & mask & (has_nan == 0)

    stored = y_pointer.dtype.element_ty
    f_x = _activated(x, ACTIVATION)
    if not HAS_UPDATE:
        f_x = f_x.to(stored).to(real)  # as the definition, which rounds twice there
    if HARD:
        y = tl.where(kept, f_x, 0.0)
        y = tl.where(has_nan, float("nan"), y)
    else:
        alpha = tl.load(alpha_pointer).to(real)
        scaled = tl.where(alpha == 0, 0.0, alpha * f_x)
        y = tl.where(kept, f_x, tl.where(has_nan, float("nan"), scaled))
        y = tl.where(alpha == 1, f_x, y)
    y = y.to(stored)
    tl.store(y_pointer + row * width + columns, y, mask=mask)
    if HAS_RMS:
        squares = tl.where(mask, y.to(real) * y.to(real), 0.0)
        tl.store(rms_pointer + row, tl.rsqrt(tl.sum(squares, axis=0) / width + epsilon))

    first = bits_pointer + row * MASKS * n_words
    if ACTIVATION == "relu":
        positive = ((x > 0) | (x != x)) & mask
        _store_bits(first, kept & positive, n_words, BLOCK)
        if MASKS == 2:
            _store_bits(first + n_words, positive, n_words, BLOCK)
    else:
        _store_bits(first, kept, n_words, BLOCK)


@triton.jit
def _backward_kernel(
    gradient_pointer, bits_pointer, alpha_pointer, out_pointer, width, n_words,
    HARD: tl.constexpr, MASKS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    gradient = tl.load(gradient_pointer + row * width + columns, mask=mask, other=0.0)
    gradient = gradient.to(tl.float64 if WIDE else tl.float32)
    first = bits_pointer + row * MASKS * n_words
    kept = _load_bits(first, columns, mask)
    if HARD:
        out = tl.where(kept, gradient, 0.0)
    else:
        alpha = tl.load(alpha_pointer).to(gradient.dtype)
        out = tl.where(kept, gradient, tl.where(alpha == 0, 0.0, alpha * gradient))
        if MASKS == 2:
            out = tl.where(_load_bits(first + n_words, columns, mask), out, 0.0)
    tl.store(out_pointer + row * width + columns, out.to(out_pointer.dtype.element_ty), mask=mask)


# --- operators ---


def _shape_of(width: int) -> dict[str, int]:
    """A row a warp up to 2,048 values, more warps beyond."""
    block = max(WORD, triton.next_power_of_2(width))
    return {"BLOCK": block, "num_warps": max(1, block // 2048)}


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
            k, NormalDist().inv_cdf(1 - k / width), epsilon or 0.0, width, bits.shape[-1],
            HAS_UPDATE=update is not None, HARD=alpha is None, ACTIVATION=activation,
            MASKS=bits.shape[-2], HAS_RMS=epsilon is not None, BRACKET=BRACKET,
            WIDE=y.dtype == torch.float64, **_shape_of(width),
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
        h.new_empty((*rows, masks, -(-width // WORD)), dtype=torch.int32),
        h.new_empty(
            rows if epsilon is not None else 0, dtype=torch.promote_types(dtype, torch.float32)
        ),
    )


@torch.library.custom_op("lingua_topk::triton_topk_backward", mutates_args=())
def _backward(gradient: Tensor, bits: Tensor, alpha: Tensor | None) -> Tensor:
    """The gradient where the first bit is set, alpha times it elsewhere; 0 without the second."""
    out, width = gradient.new_empty(gradient.shape), gradient.shape[-1]
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(gradient):
        _backward_kernel[(out.numel() // width,)](
            gradient.contiguous(), bits, out if alpha is None else _on_device(alpha, gradient), out,
            width, bits.shape[-1], HARD=alpha is None, MASKS=bits.shape[-2],
            WIDE=out.dtype == torch.float64, **_shape_of(width),
        )  # fmt: skip
    return out


@_backward.register_fake
def _(gradient, bits, alpha):
    return gradient.new_empty(gradient.shape)


def _save(ctx, inputs, output) -> None:
    h, update, _, alpha, ctx.activation, ctx.epsilon = inputs
    y, bits, rms = output
    ctx.mark_non_differentiable(bits)
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
    gradient = _backward(gradient, bits, alpha)
    if h is not None:
        wide = torch.promote_types(h.dtype, torch.float32)
        x = h.to(wide) if update is None else wide_sum(h, update)
        # With alpha = 0 nothing infinite may meet a zero: what is dropped has the slope at 0.
        x = _backward(x, bits, None) if alpha is None else x
        gradient = _SLOPES[ctx.activation](gradient.to(x.dtype), x)
    of_h, of_update = ctx.dtypes
    return (
        gradient.to(of_h), None if of_update is None else gradient.to(of_update),
        None, None, None, None,
    )  # fmt: skip


def _save_mask(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward_of_backward(ctx, gradient: Tensor):
    return _backward(gradient, *ctx.saved_tensors), None, None


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
