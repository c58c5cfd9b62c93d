"""The choice of a backend, the sum, and the CPU backend beside the definition."""

import multiprocessing as mp
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lingua_topk.errors import ConfigError
from lingua_topk.nn import TopK
from lingua_topk.ops import backends, cpu, topk, topk_sum
from lingua_topk.ops.cpu import CHUNK, SMALLEST
from lingua_topk.ops.definition import ACTIVATIONS, topk_definition, topk_sum_definition
from lingua_topk.stats import FiringStats

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NAN, INF = float("nan"), float("inf")


def hard_rows(width: int, dtype=torch.float32, n_normal: int = 40) -> Tensor:
    """Rows [N, width]: normal ones, and tied, constant, tiny, huge, infinite ones and with NaN."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n_normal + 12, width, generator=generator, dtype=torch.float64).to(dtype)
    info = torch.finfo(dtype)
    x[0] = x[0].round()  # ties
    x[1], x[2], x[3] = 0.0, 1.0, -1.0
    x[4] *= info.tiny  # subnormal
    x[5] = (x[5] * info.max).clamp(info.min, info.max)
    x[6, ::2], x[7, ::2] = -INF, INF
    x[8] = -x[8].abs()
    x[9, ::3] = -0.0
    x[10, 1 % width], x[11, ::2] = NAN, NAN
    return x


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def with_gradient(function, *arguments: Tensor) -> tuple[Tensor, ...]:
    """The result of all arguments but the last, which weighs it, and their gradients."""
    *inputs, weight = arguments
    inputs = [x.detach().requires_grad_() for x in inputs]
    y = function(*inputs)
    return y, *torch.autograd.grad(y, inputs, weight.to(y.dtype))


def all_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype
        same(one, other)


@pytest.fixture(params=[1, 3], ids=["1 thread", "3 threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


# --- the CPU backend ---


SIZES = [(2, 1), (37, 1), (37, 5), (37, 36), (129, 64)]
# relu has kernels of its own; the others share the selection alone.
CASES = [("relu", *size) for size in SIZES] + [(f, 37, 5) for f in ACTIVATIONS if f != "relu"]


@pytest.mark.parametrize(("activation", "width", "k"), CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, torch.tensor(0.3)], ids=str)
def test_cpu_is_the_definition_in_every_bit(width, k, alpha, dtype, activation):
    x, weight = hard_rows(width, dtype), hard_rows(width, dtype).flip(0)  # NaN and infinity in both
    for function, inputs in ((topk, [x]), (topk_sum, [x, x.flip(1).roll(1, 0)])):
        run = lambda *inputs, f=function: f(*inputs, k, alpha, activation)  # noqa: E731
        with backends.use("plain"):
            expected = with_gradient(run, *inputs, weight)
        with backends.use("cpu"):
            actual = with_gradient(run, *inputs, weight)
        all_same(actual, expected)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("h_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("update_dtype", DTYPES, ids=str)
def test_cpu_sums_of_two_dtypes(h_dtype, update_dtype, alpha):
    h, update = hard_rows(37, h_dtype), hard_rows(37, update_dtype).flip(1)
    expected = with_gradient(
        lambda h, u: topk_sum_definition(h, u, 5, alpha, "relu"), h, update, h.flip(0)
    )
    with backends.use("cpu"):
        actual = with_gradient(lambda h, u: topk_sum(h, u, 5, alpha), h, update, h.flip(0))
    all_same(actual, expected)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_cpu_in_chunks_on_threads(threads, alpha):
    width = 512
    h = hard_rows(width, n_normal=5 * (CHUNK // width) + 3)  # chunks, and a part of one
    inputs = h, h.flip(1), h.flip(0)
    with backends.use("cpu"):
        actual = with_gradient(lambda h, u: topk_sum(h, u, 30, alpha), *inputs)
    expected = with_gradient(lambda h, u: topk_sum_definition(h, u, 30, alpha, "relu"), *inputs)
    all_same(actual, expected)


def test_cpu_rows_wider_than_a_chunk():
    x = torch.randn(3, CHUNK + 1)
    with backends.use("cpu"):
        same(topk(x, 1000), topk_definition(x, 1000, 0.0, "relu"))


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_cpu_can_be_differentiated_twice(alpha):
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    x = ((order.double() - 11.5) / 5).view(3, 8).requires_grad_()
    with backends.use("cpu"):
        assert torch.autograd.gradgradcheck(lambda x: topk(x, 3, alpha) * x, x)


def test_cpu_in_a_forked_process_after_its_threads_have_run(threads):
    x = torch.randn(3 * CHUNK // 256, 256)
    with backends.use("cpu"):
        expected = topk(x, 9).numpy()
        context = mp.get_context("fork")
        # Compared by numpy: torch's own threads do not survive a fork.
        child = context.Process(
            target=lambda: sys.exit(not np.array_equal(topk(x, 9).numpy(), expected)), daemon=True
        )
        child.start()
        child.join(60)
    assert child.exitcode == 0


def test_cpu_operators_pass_torchs_own_checks():
    x, alpha = torch.randn(4, 9, requires_grad=True), torch.tensor(0.3, dtype=torch.float64)
    for update in (None, torch.randn(4, 9, dtype=torch.float64, requires_grad=True)):
        torch.library.opcheck(cpu._hard_relu, (x, update, 3))
        torch.library.opcheck(cpu._annealed_relu, (x, update, 3, alpha))
    torch.library.opcheck(cpu._threshold, (x.detach(), 3))
    torch.library.opcheck(cpu._hard_relu_backward, (x, x.detach()))
    threshold = x.detach()[:, :1]
    torch.library.opcheck(cpu._annealed_relu_backward, (x, x.detach(), None, threshold, alpha))


# --- in a model ---


@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_a_compiled_module_gives_the_same(compiler, alpha):
    module, x = TopK(k=5, alpha=alpha), torch.randn(64, 48)
    with backends.use("cpu"):
        expected = with_gradient(lambda x: module(2 * x, x), x, x.flip(0))
        torch._dynamo.reset()
        compiled = torch.compile(module, backend=compiler, fullgraph=True)
        try:
            actual = with_gradient(lambda x: compiled(2 * x, x), x, x.flip(0))
        except torch._dynamo.exc.BackendCompilerFailed as error:  # inductor has no C++ compiler
            pytest.skip(f"{compiler} does not run here: {str(error).splitlines()[0]}")
        finally:
            torch._dynamo.reset()
    same(actual[0], expected[0])
    same(actual[1], expected[1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_and_counts(reentrant):
    module, weight = TopK(k=5), torch.randn(16, 48)
    module.stats = FiringStats(48, "cpu")
    linear = nn.Linear(48, 48, bias=False)
    results = []
    for name in ("plain", "cpu"):
        module.stats.reset_counts()
        with backends.use(name):
            h = weight.clone().requires_grad_()
            y = checkpoint(lambda h: module(h, linear(h)), h, use_reentrant=reentrant)
            linear.zero_grad()
            y.backward(weight)
        results.append((y, h.grad, linear.weight.grad.clone()))
        assert module.stats.counts.tolist() == [(y != 0).sum(), 16]
    for actual, expected in zip(*results, strict=True):
        same(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_small_training_run_has_the_same_losses(dtype):
    def losses(name: str) -> list[float]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 96), TopK(k=9), nn.Linear(96, 24)).to(dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        found = []
        with backends.use(name):
            for step in range(40):
                model[1].alpha = max(0.0, 1 - step / 20)
                x = torch.randn(32, 24, dtype=dtype)
                loss = (model(x) - x).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                found.append(loss.item())
        return found

    assert losses("cpu") == losses("plain")


# --- the sum ---


@pytest.mark.parametrize("name", ["plain", "cpu"])
def test_a_sum_in_float32_is_topk_of_it(name):
    h, update = hard_rows(64), hard_rows(64).flip(0)
    with backends.use(name):
        same(topk_sum(h, update, 7), topk(h + update, 7))


@pytest.mark.parametrize("name", ["plain", "cpu"])
def test_a_sum_of_half_precision_is_selected_in_float32(name):
    h = torch.tensor([[256.0, 256.0, 256.0, 1.0]], dtype=torch.bfloat16)
    update = torch.tensor([[0.5, 0.25, 0.0, 0.0]], dtype=torch.bfloat16)
    with backends.use(name):
        y = topk_sum(h, update, 2)
        tied = topk(h + update, 2)
    same(y, torch.tensor([[256.0, 256.0, 0.0, 0.0]], dtype=torch.bfloat16))
    assert (tied != 0).sum() == 3


@pytest.mark.parametrize("name", ["plain", "cpu"])
def test_a_sum_of_two_dtypes_and_its_gradients(name):
    h = torch.randn(5, 16, requires_grad=True)
    update = torch.randn(5, 16).bfloat16().requires_grad_()
    with backends.use(name):
        y = topk_sum(h, update, 3)
    y.sum().backward()
    assert y.dtype == torch.float32
    assert h.grad.dtype == torch.float32 and update.grad.dtype == torch.bfloat16
    same(h.grad, (y != 0).float())
    same(update.grad.float(), h.grad)


def test_refused_sums():
    x = torch.ones(2, 4)
    with pytest.raises(ConfigError, match=r"update has shape \(4,\): give one of h's, \(2, 4\)"):
        topk_sum(x, x[0], 1)
    with pytest.raises(ConfigError, match=r"update is torch.int64 of shape \(2, 4\)"):
        topk_sum(x, x.long(), 1)
    with pytest.raises(ConfigError, match="k=0 is too small"):
        topk_sum(x, x, 0)


# --- the choice ---


def test_auto_takes_cpu_where_that_pays(monkeypatch):
    monkeypatch.setattr(backends, "_chosen", "auto")
    assert backends.backend_of(torch.ones(SMALLEST // 8, 8)).name == "cpu"
    assert backends.backend_of(torch.ones(4, 8)).name == "plain"
    assert backends.backend_of(torch.ones(SMALLEST // 8, 8, device="meta")).name == "plain"


def test_auto_leaves_transformed_functions_to_torch(monkeypatch):
    monkeypatch.setattr(backends, "_chosen", "auto")
    x = torch.randn(SMALLEST // 8, 8)
    expected = (topk(x, 2) != 0).float()
    same(torch.func.grad(lambda x: topk(x, 2).sum())(x), expected)
    same(torch.func.vmap(lambda x: topk(x, 2))(x), topk(x, 2))
    _, tangent = torch.func.jvp(lambda x: topk(x, 2), (x,), (torch.ones_like(x),))
    same(tangent, expected)


def test_auto_leaves_them_to_torch_in_a_compiled_model_too(monkeypatch):
    monkeypatch.setattr(backends, "_chosen", "auto")
    x = torch.randn(SMALLEST // 8, 8)
    gradient = torch.func.grad(lambda x: topk(x, 2).sum())
    torch._dynamo.reset()
    same(torch.compile(gradient, backend="aot_eager", fullgraph=True)(x), gradient(x))
    torch._dynamo.reset()


def test_cpu_at_the_end_of_the_process(threads, monkeypatch):
    def no_more(process):
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    monkeypatch.setattr(cpu, "_pool", no_more)
    x = torch.randn(3 * CHUNK // 256, 256)
    with backends.use("cpu"):
        same(topk(x, 9), topk_definition(x, 9, 0.0, "relu"))


def test_cpu_takes_the_threads_that_it_may(threads):
    cpu._pool.cache_clear()
    with backends.use("cpu"):
        topk(torch.randn(8 * CHUNK // 256, 256), 9)
    assert (cpu._pool.cache_info().misses > 0) == (threads > 1)


def test_a_chosen_backend_runs_whatever_the_size():
    with backends.use("cpu"):
        assert backends.backend_of(torch.ones(4, 8)).name == "cpu"
    with backends.use("plain"):
        assert backends.backend_of(torch.ones(SMALLEST // 8, 8)).name == "plain"


def test_a_chosen_backend_that_cannot_run_is_refused():
    message = "LINGUA_TOPK_BACKEND=cpu cannot run: x is on meta"
    with backends.use("cpu"), pytest.raises(ConfigError, match=message):
        topk(torch.ones(4, 8, device="meta"), 2)


def test_an_unknown_backend_is_refused():
    message = "LINGUA_TOPK_BACKEND='cuda' is not known: choose one of auto, plain, cpu, triton"
    with pytest.raises(ConfigError, match=message), backends.use("cuda"):
        pass


@pytest.mark.parametrize(("value", "expected"), [("plain", "plain"), ("", "auto"), (None, "auto")])
def test_the_variable_is_read(value, expected, monkeypatch):
    monkeypatch.setattr(backends, "_chosen", None)
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(backends.VARIABLE, value)
    assert backends.chosen() == expected


def test_a_model_is_not_built_with_an_unknown_backend(monkeypatch):
    monkeypatch.setattr(backends, "_chosen", None)
    monkeypatch.setenv(backends.VARIABLE, "gpu")
    with pytest.raises(ConfigError, match="LINGUA_TOPK_BACKEND='gpu' is not known"):
        TopK(k=3)


def test_definition_of_the_sum_is_what_plain_runs():
    h, update = hard_rows(24, torch.bfloat16), hard_rows(24, torch.bfloat16).flip(0)
    with backends.use("plain"):
        same(topk_sum(h, update, 5, 0.3), topk_sum_definition(h, update, 5, 0.3, "relu"))
