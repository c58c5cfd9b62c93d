"""lingua.checkpoint: what is saved comes back, and what is half-saved is never used.

Run by tests/processes.py this file is the program of two processes; see `two_processes`.
"""

import errno
import hashlib
import json
import logging
import os
import sys
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from apps.main.train import TrainArgs, TrainState
from apps.main.transformer import LMTransformer, LMTransformerArgs, build_fsdp_grouping_plan
from lingua import _manifest, checkpoint
from lingua.checkpoint import (
    CheckpointArgs,
    CheckpointManager,
    SaveEvery,
    consolidate_checkpoints,
    data_parallel_rank,
    load_from_checkpoint,
    read_model,
)
from lingua.distributed import (
    DistributedArgs,
    get_device_mesh,
    get_global_rank,
    parallelize_model,
    setup_torch_distributed,
)
from lingua.errors import CheckpointError
from lingua.optim import OptimArgs, build_optimizer
from tests import processes

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

MODEL = {"dim": 12, "n_layers": 2, "n_heads": 2, "vocab_size": 11, "multiple_of": 4}


def model_args(**values) -> LMTransformerArgs:
    return LMTransformerArgs(**{**MODEL, "max_seqlen": 16, **values})


class Run:
    """A training run of a tiny model, and the folder of its checkpoints."""

    def __init__(self, folder: Path, seed=0, optim=None, mesh=None, model=None, **values):
        torch.manual_seed(seed)
        self.config = TrainArgs(model=model_args(**values))
        self.mesh = mesh
        self.model = model or LMTransformer(self.config.model)
        self.model.init_weights()
        optim = optim or OptimArgs(lr=0.01, warmup=3)
        self.optimizer, scheduler = build_optimizer(self.model, optim, n_steps=20)
        rank, _ = data_parallel_rank(mesh)
        self.state = TrainState(0, 0, scheduler, {"place": 0, "rank": rank})
        self.args = CheckpointArgs(
            dump=SaveEvery(every=2), eval=SaveEvery(every=3), path=str(folder)
        )
        self.manager = CheckpointManager.instantiate_and_make_dir(self.args)

    def train(self, steps: int) -> list[float]:
        """The losses of so many steps; each sees other tokens."""
        losses = []
        for _ in range(steps):
            generator = torch.Generator().manual_seed(self.state.data_loader_state["place"])
            ids = torch.randint(11, (2, 9), generator=generator)
            loss = self.model(ids[:, :-1], ids[:, 1:])
            loss.backward()
            self.optimizer.step()
            self.state.scheduler.step()
            self.optimizer.zero_grad()
            self.state.step += 1
            self.state.data_loader_state["place"] += 1
            losses.append(loss.item())
        return losses

    def save(self) -> Path:
        assert self.manager.save(
            self.model, self.optimizer, self.state, self.config, device_mesh=self.mesh
        )
        return self.manager.path / f"{self.state.step:010d}"

    def load(self, path: Path | None = None) -> bool:
        return self.manager.load(self.model, self.optimizer, self.state, self.mesh, path)


@pytest.fixture
def saved(tmp_path) -> Path:
    """The checkpoint of step 3."""
    run = Run(tmp_path / "checkpoints")
    run.train(3)
    return run.save()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_layout_of_a_checkpoint(saved):
    assert saved.name == "0000000003"
    files = {".metadata", "__0_0.distcp", "params.json", "train_state_00000.json"}
    assert names(saved) == {*files, "manifest.json"}
    assert names(saved.parent) == {saved.name}
    manifest = json.loads((saved / "manifest.json").read_text())["files"]
    assert manifest.keys() == files
    for name, entry in manifest.items():
        content = (saved / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    params = json.loads((saved / "params.json").read_text())
    assert params == asdict(TrainArgs(model=model_args()))
    state = json.loads((saved / "train_state_00000.json").read_text())
    assert state.keys() == {"step", "acc_step", "data_loader_state", "scheduler"}
    assert (state["step"], state["data_loader_state"]) == (3, {"place": 3, "rank": 0})


@pytest.mark.parametrize("tied", [False, True])
def test_a_resumed_run_goes_on_as_if_it_had_never_stopped(tmp_path, tied):
    first = Run(tmp_path, weight_tying=tied)
    first.train(3)
    first.save()
    rate = first.optimizer.param_groups[0]["lr"]
    expected = first.train(4)
    second = Run(tmp_path, seed=1, weight_tying=tied)
    assert second.load()
    assert second.state.step == 3 and second.state.data_loader_state["place"] == 3
    assert second.optimizer.param_groups[0]["lr"] == rate > 0
    assert second.train(4) == expected
    assert_same(weights(second.model), weights(first.model))


def test_the_optimizer_keeps_the_settings_of_the_config(saved):
    optim = OptimArgs(lr=0.01, warmup=3, weight_decay=0.5, beta1=0.8)
    run = Run(saved.parent, optim=optim)
    run.load()
    (group,) = run.optimizer.param_groups
    assert (group["weight_decay"], group["betas"]) == (0.5, (0.8, 0.95))
    memory = run.optimizer.state[run.model.output.weight]
    assert memory["step"] == 3 and memory["exp_avg"].abs().sum() > 0


def test_a_run_without_checkpoints_starts_at_its_beginning(tmp_path):
    run = Run(tmp_path)
    before = weights(run.model)
    assert not run.load()
    assert run.state.step == 0
    assert_same(weights(run.model), before)


def test_the_newest_checkpoint_is_resumed_unless_another_is_named(tmp_path):
    run = Run(tmp_path)
    run.train(1)
    early = run.save()
    run.train(1)
    run.save()
    run = Run(tmp_path)
    assert run.load() and run.state.step == 2
    assert run.load(early) and run.state.step == 1
    assert run.load(str(early)) and run.state.step == 1


@pytest.mark.parametrize(
    ("dump", "evaluation", "kept"),
    [
        ((2, 0), (3, 0), [1, 2, 3, 4, 5, 6, 7, 8]),
        ((2, 1), (3, 0), [1, 3, 5, 6, 7, 8]),
        ((2, 1), (3, 1), [1, 5, 6, 7, 8]),
        ((2, 2), (4, 1), [1, 3, 5, 6, 7, 8]),
        ((1, 1), (100, 1), [8]),
        ((1, 2), (3, 1), [6, 7, 8]),
        ((1, -1), (1, 1), [1, 2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_the_newest_of_each_kind_are_kept(saved, dump, evaluation, kept):
    folders = [saved.parent / f"{step:010d}" for step in range(1, 9)]
    for folder in folders:
        if folder != saved:
            folder.mkdir()
            for name in (".metadata", "params.json"):
                (folder / name).touch()
    args = CheckpointArgs(SaveEvery(*dump), SaveEvery(*evaluation), path=str(saved.parent))
    manager = CheckpointManager(args)
    assert manager.existing_saves == folders
    manager.clean_up()
    assert manager.existing_saves == [folders[step - 1] for step in kept]
    assert names(saved.parent) == {f"{step:010d}" for step in kept}


def test_saving_prunes(tmp_path):
    run = Run(tmp_path)
    run.manager.dump_every.keep = run.manager.eval_every.keep = 1
    for _ in range(6):
        run.train(1)
        run.save()
    assert names(tmp_path) == {"0000000001", "0000000005", "0000000006"}
    assert [path.name for path in run.manager.existing_saves] == sorted(names(tmp_path))


def test_what_is_no_whole_checkpoint_is_neither_used_nor_deleted(saved):
    folder = saved.parent
    others = {
        "0000000010_old": [".metadata", "params.json"],
        "x0000000011": [".metadata", "params.json"],
        "12": [".metadata", "params.json"],
        "0000000013": [".metadata"],
        "0000000014": ["params.json"],
    }
    for name, files in others.items():
        (folder / name).mkdir()
        for file in files:
            (folder / name / file).touch()
    (folder / "0000000015").touch()
    args = CheckpointArgs(SaveEvery(1, 1), SaveEvery(1, 1), path=str(folder))
    manager = CheckpointManager(args)
    assert manager.existing_saves == [saved]
    manager.clean_up()
    assert names(folder) == {saved.name, "0000000015", *others}
    run = Run(folder)
    assert run.load() and run.state.step == 3


def test_an_interrupted_save_is_no_checkpoint_and_is_cleared_away(saved, monkeypatch):
    run = Run(saved.parent)
    run.load()
    run.train(1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "_write_json", interrupt)
        run.save()
    assert names(saved.parent) == {saved.name, ".partial_0000000004"}
    assert CheckpointManager(run.args).existing_saves == [saved]
    assert run.save().is_dir()
    (saved.parent / ".partial_0000000009").mkdir()
    run = Run(saved.parent)
    assert names(saved.parent) == {saved.name, "0000000004"}
    assert run.load() and run.state.step == 4


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def test_a_checkpoint_without_train_state_is_not_resumed_but_written_anew(saved):
    """As Meta Lingua leaves it when it is killed at that moment."""
    run = Run(saved.parent)
    run.load()
    run.train(1)
    broken = run.save()
    (broken / "train_state_00000.json").unlink()
    run = Run(saved.parent)
    assert run.load() and run.state.step == 3
    run.train(1)
    run.save()
    assert (broken / "train_state_00000.json").is_file()


def test_a_whole_checkpoint_is_not_written_twice(saved):
    before = (saved / "params.json").stat().st_mtime_ns
    run = Run(saved.parent)
    run.load()
    assert run.save() == saved
    assert (saved / "params.json").stat().st_mtime_ns == before


def test_a_checkpoint_that_cannot_be_deleted_is_a_warning(tmp_path, monkeypatch, caplog):
    def fail(path):
        raise OSError("busy")

    monkeypatch.setattr(checkpoint.shutil, "rmtree", fail)
    folder = tmp_path / "0000000003"
    folder.mkdir()
    checkpoint._remove(folder)
    assert "0000000003 could not be removed: busy" in caplog.text
    assert names(tmp_path) == {".partial_0000000003"}


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    args = CheckpointArgs(path=str(tmp_path / "none"))
    with pytest.raises(CheckpointError, match="none is not a folder"):
        CheckpointManager(args)
    CheckpointManager.instantiate_and_make_dir(args)
    assert (tmp_path / "none").is_dir()


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_takes_its_initial_weights_from_a_checkpoint(tmp_path, tied):
    run = Run(tmp_path, weight_tying=tied)
    run.train(2)
    folder = run.save()
    with torch.device("meta"):
        model = LMTransformer(model_args(weight_tying=tied))
    model.to_empty(device="cpu")
    load_from_checkpoint(folder, model)
    assert_same(weights(model), weights(run.model))
    assert_same(read_model(folder), weights(run.model))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"n_layers": 3}, r"layers\.2\.\S+ is absent there and \[12, 12\] here \(9 such"),
        ({"n_layers": 1}, r"layers\.1\.\S+ is \[12, 12\] there and absent here \(9 such"),
        ({"dim": 16}, r"layers\.0\.attention\.wk\.weight is \[12, 12\] there and \[16, 16\] here"),
        ({"n_kv_heads": 1}, r"wk\.weight is \[12, 12\] there and \[6, 12\] here"),
        ({"weight_tying": True}, r"output\.tied_module\.weight is absent there"),
    ],
)
def test_weights_of_another_model_are_refused(saved, values, text):
    model = LMTransformer(model_args(**values))
    before = weights(model)
    with pytest.raises(CheckpointError, match=text) as caught:
        load_from_checkpoint(saved, model)
    assert "params.json" in str(caught.value) and "\n" not in str(caught.value)
    assert_same(weights(model), before)


def test_a_checkpoint_may_hold_a_bare_model(tmp_path):
    model, other = (LMTransformer(model_args()) for _ in range(2))
    torch.distributed.checkpoint.save(model.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    load_from_checkpoint(tmp_path, other, model_key="")
    assert_same(weights(other), weights(model))
    with pytest.raises(CheckpointError, match="is of another model"):
        load_from_checkpoint(tmp_path, other)


@pytest.mark.parametrize("tied", [False, True])
def test_consolidated_weights_are_those_of_the_model(tmp_path, tied):
    run = Run(tmp_path, weight_tying=tied)
    run.train(2)
    saved = run.save()
    folder = consolidate_checkpoints(str(saved))
    assert folder == saved / "consolidated"
    assert names(folder) == {"consolidated.pth", "params.json"}
    assert not [name for name in names(saved) if name.startswith(".partial")]
    content = torch.load(folder / "consolidated.pth", weights_only=True)
    assert content.keys() == {"model"}
    assert_same(content["model"], weights(run.model))
    LMTransformer(model_args(weight_tying=tied)).load_state_dict(content["model"], strict=True)
    assert (folder / "params.json").read_text() == (saved / "params.json").read_text()


def test_consolidated_weights_are_made_once(saved):
    target = consolidate_checkpoints(saved) / "consolidated.pth"
    before = target.stat().st_mtime_ns
    consolidate_checkpoints(saved)
    assert target.stat().st_mtime_ns == before


@pytest.mark.parametrize("left", [[], ["consolidated.pth"], ["params.json"]])
def test_an_interrupted_consolidation_is_repaired(saved, left):
    (saved / "consolidated").mkdir()
    for name in left:
        (saved / "consolidated" / name).write_text("half")
    content = torch.load(consolidate_checkpoints(saved) / "consolidated.pth", weights_only=True)
    assert_same(content["model"], read_model(saved))


def test_a_consolidation_that_fails_leaves_nothing(saved, monkeypatch):
    def fail(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint.shutil, "copy", fail)
    before = names(saved)
    with pytest.raises(CheckpointError, match="consolidated cannot be written: no space left"):
        consolidate_checkpoints(saved)
    assert names(saved) == before


def test_two_programs_may_consolidate_at_the_same_time(saved, monkeypatch):
    copy, target = checkpoint.shutil.copy, saved / "consolidated" / "consolidated.pth"
    made = []

    def the_other_is_faster(*args):
        monkeypatch.setattr(checkpoint.shutil, "copy", copy)
        consolidate_checkpoints(saved)
        made.append(target.stat().st_ino)
        return copy(*args)

    monkeypatch.setattr(checkpoint.shutil, "copy", the_other_is_faster)
    before = names(saved)
    assert consolidate_checkpoints(saved) == target.parent
    assert names(saved) == {*before, "consolidated"}
    assert made == [target.stat().st_ino]


def test_a_consolidated_folder_is_not_a_checkpoint(saved):
    folder = consolidate_checkpoints(saved)
    with pytest.raises(CheckpointError, match=r"not a distributed checkpoint.* consolidated/"):
        load_from_checkpoint(folder, LMTransformer(model_args()))
    with pytest.raises(CheckpointError, match="is not a whole checkpoint"):
        consolidate_checkpoints(folder)


FILES = [".metadata", "__0_0.distcp", "params.json", "train_state_00000.json", "manifest.json"]


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "emptied":
        path.write_bytes(b"")
    elif how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "one bit":
        flipped = bytes([content[len(content) // 2] ^ 1])
        path.write_bytes(content[: len(content) // 2] + flipped + content[len(content) // 2 + 1 :])
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["emptied", "cut", "one bit", "gone"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_passed_over_and_written_anew(saved, caplog, name, how):
    run = Run(saved.parent)
    run.load()
    run.train(1)
    newest = run.save()
    before = {file: (newest / file).read_bytes() for file in FILES}
    damage(newest / name, how)
    caplog.clear()
    run = Run(saved.parent)
    if (name, how) in (("manifest.json", "gone"), ("manifest.json", "one bit")):
        # Without it the rest is as good as a checkpoint by Meta Lingua; a bit may change a space.
        assert run.load()
        return
    assert run.load() and run.state.step == 3
    if how != "gone":
        assert f"{newest} is damaged and passed over: {name}" in caplog.text
    assert newest.is_dir()
    run.train(1)
    assert run.save() == newest
    assert Run(saved.parent).load()
    for file in ("params.json", "train_state_00000.json"):
        assert (newest / file).read_bytes() == before[file]


def test_a_damaged_checkpoint_does_not_push_out_a_whole_one(saved):
    """keep counts those that a run could go on from."""
    run = Run(saved.parent)
    run.manager.dump_every.keep = run.manager.eval_every.keep = 1
    run.load()
    for _ in range(3):
        run.train(1)
        last = run.save()
    damage(last / "__0_0.distcp", "one bit")
    run = Run(saved.parent)
    run.manager.dump_every.keep = run.manager.eval_every.keep = 1
    assert run.load() and run.state.step == 5
    run.train(1)
    run.save()
    assert {"0000000005", "0000000006"} <= names(saved.parent)


def test_without_a_whole_checkpoint_a_run_does_not_begin_anew(saved):
    damage(saved / "__0_0.distcp", "cut")
    with pytest.raises(CheckpointError, match=r"none is whole \(__0_0\.distcp has"):
        Run(saved.parent).load()
    with pytest.raises(CheckpointError, match=r"0000000003 is damaged: __0_0\.distcp has"):
        Run(saved.parent).load(saved)
    assert saved.is_dir()


@pytest.mark.parametrize(
    ("name", "how", "said"),
    [
        (".metadata", "cut", r"\.metadata cannot be read"),
        ("__0_0.distcp", "cut", r"__0_0\.distcp has \d+ bytes and should have"),
        ("__0_0.distcp", "gone", r"__0_0\.distcp is missing"),
    ],
)
def test_without_a_manifest_the_index_tells(saved, caplog, name, how, said):
    (saved / "manifest.json").unlink()
    assert Run(saved.parent).load()
    damage(saved / name, how)
    with pytest.raises(CheckpointError, match=said):
        Run(saved.parent).load()


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/b"])
def test_a_manifest_names_files_of_its_folder_only(saved, name):
    path = saved / "manifest.json"
    content = json.loads(path.read_text())
    content["files"][name] = {"bytes": 1, "sha256": "0"}
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"manifest\.json lists what is no file of it"):
        Run(saved.parent).load()


def test_a_damaged_checkpoint_is_not_consolidated(saved):
    (saved / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match="0000000003 cannot be loaded"):
        consolidate_checkpoints(saved)
    assert "consolidated" not in names(saved)


def test_a_named_folder_without_train_state_is_an_error(saved, tmp_path):
    with pytest.raises(CheckpointError, match=r"other holds no train_state_00000\.json"):
        Run(saved.parent).load(tmp_path / "other")


# Two processes.


def sharded_run(folder: Path, seed: int, recompute: bool) -> Run:
    args = DistributedArgs(
        dp_shard=2, fsdp_type="full_shard", model_dtype="fp32",
        selective_activation_checkpointing=recompute,
    )  # fmt: skip
    mesh = get_device_mesh(args)
    with torch.device("meta"):
        model = LMTransformer(model_args())
    model = parallelize_model(
        model, mesh, model_args(), args, fsdp_grouping_plan=build_fsdp_grouping_plan(model_args())
    )
    return Run(folder, seed=seed, mesh=mesh, model=model.to_empty(device="cpu"))


def refused_save(run: Run) -> str:
    """What a process says where the second one cannot read its new files again."""

    def unreadable(path: Path) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    with pytest.MonkeyPatch.context() as patch, pytest.raises(CheckpointError) as refused:
        if get_global_rank() == 1:
            patch.setattr(_manifest, "_sha256", unreadable)
        run.save()
    return str(refused.value)


def program(folder: Path) -> None:
    """Save with recomputation, resume without; then go on with what one process saved."""
    setup_torch_distributed(DistributedArgs())
    first = sharded_run(folder / "two", seed=0, recompute=True)
    first.manager.dump_every.keep = 1
    first.train(2)
    first.save()
    first.train(2)
    first.save()
    saves = [path.name for path in first.manager.existing_saves]
    losses = first.train(2)
    second = sharded_run(folder / "two", seed=1, recompute=False)
    second.load()
    results = {"saves": saves, "losses": losses, "state": deepcopy(second.state.state_dict())}
    results["resumed losses"] = second.train(2)
    third = sharded_run(folder / "one", seed=1, recompute=False)
    third.state.load_state_dicts_of_others = lambda states, rank, size: (
        results.update(others=(states, rank, size)),
        third.state.load_state_dict(states[0]),
    )
    third.load()
    results["after one"] = third.train(2)
    results["refused"] = refused_save(third)
    torch.save(results, folder / f"{get_global_rank()}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> tuple[Path, list[dict]]:
    """Their folder, and the results of both, by rank."""
    folder = tmp_path_factory.mktemp("two_processes")
    run = Run(folder / "one")
    run.train(1)
    run.save()
    alone = run.train(2)
    done = processes.run(2, "tests.host.test_checkpoint", folder)
    assert done.returncode == 0, done.stderr
    results = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    return folder, [{**result, "alone": alone} for result in results]


def test_two_processes_save_and_resume_one_checkpoint(two_processes):
    folder, results = two_processes
    assert names(folder / "two") == {"0000000004"}
    assert names(folder / "two" / "0000000004") == {
        ".metadata", "__0_0.distcp", "__1_0.distcp", "params.json", "manifest.json",
        "train_state_00000.json", "train_state_00001.json",
    }  # fmt: skip
    for rank, result in enumerate(results):
        assert result["saves"] == ["0000000004"]
        assert result["state"]["data_loader_state"] == {"place": 4, "rank": rank}
        assert result["resumed losses"] == result["losses"]


def test_one_process_reads_what_two_have_saved(two_processes, tmp_path):
    folder, results = two_processes
    checkpoint = folder / "two" / "0000000004"
    run = Run(tmp_path, seed=1)
    load_from_checkpoint(checkpoint, run.model, run.optimizer)
    content = torch.load(consolidate_checkpoints(checkpoint) / "consolidated.pth")
    assert_same(content["model"], weights(run.model))
    run.state.load_state_dict(results[0]["state"])
    assert run.train(2) == pytest.approx(results[0]["losses"], rel=1e-5)


def test_two_processes_go_on_with_what_one_has_saved(two_processes):
    """Weights and the optimizer's memory exactly; the places in the data are tests/host/reshare."""
    _, results = two_processes
    for rank, result in enumerate(results):
        states, *place = result["others"]
        assert place == [rank, 2] and [state["step"] for state in states] == [1]
        assert result["after one"] == pytest.approx(result["alone"], rel=1e-5)


def test_what_one_process_cannot_read_again_ends_both(two_processes):
    folder, results = two_processes
    assert results[0]["refused"] == results[1]["refused"]
    assert "0000000003 cannot be written" in results[0]["refused"]
    assert "Input/output error" in results[0]["refused"]
    assert names(folder / "one") == {"0000000001"}


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    program(Path(sys.argv[1]))
