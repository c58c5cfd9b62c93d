"""`gathered` as two Triton kernels: what is not zero in a row, then the rows of W that it meets.

For `gathered_gate` a third stands between, which multiplies what was found. They read from memory
how much that is, and are started alike for any number: the host never waits, and all can be
captured in a CUDA graph.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns of W that a program sums are a line of memory, 128 bytes of each row: many programs, and
# many loads on their way in each, since a row alone is far from keeping a GPU's memory busy.
LINE = 128
# Rows of W that a program loads at once: as many as are usually there.
AT_ONCE = 64
# Values that are looked at in one go by a program that looks for what is not zero.
LARGEST_PIECE = 2048
# Programs that share the values found in a row of gates.
PROGRAMS = 128


@triton.jit
def _found_kernel(
    x_pointer, places_pointer, values_pointer, counts_pointer, width, PIECE: tl.constexpr
):
    """Places and values of what is not zero in a row, in order, and how many they are."""
    row = tl.program_id(0).to(tl.int64)
    count = 0
    for start in range(0, width, PIECE):
        columns = start + tl.arange(0, PIECE)
        x = tl.load(x_pointer + row * width + columns, mask=columns < width, other=0.0)
        found = x != 0  # NaN as well
        behind = count + tl.cumsum(found.to(tl.int32), axis=0)
        place = row * width + behind - 1
        tl.store(places_pointer + place, columns, mask=found)
        tl.store(values_pointer + place, x, mask=found)
        count += tl.sum(found.to(tl.int32), axis=0)
    tl.store(counts_pointer + row, count)


@triton.jit
def _sum_kernel(
    places_pointer, values_pointer, counts_pointer, weight_pointer, y_pointer,
    width, n_outputs, WIDE: tl.constexpr, AT_ONCE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of one row of x, COLUMNS components of x W."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_row = columns < n_outputs
    real = tl.float64 if WIDE else tl.float32
    count = tl.load(counts_pointer + row)
    total = tl.zeros((COLUMNS,), real)
    for start in range(0, count, AT_ONCE):
        found = start + tl.arange(0, AT_ONCE)
        is_found = found < count
        places = tl.load(places_pointer + row * width + found, mask=is_found, other=0)
        x = tl.load(values_pointer + row * width + found, mask=is_found, other=0.0).to(real)
        w = tl.load(
            weight_pointer + places.to(tl.int64)[:, None] * n_outputs + columns[None, :],
            mask=is_found[:, None] & in_row[None, :], other=0.0,
        ).to(real)  # [AT_ONCE, COLUMNS]  # fmt: skip
        total += tl.sum(x[:, None] * w, axis=0)
    y = total.to(y_pointer.dtype.element_ty)
    tl.store(y_pointer + row * n_outputs + columns, y, mask=in_row)


@triton.jit
def _gate_kernel(
    places_pointer, values_pointer, counts_pointer, x_pointer, weight_pointer,
    n_gates, width, WIDE: tl.constexpr, PROGRAMS: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Multiply the values found in a row of gates with w3 x at their places, some a program."""
    row = tl.program_id(0).to(tl.int64)
    real = tl.float64 if WIDE else tl.float32
    count = tl.load(counts_pointer + row)
    for found in range(tl.program_id(1), count, PROGRAMS):
        place = tl.load(places_pointer + row * n_gates + found).to(tl.int64)
        total = tl.zeros((PIECE,), real)
        for start in range(0, width, PIECE):
            columns = start + tl.arange(0, PIECE)
            in_row = columns < width
            x = tl.load(x_pointer + row * width + columns, mask=in_row, other=0.0).to(real)
            w = tl.load(weight_pointer + place * width + columns, mask=in_row, other=0.0)
            total += x * w.to(real)
        stored = values_pointer.dtype.element_ty
        up = tl.sum(total, axis=0).to(stored).to(real)  # rounded, as the dense product is
        gate = tl.load(values_pointer + row * n_gates + found).to(real)
        tl.store(values_pointer + row * n_gates + found, (gate * up).to(stored))


def gathered_triton(x: Tensor, weight: Tensor) -> Tensor:
    """`gathered_definition` by the kernels. x: [N, D], weight: [D, O], of one dtype: [N, O]."""
    if len(x) == 0:
        return x.new_empty(0, weight.shape[1])
    with torch.cuda.device_of(x):  # Triton starts kernels on the current device
        return _sum(*_found(x), weight)


def gathered_gate_triton(gate: Tensor, x: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
    """`gathered_gate_definition` by the kernels.

    gate: [N, F], x: [N, D], w3: [F, D], w2: [F, O], of one dtype: [N, O].
    """
    if len(gate) == 0:
        return gate.new_empty(0, w2.shape[1])
    (n_rows, n_gates), width = gate.shape, x.shape[1]
    with torch.cuda.device_of(gate):
        places, values, counts = _found(gate)
        _gate_kernel[(n_rows, min(n_gates, PROGRAMS))](
            places, values, counts, x.contiguous(), w3.contiguous(), n_gates, width,
            WIDE=x.dtype == torch.float64, PROGRAMS=min(n_gates, PROGRAMS), PIECE=_piece(width),
            num_warps=4,
        )  # fmt: skip
        return _sum(places, values, counts, w2)


def _found(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of x [N, D] what is not zero: int32 [N, D], [N, D] and int32 [N], see `_found_kernel`."""
    places = torch.empty(x.shape, dtype=torch.int32, device=x.device)
    values = x.new_empty(x.shape)
    counts = torch.empty(len(x), dtype=torch.int32, device=x.device)
    _found_kernel[(len(x),)](
        x.contiguous(), places, values, counts, x.shape[1], PIECE=_piece(x.shape[1]), num_warps=8
    )
    return places, values, counts


def _sum(places: Tensor, values: Tensor, counts: Tensor, weight: Tensor) -> Tensor:
    """Of what was found, [N, D], the product with weight [D, O]: [N, O]."""
    (n_rows, width), n_outputs = values.shape, weight.shape[1]
    y = values.new_empty(n_rows, n_outputs)
    columns = LINE // y.element_size()
    _sum_kernel[(n_rows, triton.cdiv(n_outputs, columns))](
        places, values, counts, weight.contiguous(), y, width, n_outputs,
        WIDE=y.dtype == torch.float64, AT_ONCE=AT_ONCE, COLUMNS=columns, num_warps=4,
    )  # fmt: skip
    return y


def _piece(width: int) -> int:
    return min(triton.next_power_of_2(width), LARGEST_PIECE)
