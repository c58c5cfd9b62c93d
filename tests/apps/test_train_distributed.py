"""Two processes and one, fed the same global batches, train the same model."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import processes
from tests.apps import fixed_batches
from tests.apps.tiny import read_metrics, write_config, write_corpus

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node"]


def python(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """The folder with what every case gave in one process and in two."""
    out = tmp_path_factory.mktemp("runs")
    done = processes.run(2, "tests.apps.fixed_batches", corpus, out)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    fixed_batches.train_all(corpus, out)
    return out


def load(runs, case, size):
    found = torch.load(runs / f"{case}.{size}.pt", weights_only=True)
    return found, torch.tensor([line["loss/out"] for line in found["metrics"]], dtype=torch.float64)


# The selection is discontinuous: in fp32 one rounding difference can swap a neuron.
@pytest.mark.parametrize(
    ("case", "tolerance"), [("topk-fp64", 1e-8), ("vanilla-fp32", 1e-5), ("topk-fp32", 2e-3)]
)
def test_one_process_and_two_agree(runs, case, tolerance):
    (one, losses), (two, other_losses) = load(runs, case, 1), load(runs, case, 2)
    assert len(losses) == 20 and losses[-1] < 0.9 * losses[0]
    torch.testing.assert_close(losses, other_losses, rtol=0, atol=tolerance)
    assert (one["weights"]["layers.0.attention.wq.weight"].dtype == torch.float64) == (
        case == "topk-fp64"
    )
    # Adam divides by small second moments, so the weights agree less closely than the losses.
    for name, weight in one["weights"].items():
        torch.testing.assert_close(weight, two["weights"][name], rtol=0, atol=100 * tolerance)


@pytest.mark.parametrize("size", [1, 2])
def test_accumulated_gradients_are_those_of_the_whole_batch(runs, size):
    _, accumulated = load(runs, "accumulated-fp64", size)
    _, whole = load(runs, "topk-fp64", 1)
    torch.testing.assert_close(accumulated, whole, rtol=0, atol=1e-8)


@pytest.mark.parametrize("case", ["topk-fp64", "topk-fp32"])
def test_counts_are_of_all_processes(runs, case):
    (one, _), (two, _) = load(runs, case, 1), load(runs, case, 2)
    for a, b in zip(one["metrics"], two["metrics"], strict=True):
        for key in ("topk/l0/0", "topk/l0/1"):
            assert a[key] == pytest.approx(b[key], abs=1e-6 if case == "topk-fp64" else 0.05)
            dead = key.replace("l0", "dead")
            if case == "topk-fp64":
                assert a[dead] == b[dead]
        assert a["topk/alpha"] == b["topk/alpha"]
        assert a["optim/total_tokens"] == b["optim/total_tokens"]


def test_some_neuron_was_dead_and_some_other_came_back(runs):
    """Otherwise the comparison of counts above would show little."""
    dead = [line["topk/dead/0"] for line in load(runs, "topk-fp64", 2)[0]["metrics"]]
    assert max(dead) > 0


def test_two_processes_evaluate_as_one(runs):
    one, two = (load(runs, "topk-fp64", size)[0]["validation"] for size in (1, 2))
    assert one["tokens"] == two["tokens"]
    assert one["nll_per_token"] == pytest.approx(two["nll_per_token"], abs=1e-7)
    assert one["l0"] == pytest.approx(two["l0"], abs=1e-7)


def test_two_processes_train_with_the_loader_and_resume(corpus, tmp_path):
    config = write_config(tmp_path / "config.yaml")
    command = [
        2, "apps.topk.train", f"config={config}", f"data.root_dir={corpus}",
        f"dump_dir={tmp_path}/run", "data.load_async=true", "eval.validation.context=8",
    ]  # fmt: skip
    first = processes.run(*command, "steps=10")
    assert first.returncode == 0, first.stderr[-4000:]
    again = processes.run(*command, "steps=12")
    assert again.returncode == 0, again.stderr[-4000:]
    assert "resuming from" in again.stdout
    changed = re.findall(r"changed since the checkpoint: (\S+):", again.stdout)
    assert set(changed) == {"steps"}
    steps = sorted(path.name for path in (tmp_path / "run" / "evals").iterdir())
    assert steps == ["0000000010", "0000000012"]


def test_another_number_of_processes_goes_on(corpus, tmp_path):
    """From two to one and to two again; the log says where in the data."""
    config = write_config(tmp_path / "config.yaml")
    command = [
        "apps.topk.train", f"config={config}", f"data.root_dir={corpus}",
        f"dump_dir={tmp_path}/run", "checkpoint.dump.every=2", "data.prefetch_size=1",
    ]  # fmt: skip
    for count, steps in ((2, 4), (1, 8), (2, 10)):
        done = processes.run(count, *command, f"steps={steps}")
        assert done.returncode == 0, done.stderr[-4000:]
    metrics = read_metrics(tmp_path / "run")
    assert [line["global_step"] for line in metrics] == list(range(1, 11))
    log = (tmp_path / "run" / "train.log").read_text(encoding="utf-8")
    assert "saved by 2 processes that read data, resumed by 1" in log
    assert "saved by 1 processes that read data, resumed by 2" in log
    assert log.count("data of text: text.chunk.00.jsonl goes on at line") == 2
    places = re.findall(r"goes on at line (\d+) of pass (\d+)", log)
    assert [int(line) > 1 or int(passes) > 1 for line, passes in places] == [True, True]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_saves_the_step(corpus, tmp_path, number):
    config = write_config(tmp_path / "config.yaml")
    words = [
        sys.executable, "-m", *TORCHRUN, "2", "-m", "apps.topk.train", f"config={config}",
        f"data.root_dir={corpus}", f"dump_dir={tmp_path}/run", "steps=100000",
        "checkpoint.dump.every=100000", "grad_acc_steps=2",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "err", "w") as err:
        started = subprocess.Popen(
            words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=err
        )
    for line in started.stdout:
        if b"step: 3 " in line:
            started.send_signal(number)
            break
    started.stdout.read()
    started.wait(timeout=60)  # torchrun's own status is 1, whatever its processes say
    (saved,) = (int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved == read_metrics(tmp_path / "run")[-1]["global_step"] >= 3


def test_a_mistake_gives_one_line_from_one_process(corpus, tmp_path):
    config = write_config(tmp_path / "config.yaml")
    done = python(
        *TORCHRUN, 2, "-m", "apps.topk.train", f"config={config}", f"data.root_dir={corpus}",
        f"dump_dir={tmp_path}/run", "model.topk.k=0",
    )  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert lines == [
        "error: model.topk.k=0 is too small: TopK keeps at least 1 component, give k >= 1"
    ]
    assert "exitcode  : 2" in done.stderr or "exitcode: 2" in done.stderr
    assert not (tmp_path / "run").exists()


def test_what_stands_in_for_torchrun_tells_of_a_failure(tmp_path):
    done = processes.run(2, "apps.topk.train", f"config={tmp_path / 'nothing.yaml'}")
    assert done.returncode == 2 and done.stderr.startswith("error: config=")
