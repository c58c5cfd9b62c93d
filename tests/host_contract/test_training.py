"""TopK models in Meta Lingua's own, unmodified loop, beside the embedded host's.

Lingua runs in a process of its own, its CUDA and NCCL calls answered by the CPU and gloo.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from apps.topk.tasks import make_tasks
from lingua_topk.anneal import alpha_at
from tests.apps.tiny import K, read_metrics, write_config, write_corpus

ROOT = Path(__file__).resolve().parents[2]
HOME = os.environ.get("LINGUA_HOME", "")
pytestmark = pytest.mark.skipif(not HOME, reason="LINGUA_HOME names no checkout of Meta Lingua")

STEPS = 30
LAUNCHER = "tests/host_contract/lingua_on_cpu.py"


def command(host, corpus, dump_dir, *overrides, processes=1, program="apps.topk.train"):
    """The words of a command line, and the environment that it runs in.

    With torchrun, which finds a free port, where Lingua alone always takes the same; without
    for `processes=0`, to see the exit status and to send signals.
    """
    words = [sys.executable]
    if processes:
        words += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    if host == "lingua":
        words.append(LAUNCHER)
    words += ["-m", program, f"config={corpus}/config.yaml", f"data.root_dir={corpus}"]
    words += [f"dump_dir={dump_dir}", *overrides]
    return words, {**os.environ, "OMP_NUM_THREADS": "1", "LINGUA_TOPK_HOST": host}


def run(host, corpus, dump_dir, *overrides, **launch):
    words, environment = command(host, corpus, dump_dir, *overrides, **launch)
    return subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def train(host, corpus, dump_dir, *overrides, **launch):
    done = run(host, corpus, dump_dir, *overrides, **launch)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = write_corpus(tmp_path_factory.mktemp("corpus"))
    write_config(root / "config.yaml")
    make_tasks(out=str(root / "tasks"), text=str(root / "text"))
    return root


@pytest.fixture(scope="module")
def lingua_run(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lingua") / "run"
    return folder, train("lingua", corpus, folder, *evaluation(corpus))


@pytest.fixture(scope="module")
def embedded_run(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedded") / "run"
    return folder, train("embedded", corpus, folder, *evaluation(corpus))


def evaluation(corpus):
    """Perplexity of held-out documents, and a task of lm-eval's."""
    harness = f"{{tasks: [text_rolling], include_path: {corpus}/tasks, bootstrap_iters: 0}}"
    return "eval.validation.context=8", f"eval.harness={harness}"


def compared(line):
    """What two hosts must agree on in a line of metrics.jsonl."""
    return {k: v for k, v in line.items() if k.startswith(("loss/", "optim/", "topk/"))}


def assert_same(metrics, expected, tolerance=1e-4):
    assert [line["global_step"] for line in metrics] == [line["global_step"] for line in expected]
    for line, other in zip(metrics, expected, strict=True):
        assert compared(line).keys() == compared(other).keys()
        for key, value in compared(line).items():
            assert value == pytest.approx(other[key], abs=tolerance, rel=tolerance), key


def test_alpha_falls_and_k_neurons_fire(lingua_run):
    metrics = read_metrics(lingua_run[0])
    assert len(metrics) == STEPS
    for line in metrics:
        assert line["topk/alpha"] == alpha_at(line["global_step"] - 1, STEPS, 0.5)
        if line["topk/alpha"] == 0:
            assert line["topk/l0/0"] == pytest.approx(K, abs=0.05)


def test_both_hosts_train_the_same_model(lingua_run, embedded_run):
    assert_same(read_metrics(lingua_run[0]), read_metrics(embedded_run[0]))


def test_both_hosts_evaluate_the_same(lingua_run, embedded_run):
    results = []
    for folder, _ in (lingua_run, embedded_run):
        path = folder / "evals" / f"{STEPS:010d}" / "validation.json"
        results.append(json.loads(path.read_text(encoding="utf-8")))
    assert results[0]["text"]["nll_per_token"] == pytest.approx(
        results[1]["text"]["nll_per_token"], abs=1e-4
    )
    tasks = [
        json.loads((folder / "evals" / f"{STEPS:010d}" / "results.json").read_text("utf-8"))
        for folder, _ in (lingua_run, embedded_run)
    ]
    answers = [
        [sample["resps"][0][0] for sample in one["samples"]["text_rolling"]] for one in tasks
    ]
    assert answers[0] == pytest.approx(answers[1], abs=1e-2) and len(answers[0]) == 6
    assert results[0]["provenance"]["host"].startswith("Meta Lingua at")
    assert results[1]["provenance"]["host"] == "embedded host"


def test_the_log_names_host_and_commit(lingua_run):
    log = (lingua_run[0] / "train.log").read_text(encoding="utf-8")
    assert f"Meta Lingua at {Path(HOME).resolve()}" in log
    (start,) = json.loads((lingua_run[0] / "provenance.json").read_text(encoding="utf-8"))
    assert start["host"] in log


@pytest.mark.parametrize(("first", "second"), [("lingua", "embedded"), ("embedded", "lingua")])
@pytest.mark.parametrize("topk", [True, False])
def test_a_run_goes_on_in_the_other_host(corpus, tmp_path, first, second, topk):
    """The first step after the change has its learning rate, its alpha and its batch."""
    variant = [] if topk else ["model.topk=null"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(first, corpus, whole, *variant)
    shutil.copytree(whole, halves)
    for step in (20, 30):
        shutil.rmtree(halves / "checkpoints" / f"{step:010d}")
    (halves / "metrics.jsonl").unlink()
    for params in halves.glob("checkpoints/*/params.json"):  # they name the folder they were in
        params.write_text(params.read_text("utf-8").replace(str(whole), str(halves)), "utf-8")
    train(second, corpus, halves, *variant)
    assert_same(read_metrics(halves), read_metrics(whole)[10:])


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_a_whole_step(corpus, tmp_path, lingua_run, number):
    """Lingua alone hears SIGUSR2 only, saves in mid-accumulation, and wants SLURM then."""
    often = ["checkpoint.dump.every=1000", "data.batch_size=2", "grad_acc_steps=2"]
    words, environment = command("lingua", corpus, tmp_path / "run", *often, processes=0)
    started = subprocess.Popen(
        words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    for line in started.stdout:
        if b"step: 5 " in line:
            started.send_signal(number)
            break
    started.stdout.read()
    assert started.wait(timeout=60) == 0
    saved = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert len(saved) == 1 and 5 <= saved[0] < STEPS
    state = tmp_path / "run/checkpoints" / f"{saved[0]:010d}" / "train_state_00000.json"
    assert json.loads(state.read_text(encoding="utf-8"))["acc_step"] == 0
    train("lingua", corpus, tmp_path / "run", *often)
    train("lingua", corpus, tmp_path / "whole", *often)
    assert_same(read_metrics(tmp_path / "run"), read_metrics(tmp_path / "whole"))


def test_a_signal_to_one_process_ends_both(corpus, tmp_path):
    words, environment = command("lingua", corpus, tmp_path / "run", processes=2)
    started = subprocess.Popen(
        words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    for line in started.stdout:
        if b"step: 5 " in line:
            children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text()
            os.kill(int(children.split()[0]), signal.SIGUSR2)
            break
    started.stdout.read()
    assert started.wait(timeout=60) == 0
    saved = max(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert 5 <= saved < STEPS
    assert len(list((tmp_path / "run/checkpoints" / f"{saved:010d}").glob("train_state_*"))) == 2


def test_two_processes_count_the_neurons_of_both(corpus, tmp_path, embedded_run):
    """Both hosts from the same weights; Lingua's own initialisation differs by process on gloo."""
    init = f"checkpoint.init_ckpt_path={embedded_run[0]}/checkpoints/0000000010"
    metrics = {}
    for host in ("lingua", "embedded"):
        train(host, corpus, tmp_path / host, init, "steps=8", processes=2)
        metrics[host] = read_metrics(tmp_path / host)
    assert len(metrics["lingua"]) == 8
    assert_same(metrics["lingua"], metrics["embedded"])


@pytest.fixture
def copied_run(lingua_run, tmp_path):
    """Lingua's run in a folder of its own."""
    folder = tmp_path / "copied"
    shutil.copytree(lingua_run[0], folder)
    for params in folder.glob("checkpoints/*/params.json"):  # they name the folder they were in
        text = params.read_text("utf-8").replace(str(lingua_run[0]), str(folder))
        params.write_text(text, "utf-8")
    return folder


@pytest.mark.parametrize("lost", [".metadata", "params.json", "train_state_00000.json", "distcp"])
def test_a_half_written_checkpoint_is_set_aside(corpus, copied_run, lingua_run, lost):
    """The last one, as a kill during the save leaves it: the run is not taken for finished."""
    last = copied_run / "checkpoints" / f"{STEPS:010d}"
    for path in last.glob(f"*{lost}" if lost == "distcp" else lost):
        path.unlink()
    done = train("lingua", corpus, copied_run, "eval.validation.context=8")
    assert f"is set aside as damaged_{STEPS:010d}" in done.stdout
    assert_same(read_metrics(copied_run), read_metrics(lingua_run[0]))


def test_another_number_of_processes_is_refused(corpus, copied_run):
    done = run("lingua", corpus, copied_run, "eval.validation.context=8", "steps=40", processes=2)
    assert "was saved by 1 processes, and this run has 2" in done.stderr


@pytest.mark.parametrize("host", ["lingua", "embedded"])
def test_a_finished_run_of_lingua_is_given_more_steps(corpus, copied_run, host):
    """Lingua's checkpoint of the last step has the rate of the peak in it."""
    train(host, corpus, copied_run, "eval.validation.context=8", "steps=40")
    rates = {line["global_step"]: line["optim/lr"] for line in read_metrics(copied_run)}
    step = STEPS - 5  # since the end of the warm-up, of 40 - 5
    expected = 0.5 * (1 + math.cos(math.pi * step / 35)) * 0.9 + 0.1
    assert rates[STEPS + 1] == pytest.approx(1e-2 * expected, rel=1e-6)


def test_data_can_be_loaded_in_a_process_of_its_own(corpus, tmp_path, lingua_run):
    train("lingua", corpus, tmp_path / "run", "steps=30", "data.load_async=true")
    assert_same(read_metrics(tmp_path / "run"), read_metrics(lingua_run[0]))


def test_early_steps_are_saved_besides(corpus, tmp_path):
    train("lingua", corpus, tmp_path / "run", "steps=4", "save_at=[1,3]", "checkpoint.dump.keep=1")
    saved = sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved == [1, 3, 4]


def test_a_finished_run_says_so(corpus, lingua_run):
    folder, _ = lingua_run
    before = read_metrics(folder)
    done = train("lingua", corpus, folder, "eval.validation.context=8")
    assert f"has done its {STEPS} steps already" in done.stdout
    assert read_metrics(folder) == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.topk.k=0"], "model.topk.k=0 is too small"),
        (["eval.validation.context=8", "steps=31"], "make steps a multiple of"),
        (["eval.validation.context=8", "async_eval_gpus=8"], "ignores model.topk"),
    ],
)
def test_a_mistake_is_one_line(corpus, tmp_path, overrides, message):
    done = run("lingua", corpus, tmp_path / "run", *overrides, processes=0)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "run").exists()


def test_it_runs_from_the_checkout_with_our_folder_linked_in(corpus, tmp_path):
    """As ./setup.sh lingua links it; LINGUA_HOME is not needed there."""
    checkout = tmp_path / "checkout"
    shutil.copytree(HOME, checkout, ignore=shutil.ignore_patterns(".git", "topk"))
    (checkout / "apps" / "topk").symlink_to(ROOT / "apps" / "topk")
    for host, described in (("auto", f"Meta Lingua at {checkout}"), ("embedded", "embedded host")):
        words, environment = command(host, corpus, tmp_path / host, "steps=2")
        if host == "auto":
            words.insert(words.index("--nproc-per-node=1") + 1, str(ROOT / LAUNCHER))
            environment["LINGUA_HOME"] = str(checkout)  # for the launcher, which looks there
        else:
            del environment["LINGUA_HOME"]
        done = subprocess.run(words, cwd=checkout, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        start = json.loads((tmp_path / host / "provenance.json").read_text(encoding="utf-8"))[0]
        assert start["host"].startswith(described)
        assert len(read_metrics(tmp_path / host)) == 2
