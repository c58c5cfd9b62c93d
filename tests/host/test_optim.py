"""lingua.optim: schedules against their formulas, and the optimizer they drive."""

import json
import math

import pytest
import torch
from torch import nn

from lingua.errors import ConfigError
from lingua.optim import (
    OptimArgs,
    build_lr_fn,
    build_optimizer,
    lr_cosine,
    lr_inv_sqrt,
    lr_linear,
    lr_wsd,
)

SCHEDULERS = ("constant", "linear", "inv_sqrt", "cosine", "wsd")


@pytest.mark.parametrize("scheduler", SCHEDULERS[1:])
def test_warm_up_rises_linearly_from_zero(scheduler):
    lr = build_lr_fn(OptimArgs(scheduler=scheduler, warmup=8), n_steps=100)
    assert [lr(step) for step in range(8)] == [step / 8 for step in range(8)]
    assert lr(8) == pytest.approx(1.0, abs=0.02)


def test_constant_has_no_warm_up():
    lr = build_lr_fn(OptimArgs(scheduler="constant", warmup=8), n_steps=100)
    assert {lr(step) for step in (0, 1, 8, 100, 200)} == {1.0}


def test_linear():
    lr = build_lr_fn(OptimArgs(scheduler="linear", warmup=10, lr_min_ratio=0.2), n_steps=110)
    assert lr(10) == 1.0
    assert lr(60) == pytest.approx(0.6)
    assert lr(110) == pytest.approx(0.2)
    assert lr(111) == lr(10_000) == 0.2


def test_inv_sqrt():
    args = OptimArgs(scheduler="inv_sqrt", warmup=16, exp_factor=0.5, lr_min_ratio=0.1)
    lr = build_lr_fn(args, n_steps=100)
    assert lr(16) == 1.0
    assert lr(64) == pytest.approx(0.5)
    assert lr(144) == pytest.approx(1 / 3)
    assert lr(10**6) == 0.1
    args.exp_factor = 1.0
    assert build_lr_fn(args, n_steps=100)(64) == pytest.approx(0.25)


def test_cosine_falls_from_one_to_the_floor():
    lr = build_lr_fn(OptimArgs(warmup=20, lr_min_ratio=0.1), n_steps=120)
    values = [lr(step) for step in range(20, 121)]
    expected = [0.1 + 0.45 * (1 + math.cos(math.pi * i / 100)) for i in range(101)]
    assert values == pytest.approx(expected)
    assert lr(120) == pytest.approx(0.1)
    assert lr(121) == 0.1


def test_cosine_bends_with_theta():
    lr = build_lr_fn(OptimArgs(warmup=0, lr_min_ratio=0.0, cosine_theta=2.0), n_steps=100)
    assert lr(50) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.25)))
    assert lr(100) == pytest.approx(0.0)


def test_cosine_of_two_cycles_starts_anew_between_them():
    lr = build_lr_fn(OptimArgs(warmup=0, lr_min_ratio=0.1, cycle_length=0.5), n_steps=100)
    assert lr(0) == pytest.approx(1.0)
    assert lr(49) == pytest.approx(0.1, abs=0.01)
    assert lr(50) == pytest.approx(1.0)
    assert lr(75) == pytest.approx(0.55)
    assert lr(100) == pytest.approx(0.1)


def test_wsd_is_stable_and_then_falls_harmonically():
    args = OptimArgs(scheduler="wsd", warmup=10, lr_min_ratio=0.25, decay_fraction=0.2)
    lr = build_lr_fn(args, n_steps=100)
    assert {lr(step) for step in range(10, 81)} == {1.0}
    # Half-way down, 1/x is the mean of 1/1 and 1/0.25.
    assert lr(90) == pytest.approx(1 / 2.5)
    assert lr(100) == pytest.approx(0.25)


def test_wsd_of_two_cycles():
    args = OptimArgs(
        scheduler="wsd", warmup=0, lr_min_ratio=0.25, decay_fraction=0.2, cycle_length=0.5
    )
    lr = build_lr_fn(args, n_steps=100)
    assert lr(40) == 1.0
    assert lr(45) == pytest.approx(1 / 2.5)  # The first decay takes 0.2 of 50 steps.
    assert lr(50) == 1.0
    assert lr(80) == 1.0
    assert lr(90) == pytest.approx(1 / 2.5)  # The second takes 0.2 of 100.
    assert lr(100) == pytest.approx(0.25)


def test_wsd_without_a_floor_falls_linearly():
    args = OptimArgs(scheduler="wsd", warmup=0, lr_min_ratio=0.0, decay_fraction=0.5)
    lr = build_lr_fn(args, n_steps=100)
    assert [lr(50), lr(75), lr(100)] == pytest.approx([1.0, 0.5, 0.0])


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("warmup", [0, 1, 9, 10, 50])
@pytest.mark.parametrize("min_ratio", [0.0, 1e-6, 1.0])
@pytest.mark.parametrize("cycle_length", [0.05, 0.3, 1.0, 2.0])
def test_every_multiplier_is_a_share(scheduler, warmup, min_ratio, cycle_length):
    args = OptimArgs(
        scheduler=scheduler,
        warmup=warmup,
        lr_min_ratio=min_ratio,
        cycle_length=cycle_length,
        decay_fraction=0.04,
    )
    lr = build_lr_fn(args, n_steps=10)
    for step in range(60):
        assert 0.0 <= lr(step) <= 1.0 + 1e-12, step


def test_a_warm_up_as_long_as_the_run_ends_at_one():
    assert lr_linear(10, warmup=10, n_steps=10, min_ratio=0.1) == 1.0
    assert lr_cosine(10, 10, 10, cycle_length=1.0, theta=1.0, min_ratio=0.1) == 1.0
    assert lr_cosine(11, 10, 10, cycle_length=1.0, theta=1.0, min_ratio=0.1) == 0.1
    assert lr_inv_sqrt(10, 10, exp_factor=0.5, min_ratio=0.1) == 1.0
    assert lr_wsd(8, 8, 10, decay_fraction=0.1, cycle_length=1.0, min_ratio=0.1) == 1.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scheduler", "cosinus"),
        ("lr", -1e-3),
        ("lr", float("nan")),
        ("weight_decay", -0.1),
        ("epsilon", float("inf")),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("warmup", -1),
        ("lr_min_ratio", 1.5),
        ("cycle_length", 0.0),
        ("cosine_theta", 0.0),
        ("exp_factor", -1.0),
        ("decay_fraction", -0.1),
    ],
)
def test_a_value_that_is_not_allowed_is_named(field, value):
    with pytest.raises(ConfigError) as caught:
        build_lr_fn(OptimArgs(**{field: value}), n_steps=10)
    text = str(caught.value)
    assert f"optim.{field}=" in text and str(value) in text
    assert "\n" not in text


def test_wsd_needs_a_decay_within_its_cycle():
    args = OptimArgs(scheduler="wsd", decay_fraction=0.5, cycle_length=0.5)
    with pytest.raises(ConfigError, match=r"optim\.decay_fraction=0\.5"):
        build_lr_fn(args, n_steps=10)
    args.scheduler = "cosine"  # which does not use it
    build_lr_fn(args, n_steps=10)


def test_a_run_has_at_least_one_step():
    with pytest.raises(ConfigError, match="steps=0"):
        build_lr_fn(OptimArgs(), n_steps=0)


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1))


def train_step(model, optimizer, scheduler, x) -> None:
    model(x).square().mean().backward()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()


def test_optimizer_has_one_group_with_the_arguments():
    args = OptimArgs(lr=0.01, weight_decay=0.2, epsilon=1e-6, beta1=0.8, beta2=0.9, warmup=4)
    model = small_model()
    optimizer, scheduler = build_optimizer(model, args, n_steps=10)
    (group,) = optimizer.param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters()}
    assert group["weight_decay"] == 0.2
    assert group["eps"] == 1e-6
    assert tuple(group["betas"]) == (0.8, 0.9)
    assert group["lr"] == 0.0
    train_step(model, optimizer, scheduler, torch.randn(2, 3))
    assert group["lr"] == pytest.approx(0.01 / 4)


def test_updates_are_those_of_the_definition_of_adamw():
    args = OptimArgs(lr=0.1, scheduler="linear", warmup=0, lr_min_ratio=0.0)
    model = small_model().double()
    optimizer, scheduler = build_optimizer(model, args, n_steps=4)
    x = torch.randn(5, 3, dtype=torch.float64)
    weight = model[0].weight.detach().clone()
    m, v = torch.zeros_like(weight), torch.zeros_like(weight)
    for t in range(1, 4):
        (grad,) = torch.autograd.grad(model(x).square().mean(), [model[0].weight])
        train_step(model, optimizer, scheduler, x)
        lr = 0.1 * (1 - (t - 1) / 4)
        m, v = 0.9 * m + 0.1 * grad, 0.95 * v + 0.05 * grad**2
        weight = weight * (1 - lr * 0.1)
        weight -= lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        torch.testing.assert_close(model[0].weight.detach(), weight)


def test_a_device_without_a_fused_kernel_gets_another(monkeypatch):
    import lingua.optim

    asked = []

    class WithoutFused(torch.optim.AdamW):
        def __init__(self, params, *, fused, **options):
            asked.append(fused)
            if fused:
                raise RuntimeError("`fused=True` requires all the params to be floating point")
            super().__init__(params, fused=fused, **options)

    monkeypatch.setattr(lingua.optim, "AdamW", WithoutFused)
    model = small_model()
    optimizer, scheduler = build_optimizer(model, OptimArgs(), n_steps=10)
    train_step(model, optimizer, scheduler, torch.randn(2, 3))
    assert asked == [True, False]


@pytest.mark.parametrize("scheduler_name", SCHEDULERS)
def test_the_state_of_the_scheduler_is_json_and_restores_the_rate(scheduler_name):
    args = OptimArgs(scheduler=scheduler_name, warmup=2)
    optimizer, scheduler = build_optimizer(small_model(), args, n_steps=10)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    state = json.loads(json.dumps(scheduler.state_dict()))
    _, restored = build_optimizer(small_model(), args, n_steps=10)
    restored.load_state_dict(state)
    assert restored.get_last_lr() == scheduler.get_last_lr()
    assert restored.last_epoch == 5


@pytest.mark.gpu
def test_adamw_is_fused_on_cuda():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = small_model().to("cuda")
    optimizer, scheduler = build_optimizer(model, OptimArgs(), n_steps=10)
    train_step(model, optimizer, scheduler, torch.randn(2, 3, device="cuda"))
    assert optimizer.param_groups[0]["fused"]
