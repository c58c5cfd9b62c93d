"""A gradient that is NaN or infinite: the run ends before it, or the step is left out."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

import apps.main.train as host
from apps.topk import nonfinite
from apps.topk.nonfinite import Guard, GuardedScheduler, NonFiniteError
from tests import processes
from tests.apps.hostile import undisturbed
from tests.apps.tiny import read_metrics
from tests.faults.runs import checkpoints, errors, long, result, start


def harmed(monkeypatch, *steps, by=float("nan")):
    """The gradients of these steps are harmed, by a factor, before they are clipped."""
    clip, done = nn.utils.clip_grad_norm_, host._optimizer_step
    at = []

    def remember(run):
        at.append(run.state.step + 1)
        return done(run)

    def clip_harmed(parameters, *args, **kwargs):
        parameters = list(parameters)
        if at[-1] in steps:
            parameters[-1].grad.mul_(by)
        return clip(parameters, *args, **kwargs)

    monkeypatch.setattr(host, "_optimizer_step", remember)
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", clip_harmed)


def without_update(monkeypatch, *steps):
    """These steps count, and nothing else happens in them; what there is no guard for."""

    def leave_out(run):
        nn.utils.clip_grad_norm_(run.model.parameters(), max_norm=run.args.optim.clip)
        if run.state.step + 1 in steps:
            run.optimizer.zero_grad(set_to_none=True)
        run.optimizer.step()
        run.scheduler.step()
        run.optimizer.zero_grad()
        run.state.step += 1
        return torch.zeros(())

    monkeypatch.setattr(host, "_optimizer_step", leave_out)
    monkeypatch.setattr(Guard, "_before_step", lambda *args: None)


def without_grad_norm(found):
    for line in found["metrics"]:
        line.pop("optim/grad_norm")
        line.pop("optim/skipped", None)
    found["state"]["scheduler"].pop("nonfinite", None)
    return found


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert start(corpus, folder) == 0
    return folder


def test_where_all_is_finite_the_guard_changes_no_bit(corpus, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(Guard, "_before_step", lambda *args: None)
    assert start(corpus, tmp_path / "run") == 0
    assert result(tmp_path / "run") == result(whole)


@pytest.mark.parametrize("by", [float("nan"), *long(float("inf"))])
def test_stop_ends_with_the_last_good_checkpoint(corpus, whole, tmp_path, monkeypatch, capfd, by):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        harmed(patch, 3, by=by)
        assert start(corpus, folder, "logging.freq=4") == 3
        (line,) = errors(capfd.readouterr().err)
        assert line.startswith("error: step 3: the gradient is not finite")
        assert "the same command goes on from the newest checkpoint" in line
        assert "nonfinite=skip" in line
        assert checkpoints(folder) == ["0000000002"]
        assert start(corpus, folder) == 3  # the same again
    assert checkpoints(folder) == ["0000000002"]
    assert start(corpus, folder) == 0  # whatever it was has gone
    found, expected = result(folder), result(whole)
    assert found["tensors"] == expected["tensors"] and found["state"] == expected["state"]


@pytest.mark.parametrize(
    "settings",
    [
        ("grad_acc_steps=2", "data.batch_size=2"),
        *long((), ("model.topk=null", "distributed.model_dtype=bf16")),
    ],
)
def test_skip_is_a_run_without_that_update_to_the_bit(
    corpus, tmp_path, monkeypatch, capfd, settings
):
    with monkeypatch.context() as patch:
        harmed(patch, 1, 3)
        assert start(corpus, tmp_path / "skipping", "nonfinite=skip", *settings) == 0
    said = capfd.readouterr().err
    assert "1 of the last steps left out" in said and "step 3; 2 in this run" in said
    with monkeypatch.context() as patch:
        without_update(patch, 1, 3)
        assert start(corpus, tmp_path / "expected", *settings) == 0
    counts = [line["optim/skipped"] for line in read_metrics(tmp_path / "skipping")]
    assert counts == [1, 1, 2, 2]
    found, expected = (result(tmp_path / name) for name in ("skipping", "expected"))
    assert found["state"]["scheduler"]["nonfinite"] == [2, 0, 3, 0]
    assert without_grad_norm(found) == without_grad_norm(expected)


def test_what_was_skipped_is_known_after_a_resume(corpus, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        harmed(patch, 2)
        assert start(corpus, tmp_path / "run", "nonfinite=skip", "steps=3") == 0
    assert start(corpus, tmp_path / "run", "nonfinite=skip") == 0
    assert [line["optim/skipped"] for line in read_metrics(tmp_path / "run")] == [0, 1, 1, 1]


def test_too_many_in_a_row_end_the_run(corpus, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(nonfinite, "MOST_IN_A_ROW", 2)
    with monkeypatch.context() as patch:
        harmed(patch, 1, 3, 4)
        assert start(corpus, tmp_path / "run", "nonfinite=skip") == 3
    (line,) = errors(capfd.readouterr().err)
    assert line.startswith("error: step 4: the gradients of 2 steps in a row are not finite")
    assert checkpoints(tmp_path / "run") == ["0000000002"]


def guarded(choice, fused):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    scheduler = LambdaLR(optimizer, lambda step: 1.0)
    return model, optimizer, scheduler, Guard(choice, model, optimizer, scheduler)


def step(model, optimizer, scheduler, gradient):
    model.weight.grad = torch.full((3, 4), gradient)
    model.bias.grad = torch.full((3,), 1.0)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("fused", [True, False])
def test_once_the_run_is_to_end_no_step_changes_anything(fused):
    model, optimizer, scheduler, guard = guarded("stop", fused)
    step(model, optimizer, scheduler, 1.0)
    before = [x.clone() for x in (model.weight, *optimizer.state[model.weight].values())]
    for gradient in (float("inf"), 1.0, 2.0):
        step(model, optimizer, scheduler, gradient)
    after = [model.weight, *optimizer.state[model.weight].values()]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    with pytest.raises(NonFiniteError, match="step 2: the gradient"):
        guard.check()


@pytest.mark.parametrize("fused", [True, False])
def test_the_step_by_which_torch_makes_an_optimizers_state_is_not_counted(fused):
    """Meta Lingua restores the train state first, and calls get_state_dict after it."""
    model, optimizer, scheduler, guard = guarded("skip", fused)
    both = GuardedScheduler(scheduler, guard)
    both.load_state_dict({**scheduler.state_dict(), "last_epoch": 9, "nonfinite": [9, 9, 9, 0]})
    get_state_dict(model, optimizer)
    assert optimizer.state  # it has taken its step
    assert both.state_dict()["nonfinite"] == [9, 9, 9, 0]
    guard.check()
    step(model, optimizer, scheduler, float("nan"))
    assert both.state_dict()["nonfinite"] == [10, 10, 10, 10]
    with pytest.raises(NonFiniteError, match="10 steps in a row"):
        guard.check()


@pytest.mark.parametrize("fused", [True, False])
def test_neither_is_it_at_a_save_after_nothing_but_left_out_steps(fused):
    model, optimizer, scheduler, guard = guarded("skip", fused)
    for gradient in (float("nan"), float("inf")):
        step(model, optimizer, scheduler, gradient)
    optimizer.zero_grad()
    get_state_dict(model, optimizer)
    assert guard.state_dict() == {"nonfinite": [2, 2, 2, 0]}
    step(model, optimizer, scheduler, 1.0)
    assert guard.state_dict() == {"nonfinite": [2, 0, 2, 0]}


@pytest.mark.parametrize("gradient", [float("nan"), float("inf"), 1.0])
def test_each_process_looks_at_its_own_part(gradient, one_process, monkeypatch):
    """Of a gradient that is spread over several: no exchange but that of what was found."""
    model, _, scheduler, _ = guarded("skip", False)
    fully_shard(model, mesh=one_process)
    guard = Guard("skip", model, torch.optim.AdamW(model.parameters()), scheduler)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
        assert isinstance(parameter.grad, DTensor)
    monkeypatch.setattr(DTensor, "full_tensor", lambda *args: pytest.fail("full_tensor"))
    monkeypatch.setattr(DTensor, "__torch_dispatch__", lambda *args: pytest.fail("a DTensor's"))
    guard._before_step(SimpleNamespace(zero_grad=lambda **_: None))
    scheduler.last_epoch += 1
    assert guard.state_dict() == ({} if gradient == 1.0 else {"nonfinite": [1, 1, 1, 0]})


@pytest.fixture
def one_process():
    with undisturbed():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        yield init_device_mesh("cpu", (1,))
        dist.destroy_process_group()


def test_the_device_is_not_waited_for_at_every_step(monkeypatch):
    """What waits for a device brings a value to Python."""
    model, optimizer, scheduler, _ = guarded("skip", True)
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, lambda *args, name=name: pytest.fail(name))
    for gradient in (1.0, float("nan")):
        model.weight.grad = torch.full((3, 4), gradient)
        model.bias.grad = torch.full((3,), 1.0)
        optimizer.step()
        scheduler.step()


def test_only_known_choices_are_taken(corpus, tmp_path, capfd):
    assert start(corpus, tmp_path / "run", "nonfinite=perhaps") == 2
    (line,) = errors(capfd.readouterr().err)
    assert "nonfinite='perhaps' is not known: choose stop" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_processes_decide_alike(corpus, tmp_path):
    """One process's part of the gradient is infinite: both leave the step out, or end."""
    done = processes.run(2, "tests.faults.unwell", corpus, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second == {
        "stop": [3, None, ["0000000002"]],
        "skip": [0, [1, 0, 3, 0], ["0000000002", "0000000004"]],
        "skip-replicated": [0, [1, 0, 3, 0], ["0000000002", "0000000004"]],
    }  # fmt: skip
