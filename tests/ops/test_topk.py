"""The operator against its definition, written out here a second time in plain Python."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from lingua_topk import topk
from lingua_topk.errors import ConfigError
from lingua_topk.ops.backends import use
from lingua_topk.ops.definition import ACTIVATIONS

FUNCTIONS = {"relu": F.relu, "identity": lambda x: x, "gelu": F.gelu, "silu": F.silu}
SLOPES = {
    "relu": lambda x: (x > 0).to(x.dtype),
    "identity": torch.ones_like,
    "gelu": lambda x: (
        0.5 * (1 + torch.erf(x / math.sqrt(2)))
        + x * torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    ),
    "silu": lambda x: torch.sigmoid(x) * (1 + x * (1 - torch.sigmoid(x))),
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Multiples of 1/4 leave a product exact in every dtype, but for one rounding of the result.
ALPHAS = (0.0, 0.25, 0.75, 1.0)
NAN, INF = math.nan, math.inf


@pytest.fixture(params=["plain", "cpu"], scope="module", autouse=True)
def backend(request):
    """Every test here runs with each; triton, which takes its time on a CPU, has its own file."""
    with use(request.param):
        yield


def kept_by_definition(row: list[float], k: int) -> list[bool]:
    threshold = sorted(row, reverse=True)[:k][-1]
    return [value >= threshold for value in row]


def by_definition(x: Tensor, k: int, alpha: float, activation: str) -> Tensor:
    """Row by row, in Python floats; f itself is torch's. x holds no NaN."""
    f_x = FUNCTIONS[activation](x)
    rows = []
    for row, f_row in zip(x.reshape(-1, x.shape[-1]), f_x.reshape(-1, x.shape[-1]), strict=True):
        kept = kept_by_definition(row.tolist(), k)
        for is_kept, f in zip(kept, f_row.tolist(), strict=True):
            rows.append(f if is_kept or alpha == 1 else 0.0 if alpha == 0 else alpha * f)
    return torch.tensor(rows, dtype=torch.float64).to(x.dtype).view(x.shape)


def slopes_by_definition(x: Tensor, k: int, alpha: float, activation: str) -> Tensor:
    """f'(x) (a + (1 - a) 1{x >= T})"""
    kept = [kept_by_definition(row, k) for row in x.reshape(-1, x.shape[-1]).tolist()]
    kept = torch.tensor(kept, dtype=x.dtype).view(x.shape)
    return SLOPES[activation](x) * (alpha + (1 - alpha) * kept)


def normal(*shape: int, dtype=torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def gradient(x: Tensor, weight: Tensor, *arguments) -> Tensor:
    """Of sum(weight * topk(x, ...)) by x."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(topk(x, *arguments), x, weight)[0]


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7,), (5, 16), (2, 3, 9), (1, 1, 1, 2)], ids=str)
def test_forward_is_the_definition(shape, dtype, activation):
    x = normal(*shape, dtype=dtype)
    for k in {1, 2, shape[-1] - 1}:
        for alpha in ALPHAS:
            same(topk(x, k, alpha, activation), by_definition(x, k, alpha, activation))


# Few values, so that ties are common.
@given(
    st.lists(st.sampled_from([-INF, -1.0, -0.0, 0.0, 0.5, 1.0, INF]), min_size=1, max_size=8),
    st.integers(1, 9),
    st.sampled_from(ALPHAS),
    st.sampled_from(["relu", "identity"]),
)
def test_ties_and_infinities(row, k, alpha, activation):
    x = torch.tensor(row)
    same(topk(x, k, alpha, activation), by_definition(x, k, alpha, activation))


def test_ties_at_the_threshold_are_kept():
    x = torch.tensor([[3.0, 2.0, 2.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    same(topk(x, 2), torch.tensor([[3.0, 2.0, 2.0, 2.0, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0]]))
    same(gradient(x, torch.ones_like(x), 2), (x > 1).float().index_fill(0, torch.tensor(1), 1))


def test_fewer_than_k_positive_values_are_not_filled_up():
    x = torch.tensor([-1.0, 2.0, -3.0, -2.0])
    same(topk(x, 3), torch.tensor([0.0, 2.0, 0.0, 0.0]))
    same(topk(x, 3, 0.0, "identity"), torch.tensor([-1.0, 2.0, 0.0, -2.0]))


def test_selection_is_by_x_not_by_its_activation():
    x = torch.tensor([-10.0, -1.0, -5.0])  # silu(-10) is the largest of the three
    same(topk(x, 1, 0.0, "silu") != 0, torch.tensor([False, True, False]))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("k", [6, 7, 1000])
def test_k_of_the_width_or_more_is_f(k, activation):
    x = normal(4, 6)
    x[1, 2], x[2, 3], x[3, 4] = NAN, INF, -INF
    for alpha in (0.0, 0.5, torch.tensor(0.0)):
        same(topk(x, k, alpha, activation), FUNCTIONS[activation](x))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (3, 0), (0,), (0, 0)], ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, torch.tensor(0.5)], ids=str)
def test_empty(shape, alpha):
    x = torch.zeros(shape, requires_grad=True)
    y = topk(x, 2, alpha)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.t(),
        lambda x: x[:, ::2],
        lambda x: x[1:, 1:],
        lambda x: x.unsqueeze(1).expand(-1, 3, -1),
    ],
    ids=["transposed", "strided", "offset", "expanded"],
)
def test_strides_do_not_matter(view, alpha):
    x = view(normal(6, 10))
    assert not x.is_contiguous()
    weight = normal(*x.shape, seed=1)
    same(topk(x, 3, alpha), by_definition(x, 3, alpha, "relu"))
    same(gradient(x, weight, 3, alpha), gradient(x.contiguous(), weight, 3, alpha))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("alpha", [0.0, 0.5, torch.tensor(0.0), torch.tensor(0.5)], ids=str)
def test_a_row_with_a_nan_is_nan_and_the_others_are_not_touched(alpha, activation):
    clean = normal(4, 8)
    x = clean.clone()
    x[1, 3] = NAN
    x[2, 0], x[2, 5] = NAN, INF
    y = topk(x, 2, alpha, activation)
    assert y[1:3].isnan().all()
    same(y[::3], topk(clean, 2, alpha, activation)[::3])


@pytest.mark.parametrize("alpha", [1.0, torch.tensor(1.0)], ids=str)
def test_alpha_one_is_f_on_a_row_with_a_nan_too(alpha):
    x = torch.tensor([[1.0, NAN, -INF, INF]])
    same(topk(x, 1, alpha), torch.tensor([[1.0, NAN, 0.0, INF]]))
    same(topk(x, 1, alpha, "identity"), x)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("alpha", [0.0, torch.tensor(0.0)], ids=str)
def test_what_is_dropped_is_zero_whatever_it_was(alpha, activation):
    # silu and gelu of -inf, and their slopes, are NaN in torch.
    x = torch.tensor([[-INF, 3.0, 1.0, -1.0]])
    kept = torch.tensor([[False, True, False, False]])
    y = topk(x, 1, alpha, activation)
    assert y[kept] == FUNCTIONS[activation](x)[kept] and y[~kept].eq(0).all()
    slopes = gradient(x, torch.ones_like(x), 1, alpha, activation)
    assert slopes[kept] != 0 and slopes[~kept].eq(0).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, torch.tensor(0.3)], ids=str)
def test_gradient_is_the_definition(alpha, activation):
    x, weight = normal(5, 3, 12), normal(5, 3, 12, seed=1)
    expected = weight * slopes_by_definition(x, 4, float(alpha), activation)
    actual = gradient(x, weight, 4, alpha, activation)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert actual[expected == 0].eq(0).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, torch.tensor(0.3).double()], ids=str)
def test_gradient_is_the_finite_difference(alpha, activation):
    # No value is within 0.1 of another or of the kink of relu: no step crosses a threshold.
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    x = ((order.double() - 11.5) / 5).view(3, 8).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: topk(x, 3, alpha, activation), x)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, torch.tensor(0.0), torch.tensor(1.0)], ids=str)
def test_gradients_of_other_rows_do_not_see_nan_or_infinity(alpha, activation):
    clean, weight = normal(5, 8), normal(5, 8, seed=1)
    x = clean.clone()
    x[1, 2], x[2, 3], x[3, 4] = NAN, INF, -INF
    actual = gradient(x, weight, 2, alpha, activation)[::4]
    assert actual.isfinite().all()
    same(actual, gradient(clean, weight, 2, alpha, activation)[::4])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [0.0, 1 / 3, 1.0])
def test_alpha_as_a_tensor_is_alpha_as_a_float(value, dtype, activation):
    x, weight = normal(8, 32, dtype=dtype), normal(8, 32, dtype=dtype, seed=1)
    x[0, :3], x[1, 4], x[2] = INF, -INF, 1.0
    alpha = torch.tensor(value, dtype=torch.float64)
    y = topk(x, 3, alpha, activation)
    assert y.dtype == dtype
    same(y, topk(x, 3, value, activation))
    same(gradient(x, weight, 3, alpha, activation), gradient(x, weight, 3, value, activation))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_input_is_left_alone(alpha):
    x = normal(4, 8)
    before = x.clone()
    gradient(x, torch.ones_like(x), 2, alpha)
    topk(x, 2, alpha)
    same(x, before)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_keep_zero_and_nan(activation):
    # What `definition` relies on.
    y = ACTIVATIONS[activation](torch.tensor([0.0, NAN]))
    assert y[0] == 0 and y[1].isnan()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "k=0 is too small"),
        ((-3,), "k=-3 is too small"),
        ((2.0,), "k=2.0 is not a whole number"),
        ((2, -0.1), r"alpha=-0.1 is out of range: .* in \[0, 1\]"),
        ((2, 1.1), "alpha=1.1 is out of range"),
        ((2, NAN), "alpha=nan is out of range"),
        ((2, torch.ones(4)), r"alpha has shape \(4,\)"),
        ((2, 0.0, "tanh"), "activation='tanh' is not known: choose one of relu, identity, gelu"),
    ],
)
def test_refused_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message) as error:
        topk(torch.ones(2, 4), *arguments)
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize("x", [torch.ones(2, 4, dtype=torch.int64), torch.tensor(1.0)])
def test_refused_inputs(x):
    with pytest.raises(ConfigError, match=r"topk takes a floating tensor \[..., D\]"):
        topk(x, 1)


def compilations(function, alphas: list) -> int:
    """How often function(x, alpha) is compiled over these calls; their results are checked."""
    x, counter = normal(4, 16), CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for alpha in alphas:
        same(compiled(x, alpha), function(x, alpha))
    torch._dynamo.reset()
    return counter.frame_count


def test_a_moving_alpha_does_not_recompile():
    alphas = [max(0.0, 1 - step / 10) for step in range(12)]
    # One for alpha = 1, one for what lies between, and one for alpha = 0.
    assert compilations(lambda x, alpha: topk(x, 3, alpha), alphas) <= 3


def test_a_moving_alpha_in_a_tensor_compiles_once():
    alphas = torch.tensor([1.0, 0.75, 0.25, 0.0]).unbind()
    assert compilations(lambda x, alpha: topk(x, 3, alpha), alphas) == 1
