"""The Triton kernel beside the definition: on a GPU, or under Triton's interpreter.

test_triton_interpreted.py runs this file under the interpreter, wherever there is Triton.
"""

import os

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lingua_topk.errors import ConfigError
from lingua_topk.nn import TopK
from lingua_topk.ops import backends, topk, topk_sum
from lingua_topk.ops.definition import ACTIVATIONS

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
NAN, INF = float("nan"), float("inf")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(), reason="needs a CUDA device"
    ),
    # The interpreter computes with numpy, which warns of what floats may do.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
if INTERPRETED or torch.cuda.is_available():
    triton_topk = pytest.importorskip("lingua_topk.ops.triton_topk")


def hard_rows(width: int, dtype=torch.float32) -> Tensor:
    """Rows [16, width]: normal ones, and tied, constant, tiny, huge, infinite ones and with NaN."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, width, generator=generator, dtype=torch.float64).to(dtype)
    info = torch.finfo(dtype)
    x[0] = x[0].round()  # ties
    x[1], x[2], x[3] = 0.0, 1.0, -1.0
    # The interpreter turns bfloat16's subnormals into other numbers.
    x[4] *= info.tiny * (1024 if INTERPRETED and dtype == torch.bfloat16 else 1)
    x[5] = (x[5] * info.max).clamp(info.min, info.max)
    x[6, ::2], x[7, ::2] = -INF, INF
    x[8] = -x[8].abs()
    x[9, ::3] = -0.0
    x[10, 1 % width], x[11, ::2] = NAN, NAN
    x[12, 0] = torch.tensor(-1, dtype=torch.int16).view(torch.bfloat16).to(dtype)  # another NaN
    x[13] *= x[13].abs() ** 3  # heavy tails
    return x.to(DEVICE)


def few_rows(width: int, dtype=torch.float32) -> Tensor:
    """Some of them: the interpreter takes its time for every row."""
    return hard_rows(width, dtype)[[0, 5, 6, 9, 10, 13]] if INTERPRETED else hard_rows(width, dtype)


def close(actual: Tensor, expected: Tensor, activation: str = "relu") -> None:
    """The same in every bit, but where exp and erf are others or the interpreter rounds down."""
    exact = {"rtol": 0.0, "atol": 0.0}
    if INTERPRETED and torch.bfloat16 in (actual.dtype, expected.dtype):
        exact = {"rtol": 2**-6, "atol": 1e-37}
    elif activation in ("gelu", "silu"):
        exact = {}
    torch.testing.assert_close(actual, expected, equal_nan=True, **exact)


def results(name: str, function, inputs: list[Tensor], weight: Tensor) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    with backends.use(name):
        y = function(*inputs)
        return [y, *torch.autograd.grad(y, inputs, weight)]


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OTHERS = [f for f in ACTIVATIONS if f != "relu"]
SIZES = ((2, 1), (37, 1), (37, 37), (128, 100))
CASES = [
    (37, 5, 0.0, torch.float32, "relu", hard_rows),
    *((*size, 0.0, torch.float32, "relu", few_rows) for size in SIZES),
    *((37, 5, 0.0, dtype, "relu", few_rows) for dtype in DTYPES if dtype != torch.float32),
    *((37, 5, 0.3, dtype, "relu", few_rows) for dtype in DTYPES),
    (37, 5, 1.0, torch.float32, "relu", few_rows),
    *((37, 5, alpha, torch.float32, f, few_rows) for alpha in (0.0, 0.3) for f in OTHERS),
    (37, 5, 0.3, torch.bfloat16, "silu", few_rows),
    # Of these x is kept, wider than y, and masked by y's bits.
    *((70, 9, 0.0, dtype, "silu", few_rows) for dtype in (torch.bfloat16, torch.float16)),
]


@pytest.mark.parametrize(
    ("width", "k", "alpha", "dtype", "activation", "rows"),
    CASES,
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_kernel_is_the_definition(width, k, alpha, dtype, activation, rows):
    x = rows(width, dtype)
    other, weight = x.flip(0).roll(1, 1), x.flip(0)
    both = ((topk_sum, [x, other]), (topk, [x]))
    # What the sum shares with the other is not interpreted twice.
    for function, inputs in both[:1] if INTERPRETED and activation == "relu" else both:
        run = lambda *inputs, f=function: f(*inputs, k, alpha, activation)  # noqa: E731
        expected = results("plain", run, inputs, weight)
        for one, reference in zip(results("triton", run, inputs, weight), expected, strict=True):
            close(one, reference, activation)


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_alpha_as_a_tensor(value, activation):
    x = few_rows(37)
    x = x[x.isfinite().all(dim=1)]
    alpha = torch.tensor(value, device=DEVICE)
    expected = results("plain", lambda x: topk(x, 5, alpha, activation), [x], x.flip(0))
    actual = results("triton", lambda x: topk(x, 5, alpha, activation), [x], x.flip(0))
    for one, reference in zip(actual, expected, strict=True):
        close(one, reference, activation)


@pytest.mark.parametrize(("width", "k"), [(1000, 64), (2048, 128), (4100, 3), (8192, 512)])
def test_wide_rows(width, k):
    h, update = torch.randn(2, 3, width, device=DEVICE).unbind()
    h[1] *= h[1].abs() ** 3
    actual = results("triton", lambda h, u: topk_sum(h, u, k), [h, update], h)
    expected = results("plain", lambda h, u: topk_sum(h, u, k), [h, update], h)
    for one, reference in zip(actual, expected, strict=True):
        close(one, reference)
    assert (actual[0] != 0).sum(-1).tolist() == [k] * 3


def test_every_k_of_a_row():
    x = hard_rows(16)[[0, 7, 14] if INTERPRETED else slice(None)]
    for k in (1, 2, 5, 8, 15, 16) if INTERPRETED else range(1, 17):
        close(
            results("triton", lambda x: topk(x, k, 0.0, "identity"), [x], x)[0],  # noqa: B023
            results("plain", lambda x: topk(x, k, 0.0, "identity"), [x], x)[0],  # noqa: B023
        )


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (7,), (2, 3, 9)], ids=str)
def test_shapes_and_strides(shape):
    x = torch.randn(*shape, 2, device=DEVICE)[..., 0]
    y, slope = results("triton", lambda x: topk(x, 2, 0.3), [x], torch.ones_like(x))
    expected = results("plain", lambda x: topk(x, 2, 0.3), [x], torch.ones_like(x))
    assert y.shape == slope.shape == shape
    close(y, expected[0])
    close(slope, expected[1])


@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_reciprocal_rms_and_its_gradient(dtype, alpha):
    h, update = hard_rows(37, dtype)[14:], hard_rows(37, dtype)[14:].flip(0)
    found = []
    for function in (triton_topk.topk_sum_rms_triton, triton_topk.topk_sum_rms_definition):
        inputs = h.clone().requires_grad_(), update.clone().requires_grad_()
        y, rms = function(*inputs, 5, alpha, "relu", 1e-5)
        gradients = torch.autograd.grad([y, rms], inputs, [h, rms.detach()])
        found.append((y, rms, *gradients))
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("alpha", "activation"), [(0.0, "relu"), (0.3, "relu"), (0.0, "silu"), (0.3, "gelu")]
)
def test_it_can_be_differentiated_twice(alpha, activation):
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    x = ((order.double() - 2.5) / 2).view(1, 6).to(DEVICE).requires_grad_()
    with backends.use("triton"):
        assert torch.autograd.gradcheck(lambda x: topk(x, 3, alpha, activation), x)
        assert torch.autograd.gradgradcheck(lambda x: topk(x, 3, alpha, activation) * x, x)


def test_torchs_own_checks_of_an_operator():
    x = torch.randn(4, 9, device=DEVICE, requires_grad=True)
    alpha = torch.tensor(0.3, dtype=torch.float64)
    torch.library.opcheck(triton_topk._forward, (x, x.detach(), 3, alpha, "relu", 1e-5))
    torch.library.opcheck(triton_topk._forward, (x, None, 3, None, "silu", None))
    bits = torch.ones(4, 1, 1, dtype=torch.int32, device=DEVICE)
    torch.library.opcheck(triton_topk._backward, (x, bits, alpha, 4))


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_compiled_and_checkpointed(alpha):
    module, x = TopK(k=5, alpha=alpha), torch.randn(6, 48, device=DEVICE)
    expected = results("triton", lambda x: module(2 * x, x), [x], x)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    again = results("triton", lambda x: compiled(2 * x, x), [x], x)
    torch._dynamo.reset()
    checkpointed = results(
        "triton", lambda x: checkpoint(module, 2 * x, x, use_reentrant=False), [x], x
    )
    for one, two, three in zip(expected, again, checkpointed, strict=True):
        close(two, one)
        close(three, one)


def test_a_moving_alpha_does_not_recompile():
    counter, x = torch._dynamo.testing.CompileCounter(), torch.randn(2, 16, device=DEVICE)
    torch._dynamo.reset()
    with backends.use("triton"):
        compiled = torch.compile(
            lambda x, alpha: topk(x, 3, alpha), backend=counter, fullgraph=True
        )
        for step in range(12):
            alpha = max(0.0, 1 - step / 10)
            close(compiled(x, alpha), topk(x, 3, alpha))
    torch._dynamo.reset()
    assert counter.frame_count <= 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_small_training_run_has_the_same_losses(dtype):
    def losses(name: str) -> list[float]:
        torch.manual_seed(0)
        layers = torch.nn.Linear(24, 96), TopK(k=9), torch.nn.Linear(96, 24)
        model = torch.nn.Sequential(*layers).to(DEVICE, dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        found = []
        with backends.use(name):
            for step in range(8):
                model[1].alpha = max(0.0, 1 - step / 4)
                x = torch.randn(8, 24, dtype=dtype).to(DEVICE)
                loss = (model(x) - x).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                found.append(loss.item())
        return found

    assert losses("triton") == losses("plain")


def test_what_cannot_run_is_refused():
    with backends.use("triton"), pytest.raises(ConfigError, match="takes up to 8192"):
        topk(torch.ones(1, 8193, device=DEVICE), 2)
    with backends.use("triton"), pytest.raises(ConfigError, match="x is on meta"):
        topk(torch.ones(1, 8, device="meta"), 2)
