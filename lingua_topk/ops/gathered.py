"""y = x W for rows of which few components are not zero: of W, only what they meet is read.

W is feature-major, [D, O], so that what a component meets is one run of memory. Exact up to the
order of the sum, for any number of components. No gradient: it is for decoding, where reading
the weights is what a token costs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from lingua_topk.errors import ConfigError

# What can run, asked once: it is needed for every block of every token.
_HAS_TRITON = find_spec("triton") is not None
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Crossover:
    """Up to where gathering is faster than a dense product.

    Attributes:
        smallest: weights that have to be there: below it is the start of the operators that counts.
        of_row: what part of the width may be found in a row, as a mean.
        of_all: what part of the width may be found in all rows together.
    """

    smallest: int
    of_row: float
    of_all: float


# Measured by one thread on a server (D = 64 to 2048, batch 1 to 128, 1 / 64 of a row to all of it,
# fp32 and bf16). Gathering takes time by the row that is read, about twice what the dense product
# takes for it at batch 1; the dense product of several rows takes more than that of one, but far
# from as many times. With q, k and v, at D = 128 both take the same; from D = 256 on gathering was
# 1.3 to 4 times as fast at the edge, and at D = 2048 with k = 64 some 15 times.
LINEAR = Crossover(smallest=2**17, of_row=1 / 4, of_all=1.0)
# The same for a gate: the rows of w3 are copied together before they are multiplied. At D = 512
# and above, 1.1 to 1.6 times as fast at the edge, and at D = 2048 with k = 64 6 to 7 times.
GATE = Crossover(smallest=2**20, of_row=1 / 16, of_all=1.0)
# The part of W's rows that may be read on a GPU. By the count of bytes gathering wins below 1;
# not measured, hence with a margin for reading in pieces instead of in one go.
SHARE_ON_GPU = 0.5


def gathered_definition(x: Tensor, weight: Tensor) -> Tensor:
    """x W, dense: what `gathered` is, in whatever order the sum is taken."""
    return x @ weight


def gathered(x: Tensor, weight: Tensor) -> Tensor:
    """x W, by reading those rows of W that meet a component of x which is not zero.

    Args:
        x: [..., D], float64, float32, bfloat16 or float16. A NaN is not zero, so that its row
            is NaN throughout.
        weight: [D, O], contiguous, finite (what zeros meet is not looked at), of x's dtype and
            on its device.

    Returns: [..., O], x's dtype; of half precision the sum is taken in float32.

    Raises: ConfigError where shapes, dtypes or devices do not fit, or where a gradient is asked
    for, which there is not.
    """
    _check(x, weight)
    rows = x.reshape(-1, x.shape[-1])  # [N, D]
    y = _of_rows(rows)(rows, weight)
    return y.unflatten(0, x.shape[:-1]) if x.dim() > 1 else y[0]


def gathered_gate_definition(gate: Tensor, x: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
    """The gated product, dense: what `gathered_gate` is, in whatever order the sum is taken."""
    return (gate * (x @ w3.t())) @ w2


def gathered_gate(gate: Tensor, x: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
    """(gate * w3 x) W2, by reading those rows of both that meet a gate which is not zero.

    Args:
        gate: [..., F], as x of `gathered`; behind a gate of zero w3 x must be finite.
        x: [..., D].
        w3: [F, D], as it is in a linear layer.
        w2: [F, O], feature-major; both contiguous and finite.

    Returns: [..., O], of the one dtype of all. Of half precision sums are taken in float32, and
    rounded where the dense product rounds.

    Raises: ConfigError as `gathered` does.
    """
    _check(gate, w2)
    _check(x, w3.t())
    if gate.shape[:-1] != x.shape[:-1] or gate.shape[-1] != len(w3):
        raise ConfigError(
            f"gate {tuple(gate.shape)}, x {tuple(x.shape)} and w3 {tuple(w3.shape)}: gathered_gate"
            " takes [..., F], [..., D] and [F, D]"
        )
    gates, rows = gate.reshape(-1, gate.shape[-1]), x.reshape(-1, x.shape[-1])  # [N, F], [N, D]
    y = _gate_of_rows(gates)(gates, rows, w3, w2)
    return y.unflatten(0, x.shape[:-1]) if x.dim() > 1 else y[0]


def pays_off(x: Tensor, n_outputs: int, k: int, crossover: Crossover = LINEAR) -> bool:
    """Whether gathering is faster for x [..., D] than the dense product with W [D, n_outputs].

    k: how many components of a row are not zero, as far as is known; on a CPU they are counted.
    """
    width, n_rows = x.shape[-1], x.numel() // x.shape[-1]
    if width * n_outputs < crossover.smallest or x.dtype not in DTYPES:
        return False
    if x.device.type == "cpu":
        found = int(torch.count_nonzero(x))
        return found <= crossover.of_all * width and found <= crossover.of_row * n_rows * width
    # Counting would wait for the GPU.
    return x.is_cuda and _HAS_TRITON and n_rows * k <= SHARE_ON_GPU * width


def _check(x: Tensor, weight: Tensor) -> None:
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != len(weight):
        raise ConfigError(
            f"x {tuple(x.shape)} and weight {tuple(weight.shape)}: gathered takes [..., D] and"
            " [D, O]"
        )
    if x.dtype != weight.dtype or x.dtype not in DTYPES or x.device != weight.device:
        raise ConfigError(
            f"x is {x.dtype} on {x.device}, weight {weight.dtype} on {weight.device}: give both in"
            " one floating dtype, on one device"
        )
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        raise ConfigError("gathered has no gradient: call it in torch.no_grad(), or use x @ weight")


def _of_rows(x: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    if x.device.type == "cpu":
        return _by_bags
    if x.is_cuda and _HAS_TRITON:
        from lingua_topk.ops.triton_gathered import gathered_triton

        return gathered_triton
    return gathered_definition


def _gate_of_rows(gate: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    if gate.device.type == "cpu":
        return _gate_by_bags
    if gate.is_cuda and _HAS_TRITON:
        from lingua_topk.ops.triton_gathered import gathered_gate_triton

        return gathered_gate_triton
    return gathered_gate_definition


def _by_bags(x: Tensor, weight: Tensor) -> Tensor:
    """By the weighted sum of embeddings, a bag for each row of x [N, D]: [N, O]."""
    rows, columns = x.nonzero(as_tuple=True)  # [n], ordered by row
    return _bags(columns, _starts(rows, len(x)), x[rows, columns], weight)


def _gate_by_bags(gate: Tensor, x: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
    """gate [N, F], x [N, D], w3 [F, D], w2 [F, O]: [N, O]."""
    if len(x) == 0:
        return x.new_empty(0, w2.shape[1])
    rows, columns = gate.nonzero(as_tuple=True)  # [n]
    starts = _starts(rows, len(x))
    own = columns.tensor_split(starts[1:])  # of each row
    up = torch.cat([w3[one] @ row for one, row in zip(own, x, strict=True)])  # [n]
    return _bags(columns, starts, gate[rows, columns] * up, w2)


def _starts(rows: Tensor, n_rows: int) -> Tensor:
    """Where each of N rows begins in what is ordered by row: int64 [N]."""
    return torch.searchsorted(rows, torch.arange(n_rows, device=rows.device))


def _bags(columns: Tensor, starts: Tensor, values: Tensor, weight: Tensor) -> Tensor:
    """The sums of values [n] times rows `columns` [n] of weight, from each start on: [N, O]."""
    return F.embedding_bag(columns, weight, starts, mode="sum", per_sample_weights=values)
