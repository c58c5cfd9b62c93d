"""TopK as it is defined, in plain torch: what every faster backend is tested against.

For a row x of width D, T the k-th largest component of x, f the activation and a in
[0, 1] (arXiv 2506.21468, and the annealed form of its section on training):

    y_i = f(x_i)        where x_i >= T
    y_i = a f(x_i)      elsewhere

with T a constant to the gradient: dy_i/dx_i = f'(x_i) (a + (1 - a) 1{x_i >= T}).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def _identity(x: Tensor) -> Tensor:
    return x


# What is dropped is f of a masked zero, and a NaN must pass through: whatever is added
# here must have f(0) = 0 and f(NaN) = NaN.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "identity": _identity,
    "gelu": F.gelu,
    "silu": F.silu,
}


# Of x [..., D] and k: what is kept, bool [..., D], and poison [..., 1]; see `select_definition`.
Select = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def is_whole(x: Tensor, k: int, alpha: float | Tensor) -> bool:
    """Whether TopK of x is f(x): nothing is dropped, and nothing is selected."""
    return k >= x.shape[-1] or (not isinstance(alpha, Tensor) and alpha == 1)


def topk_definition(
    x: Tensor, k: int, alpha: float | Tensor, activation: str, select: Select | None = None
) -> Tensor:
    """TopK of the last dimension, arguments already checked; see `lingua_topk.topk`.

    x and the result: [..., D], any floating dtype. alpha: a float, or a 0-d tensor on
    the device of x. select: another way to find what `select_definition` finds.
    """
    f = ACTIVATIONS[activation]
    if is_whole(x, k, alpha):
        return f(x)
    select = select or select_definition
    kept, poison = select(x, k)  # [..., D], [..., 1]
    if isinstance(alpha, Tensor):
        return _with_tensor_alpha(x, kept, poison, alpha, f)
    if alpha == 0:
        # x is masked, not f(x): the slope of silu at -inf is NaN in torch, and where()
        # would multiply it by the zero gradient of what is dropped.
        return f(torch.where(kept, x, poison))
    f_x = f(x)
    return torch.where(kept, f_x, alpha * f_x + poison)


def topk_sum_definition(
    h: Tensor, update: Tensor, k: int, alpha: float | Tensor, activation: str
) -> Tensor:
    """TopK(h + update), arguments already checked; see `lingua_topk.ops.topk_sum`.

    h, update: [..., D], floating dtypes. The result has the dtype of their sum, and is
    rounded to it once, at the end: of half precision, the sum is selected on in float32.
    """
    x = wide_sum(h, update)
    return topk_definition(x, k, alpha, activation).to(torch.promote_types(h.dtype, update.dtype))


def wide_sum(h: Tensor, update: Tensor) -> Tensor:
    """h + update, [..., D], in float32, or in float64 where one of them is."""
    wide = torch.promote_types(torch.promote_types(h.dtype, update.dtype), torch.float32)
    return h.to(wide) + update.to(wide)


def _with_tensor_alpha(
    x: Tensor, kept: Tensor, poison: Tensor, alpha: Tensor, f: Callable[[Tensor], Tensor]
) -> Tensor:
    """All three cases of alpha in one expression: its value is never read."""
    # With alpha = 0 nothing infinite may meet the factor zero.
    f_x = f(torch.where(kept | (alpha != 0), x, poison))  # [..., D]
    # As torch does for a float: alpha is not rounded to half precision, the product is.
    wide = torch.promote_types(x.dtype, torch.float32)
    scaled = (alpha.to(wide) * f_x.to(wide)).to(x.dtype)
    y = torch.where(kept, f_x, scaled + poison)
    return torch.where(alpha == 1, f_x, y)


@torch.no_grad()
def select_definition(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Which components of each row are at least its k-th largest.

    x: [..., D] with 1 <= k < D. Returns kept, bool [..., D], ties at the threshold
    included; and poison, dtype of x [..., 1]: zero, or NaN for a row that holds a NaN.
    Nothing of such a row is kept, so that adding `poison` to what is not kept makes
    the whole row NaN instead of passing a part of it on as if nothing had happened.
    """
    largest = torch.topk(x, k, dim=-1).values  # [..., k], falling, NaN first
    has_nan = largest[..., :1].isnan()  # [..., 1]
    threshold = torch.where(has_nan, torch.nan, largest[..., -1:])
    poison = torch.where(has_nan, torch.nan, 0.0).to(x.dtype)
    return x >= threshold, poison
