"""Training through the seam: mini-models learn, alpha falls, counts are right, runs go on."""

import json
import os
import resource
import signal
from types import SimpleNamespace

import pytest
import torch

import apps.main.eval as eval_module
import apps.main.train as train_module
from apps.topk import cli, export, seam
from apps.topk.checkpoint import newest_checkpoint, open_checkpoint
from apps.topk.model import TopKTrainArgs, TopKTransformer
from apps.topk.seam import install
from apps.topk.train import train
from lingua_topk import topk_handle
from lingua_topk.anneal import alpha_at, kept_at
from lingua_topk.errors import CheckpointError, HostError
from tests.apps.tiny import K, read_metrics, train_args, write_corpus

TOKENS_A_STEP = 4 * 32


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def whole_run(corpus, tmp_path_factory):
    """The metrics of an uninterrupted run of a TopK model, and its folder."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(train_args(corpus, folder))
    return read_metrics(folder), folder


def signal_at(monkeypatch, step, number):
    """Have this process get a signal during optimizer step `step`."""
    original = train_module._optimizer_step

    def optimizer_step(run):
        norm = original(run)
        if run.state.step == step:
            os.kill(os.getpid(), number)
        return norm

    monkeypatch.setattr(train_module, "_optimizer_step", optimizer_step)


def test_the_first_loss_is_that_of_predicting_the_next_token(corpus, tmp_path, monkeypatch):
    """By hand, from the weights at the start and the first batch; alpha is 1 there."""
    seen = {}
    forward_backward = train_module._forward_backward

    def first(run, batch):
        if not seen:
            weights = {n: p.detach().clone() for n, p in run.model.named_parameters()}
            seen.update(weights=weights, batch=torch.as_tensor(batch))
        return forward_backward(run, batch)

    monkeypatch.setattr(train_module, "_forward_backward", first)
    args = train_args(corpus, tmp_path / "run", "steps=1")
    train(args)
    model = TopKTransformer(args.model)
    model.load_state_dict(seen["weights"])
    topk_handle(model).alpha = 1.0
    inputs, targets = seen["batch"][..., 0], seen["batch"][..., 1]
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    log_probs = model(inputs).double().log_softmax(-1)
    expected = -log_probs.gather(-1, targets.unsqueeze(-1)).mean().item()
    assert read_metrics(tmp_path / "run")[0]["loss/out"] == pytest.approx(expected, abs=1e-5)


def mean_loss(metrics):
    return sum(line["loss/out"] for line in metrics) / len(metrics)


def test_a_topk_model_learns(whole_run):
    metrics, _ = whole_run
    assert [line["global_step"] for line in metrics] == list(range(1, 31))
    assert mean_loss(metrics[-5:]) < 0.7 * mean_loss(metrics[:3])


def test_the_vanilla_twin_learns_and_reports_no_topk(corpus, tmp_path):
    train(train_args(corpus, tmp_path / "run", "model.topk=null"))
    metrics = read_metrics(tmp_path / "run")
    assert mean_loss(metrics[-5:]) < 0.7 * mean_loss(metrics[:3])
    assert not [key for key in metrics[-1] if key.startswith("topk/")]


def test_without_a_section_and_with_null_it_is_the_same_vanilla_model(corpus, tmp_path):
    absent = train_args(corpus, tmp_path)
    absent.model = type(absent.model)(dim=32, n_layers=1, n_heads=2, vocab_size=258)
    null = train_args(corpus, tmp_path, "model.topk=null")
    assert absent.model.topk is None and null.model.topk is None
    assert topk_handle(TopKTransformer(absent.model)) is None


def test_alpha_follows_the_schedule(whole_run):
    metrics, _ = whole_run
    for line in metrics:
        # The line of global_step s reports the step that made it: index s - 1.
        assert line["topk/alpha"] == alpha_at(line["global_step"] - 1, 30, 0.5)
    assert metrics[0]["topk/alpha"] == 1 and metrics[-1]["topk/alpha"] == 0


def test_after_annealing_k_neurons_fire(whole_run):
    metrics, _ = whole_run
    hard = [line for line in metrics if line["topk/alpha"] == 0]
    assert len(hard) == 15
    for line in hard:
        assert {key for key in line if key.startswith("topk/l0/")} == {"topk/l0/0", "topk/l0/1"}
        for layer in (0, 1):
            assert line[f"topk/l0/{layer}"] == pytest.approx(K, abs=0.05)
    assert metrics[0]["topk/l0/0"] > 2 * K  # alpha = 1: a plain ReLU


def test_where_k_is_annealed_the_counts_are_those_of_its_schedule(corpus, tmp_path):
    identity = "model.topk.activation=identity"  # of which every survivor is counted
    train(train_args(corpus, tmp_path / "run", "model.topk.annealed=k", identity))
    for line in read_metrics(tmp_path / "run"):
        kept = kept_at(alpha_at(line["global_step"] - 1, 30, 0.5), K, 32)
        assert line["topk/l0/0"] == pytest.approx(kept, abs=0.05)
    newest = open_checkpoint(newest_checkpoint(tmp_path / "run"))
    assert newest.alpha == 0 and newest.model_args.topk.annealed == "k"
    inside = open_checkpoint(tmp_path / "run/checkpoints/0000000010")
    module = topk_handle(inside.model("cpu", torch.float32, as_trained=True)).modules[0]
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    assert (module(x) != 0).sum(-1).tolist() == [kept_at(alpha_at(10, 30, 0.5), K, 32)] * 3
    with pytest.raises(CheckpointError, match="inside the annealing of k"):
        arguments = ["--ckpt", str(inside.folder), "--out", str(tmp_path / "hf")]
        export.main([*arguments, "--as_trained", "true"])


def test_counts_equal_those_of_a_naive_observer(corpus, tmp_path, monkeypatch):
    """L0 and dead neurons, recomputed from the layers' outputs that a hook sees."""
    window = 5 * TOKENS_A_STEP
    fired = {0: [], 1: []}  # for every micro-batch, bool [N, D]

    class Observed(TopKTransformer):
        def __init__(self, args):
            super().__init__(args)
            for layer, module in topk_handle(self).modules.items():
                module.register_forward_hook(
                    lambda m, i, y, layer=layer: fired[layer].append(y.detach().flatten(0, 1) != 0)
                )

    monkeypatch.setattr(seam, "TopKTransformer", Observed)
    extra = [f"model.topk.dead_window={window}", "grad_acc_steps=2", "logging.freq=2", "steps=16"]
    train(train_args(corpus, tmp_path / "run", *extra))
    metrics = read_metrics(tmp_path / "run")
    assert len(metrics) == 8
    died = 0
    for number, line in enumerate(metrics, 1):
        for layer in (0, 1):
            seen = fired[layer][: 4 * number]  # two micro-batches a step, two steps a line
            l0 = torch.cat(seen[-4:]).sum(dim=1).double().mean().item()
            assert line[f"topk/l0/{layer}"] == pytest.approx(l0)
            # Idle time is counted in whole micro-batches.
            in_window = torch.stack([one.any(dim=0) for one in seen[-5:]]).any(dim=0)
            dead = (~in_window).double().mean().item() if len(seen) >= 5 else 0.0
            assert line[f"topk/dead/{layer}"] == pytest.approx(dead)
            died += dead > 0
    assert died, "no neuron ever died: the test shows nothing"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_a_stopped_run_goes_on_where_it_was(corpus, whole_run, tmp_path, monkeypatch, number):
    expected, _ = whole_run
    args = [corpus, tmp_path / "run"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        signal_at(patch, step=8, number=number)
        train(train_args(*args))
    assert ended.value.code == 0
    assert len(read_metrics(tmp_path / "run")) == 8
    train(train_args(*args))
    metrics = read_metrics(tmp_path / "run")
    assert [line["global_step"] for line in metrics] == list(range(1, 31))
    for line, other in zip(metrics, expected, strict=True):
        same = [key for key in line if key.startswith(("loss/", "optim/", "topk/"))]
        assert len(same) >= 9
        assert {key: line[key] for key in same} == {key: other[key] for key in same}


@pytest.mark.parametrize("is_preempted", [True, False])
def test_sigterm_of_a_preemption_has_the_job_go_back_into_the_queue(
    corpus, tmp_path, monkeypatch, is_preempted
):
    """That of scancel does not."""

    def requeue():
        raise SystemExit("requeued")

    monkeypatch.setattr(train_module, "is_preempted", lambda: is_preempted)
    monkeypatch.setattr(train_module, "requeue_slurm_job", requeue)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        signal_at(patch, step=2, number=signal.SIGTERM)
        train(train_args(corpus, tmp_path / "run"))
    assert ended.value.code == ("requeued" if is_preempted else 0)
    assert (tmp_path / "run/checkpoints/0000000002").is_dir()


def test_early_steps_are_saved_besides_and_never_deleted(corpus, tmp_path):
    keep = ["checkpoint.dump.every=4", "checkpoint.dump.keep=1", "checkpoint.eval.keep=1"]
    extra = ["save_at=[1,3,6]", "grad_acc_steps=2", "steps=8", "logging.freq=4"]
    extra += ["checkpoint.eval.every=4", "eval.validation.context=8"]  # asked for alike
    train(train_args(corpus, tmp_path / "run", *keep, *extra))
    folders = (tmp_path / "run" / "checkpoints", tmp_path / "run" / "evals")
    saved, evaluated = (sorted(int(path.name) for path in one.iterdir()) for one in folders)
    assert saved == [1, 3, 6, 8] and evaluated == [4, 8]
    assert [line["global_step"] for line in read_metrics(tmp_path / "run")] == [4, 8]


def test_of_equal_frequencies_only_saving_is_answered_otherwise(tmp_path):
    """The questions of Meta Lingua's loop, in its order: two micro-batches make a step."""
    args = TopKTrainArgs(dump_dir=str(tmp_path), save_at=[1, 3])
    with install(args) as module:
        answers = []
        for step, acc_step in ((0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)):
            state = SimpleNamespace(step=step or 5, acc_step=acc_step)

            def ask(state=state, **kwargs):
                return module.every_n_steps(state, 1000, **kwargs)

            garbage = ask(acc_step=0)
            log = ask(acc_step=0, acc_freq=None)
            save = ask(acc_step=0) or ask(acc_step=0)
            answers.append([garbage, log, save, ask(acc_step=0)])
    saved = [False, False, True, False]
    assert answers == [[False] * 4, saved, [False] * 4, [False] * 4, [False] * 4, saved]


def test_every_start_is_written_down(corpus, whole_run, tmp_path):
    train(train_args(corpus, tmp_path / "run", "steps=2"))
    train(train_args(corpus, tmp_path / "run", "steps=3"))
    starts = json.loads((tmp_path / "run" / "provenance.json").read_text(encoding="utf-8"))
    assert [start["host"] for start in starts] == ["embedded host"] * 2
    assert starts[0]["seed"] == 7 and starts[0]["processes"] == 1
    log = (tmp_path / "run" / "train.log").read_text(encoding="utf-8")
    assert log.count("on the embedded host") == 2


def test_a_finished_run_says_so_and_stays_as_it_is(corpus, whole_run, capsys):
    metrics, folder = whole_run
    train(train_args(corpus, folder))
    assert "has done its 30 steps already" in capsys.readouterr().out
    assert read_metrics(folder) == metrics


def test_a_finished_run_keeps_its_config(corpus, whole_run):
    _, folder = whole_run
    before = (folder / "config.yaml").read_bytes()
    train(train_args(corpus, folder, "steps=10", "logging.freq=5"))
    assert (folder / "config.yaml").read_bytes() == before


def test_a_run_is_finished_where_the_first_process_finds_it_so(corpus, tmp_path, monkeypatch):
    """On another node its last checkpoint may not be in sight yet."""
    args = train_args(corpus, tmp_path / "run", "steps=2")
    train(args)
    found = train_module.newest_checkpoint(args.checkpoint), True
    monkeypatch.setattr(train_module, "newest_checkpoint", lambda _: None)
    monkeypatch.setattr(train_module, "from_first", lambda _: found)
    monkeypatch.setattr(train_module, "start_run", lambda _: pytest.fail("it is done"))
    train(train_args(corpus, tmp_path / "run", "steps=2"))


def test_a_missing_last_evaluation_is_made_up_for(corpus, tmp_path):
    evaluate = ["eval.validation.context=8", "steps=4"]
    train(train_args(corpus, tmp_path / "run", *evaluate))
    path = tmp_path / "run" / "evals" / "0000000004" / "validation.json"
    before = json.loads(path.read_text(encoding="utf-8"))["text"]
    path.unlink()
    path.with_name("provenance.json").unlink()  # without it an evaluation was not finished
    train(train_args(corpus, tmp_path / "run", *evaluate))
    assert json.loads(path.read_text(encoding="utf-8"))["text"] == before


def test_a_signal_during_the_start_is_not_lost(corpus, tmp_path, monkeypatch):
    start_run = train_module.start_run

    def signalled(args):
        os.kill(os.getpid(), signal.SIGTERM)
        return start_run(args)

    monkeypatch.setattr(train_module, "start_run", signalled)
    with pytest.raises(SystemExit) as ended:
        train(train_args(corpus, tmp_path / "run"))
    assert ended.value.code == 0
    assert len(read_metrics(tmp_path / "run")) == 1


def test_only_what_is_reported_may_change_in_the_model_of_a_run(corpus, tmp_path):
    train(train_args(corpus, tmp_path / "run", "steps=2"))
    train(train_args(corpus, tmp_path / "run", "steps=3", "model.topk.dead_window=5"))
    assert len(read_metrics(tmp_path / "run")) == 3
    with pytest.raises(Exception, match=r"model\.topk\.k=5, but the run .* has 4"):
        train(train_args(corpus, tmp_path / "run", "steps=4", "model.topk.k=5"))


@pytest.mark.parametrize("limit", [2_000, 30_000, 100_000])
def test_a_full_disk_costs_no_checkpoint(corpus, whole_run, tmp_path, capfd, limit):
    """No file may grow beyond the limit: one for the records, one for a checkpoint's parts."""
    args = [corpus, tmp_path / "run", "checkpoint.dump.every=2"]
    train(train_args(*args, "steps=2"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(SystemExit) as ended:
            cli.run(lambda: train(train_args(*args, "steps=8")))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert ended.value.code == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "cannot be written" in errors[0]
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["0000000002"]
    train(train_args(*args, "steps=8"))
    assert [line["global_step"] for line in read_metrics(tmp_path / "run")] == list(range(1, 9))


def test_the_checkpoints_of_twin_and_topk_have_the_same_keys(corpus, whole_run, tmp_path):
    from lingua.checkpoint import read_model

    _, folder = whole_run
    train(train_args(corpus, tmp_path / "run", "model.topk=null", "steps=10"))
    topk = read_model(folder / "checkpoints" / "0000000010")
    vanilla = read_model(tmp_path / "run" / "checkpoints" / "0000000010")
    assert {k: v.shape for k, v in topk.items()} == {k: v.shape for k, v in vanilla.items()}


def test_a_new_run_can_begin_from_the_weights_of_another(corpus, whole_run, tmp_path):
    metrics, folder = whole_run
    init = f"checkpoint.init_ckpt_path={folder}/checkpoints/0000000030"
    train(train_args(corpus, tmp_path / "run", init, "model.topk.anneal_ratio=0", "steps=2"))
    assert read_metrics(tmp_path / "run")[0]["loss/out"] < 1.2 * mean_loss(metrics[-5:])


def test_evaluation_is_part_of_training(corpus, tmp_path):
    evaluate = ["eval.validation.context=8", "checkpoint.eval.every=4", "steps=6"]
    train(train_args(corpus, tmp_path / "run", *evaluate))
    for step in (4, 6):  # every fourth, and the last
        path = tmp_path / "run" / "evals" / f"{step:010d}" / "validation.json"
        result = json.loads(path.read_text(encoding="utf-8"))
        assert result["provenance"]["step"] == step
        assert result["text"]["documents"] == 6
    lines = (tmp_path / "run" / "metrics.validation.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["global_step"] for line in lines] == [4, 6]


REPLACED = [
    (train_module, "LMTransformer"),
    (train_module, "build_optimizer"),
    (train_module, "dist_mean_dict"),
    (train_module, "every_n_steps"),
    (train_module, "CheckpointManager"),
    (eval_module, "EvalArgs"),
    (eval_module, "launch_eval"),
]


def originals():
    return [getattr(module, name) for module, name in REPLACED]


def test_the_seam_puts_everything_back_even_after_an_error():
    before = originals()
    with pytest.raises(ZeroDivisionError), seam.install(TopKTrainArgs()) as module:
        assert module is train_module
        assert all(a is not b for a, b in zip(before, originals(), strict=True))
        raise ZeroDivisionError
    assert before == originals()


@pytest.mark.parametrize(("module", "name"), REPLACED)
def test_a_host_without_a_replaced_name_is_refused(monkeypatch, module, name):
    monkeypatch.delattr(module, name)
    before = {n: getattr(m, n) for m, n in REPLACED if n != name}
    with pytest.raises(HostError, match=f"{module.__name__} of this host has no {name}"):
        entering(seam.install(TopKTrainArgs()))
    assert before == {n: getattr(m, n) for m, n in REPLACED if n != name}


def entering(context):
    with context:
        pytest.fail("the seam was installed on a host that lacks a name")
