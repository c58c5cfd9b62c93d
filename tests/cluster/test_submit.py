"""A sweep by apps.topk.submit on a real SLURM: an array, and an array of evaluations behind it."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from apps.topk import submit
from tests.apps.tiny import CONFIG, read_metrics, write_corpus
from tests.cluster.slurm import PARTITION

ROOT = Path(__file__).resolve().parents[2]
STEPS = 200  # a second at least, in which a signal arrives


CONFIG_WITHOUT_SAVES = OmegaConf.merge(
    OmegaConf.create(CONFIG), {"checkpoint": {"dump": {"every": 10_000}}}
)


@pytest.fixture
def project(in_cluster, tmp_path, monkeypatch):
    """This process in a folder with links to ours, text, and three configs."""
    write_corpus(tmp_path)
    for name in ("apps", "lingua_topk"):
        (tmp_path / name).symlink_to(ROOT / name)
    plain = {"model": {"topk": None}}
    for name, changes in (
        ("fails", {**plain, "data": {"root_dir": "nowhere"}}),
        ("paused", {**plain, "steps": 100_000}),
        ("topk_a", {}),
    ):
        mine = {"name": name, "dump_dir": f"runs/{name}", "steps": STEPS, "data": {"root_dir": "."}}
        config = OmegaConf.merge(CONFIG_WITHOUT_SAVES, mine, changes)
        OmegaConf.save(config, tmp_path / f"{name}.yaml")
    text = "{name: mine, validation: {context: 8, max_documents: 2}}"
    (tmp_path / "eval.yaml").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def text_of(folder, pattern):
    return "".join(path.read_text("utf-8") for path in folder.glob(pattern))


def test_a_sweep_with_a_run_that_fails_one_that_is_paused_and_one_that_is_requeued(
    project, in_cluster, capfd
):
    words = ["sweep=[fails.yaml,paused.yaml,topk_a.yaml]", "eval_config=eval.yaml"]
    submit.main([*words, "ngpu=1", "ncpu=1", f"partition={PARTITION}", "time=30"])
    said = capfd.readouterr().out
    names = ("fails", "paused", "topk_a", "vanilla_a")
    array = said.partition("runs as job array ")[2].partition(",")[0]
    evaluations = said.partition("evaluations as job array ")[2].partition(":")[0]
    run = {name: f"{array}_{n}" for n, name in enumerate(names)}
    evaluation = {name: f"{evaluations}_{n}" for n, name in enumerate(names)}
    folder = {name: project / "runs" / name for name in names}

    def has_begun(name):
        metrics = folder[name] / "metrics.jsonl"
        return metrics.is_file() and metrics.stat().st_size > 0

    # As SLURM does before a time limit, and as from somebody who wants it to end.
    for name, signal in (("vanilla_a", "USR2"), ("paused", "TERM")):
        in_cluster.wait_until(lambda name=name: has_begun(name), f"{name} to begin")
        in_cluster.run("scancel", f"--signal={signal}", run[name])
    # The last element has the array's own number, by which all would be requeued.
    assert in_cluster.show(run["vanilla_a"])["JobId"] == array
    in_cluster.wait_until(
        lambda: in_cluster.show(run["vanilla_a"])["Reason"] == "BeginTime", "a requeue"
    )
    in_cluster.update(run["vanilla_a"], StartTime="now")  # by itself it waits for two minutes
    assert in_cluster.state(evaluation["vanilla_a"]) == "PENDING"

    ended = {name: in_cluster.wait(evaluation[name])["JobState"] for name in names}
    assert ended == {
        "fails": "CANCELLED", "paused": "FAILED", "topk_a": "COMPLETED", "vanilla_a": "COMPLETED",
    }  # fmt: skip
    states = {name: in_cluster.show(run[name]) for name in names}
    assert [states[name]["JobState"] for name in names] == ["FAILED"] + ["COMPLETED"] * 3
    assert [states[name]["Restarts"] for name in names] == ["0", "0", "0", "1"]
    for name in ("topk_a", "vanilla_a"):
        assert [line["global_step"] for line in read_metrics(folder[name])] == [
            *range(1, STEPS + 1)
        ]
        results = json.loads((folder[name] / "evals/mine/validation.json").read_text("utf-8"))
        assert results["provenance"]["checkpoint"] == str(folder[name] / f"checkpoints/{STEPS:010}")
        assert bool(results["provenance"]["model"]["topk"]) == (name == "topk_a")
    assert "nowhere/text" in text_of(folder["fails"], "logs/*.err")
    assert not list(folder["fails"].glob("evals/mine/logs/*"))
    said = text_of(folder["paused"], "evals/mine/logs/*.err")
    assert "of 100,000: the run was paused, and is not done" in said
    assert not (folder["paused"] / "evals/mine/validation.json").exists()
