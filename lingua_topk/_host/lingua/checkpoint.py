"""Checkpoints by torch.distributed.checkpoint, in Lingua's layout.

    <path>/<step, 10 digits>/.metadata  *.distcp  params.json  train_state_<dp_rank>.json
                            /manifest.json
                            /consolidated/consolidated.pth  params.json

A checkpoint is written into a hidden folder beside its place and renamed when all of
it is there, and renamed back before it is deleted: a folder with a checkpoint's name is a
whole checkpoint. Whether it still is when a run goes on from it, its manifest tells.

torch.distributed.checkpoint is imported where it is used: it takes seconds, and programs that
only read a config come by here too.
"""

import json
import logging
import os
import re
import shutil
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from lingua._files import system_error
from lingua._manifest import (
    MANIFEST_NAME,
    describe_checkpoint,
    find_damage,
    from_first,
    together,
)
from lingua.distributed import get_is_master
from lingua.errors import CheckpointError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

logger = logging.getLogger(__name__)

# A program that reads a checkpoint has no process group, and needs none.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninit")

FOLDER_NAME = "{:010d}"
RE_FOLDER = re.compile(r"\d{10,}")
PARTIAL_PREFIX = ".partial_"

CONSOLIDATE_FOLDER = "consolidated"
CONSOLIDATE_NAME = "consolidated.pth"
CONFIG_NAME = "params.json"
TRAIN_STATE_NAME = "train_state_{:05d}.json"
METADATA_NAME = ".metadata"


@dataclass
class SaveEvery:
    every: int = 1000
    keep: int = 0  # the newest so many are kept; 0 keeps all


@dataclass
class CheckpointArgs:
    dump: SaveEvery = field(default_factory=SaveEvery)
    eval: SaveEvery = field(default_factory=SaveEvery)
    path: Optional[str] = None  # noqa: UP045
    init_ckpt_path: Optional[str] = None  # noqa: UP045
    continue_training_from_init: bool = False


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _write_files(folder: Path, contents: dict[str, Any]) -> None:
    """JSON files by name, on the disk when this returns."""
    for name, content in contents.items():
        _write_json(folder / name, content)
    _sync_folder(folder)


def _write_json(path: Path, content: Any) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): remove its folder to go on from an earlier"
            " checkpoint"
        ) from None


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder holds a whole distributed checkpoint, by Lingua's or our writing."""
    return (folder / METADATA_NAME).is_file() and (folder / CONFIG_NAME).is_file()


def consolidate_checkpoints(ckpt_dir: str | Path) -> Path:
    """Gather the weights of a checkpoint in one file; returns the folder that holds it.

    `consolidated.pth` is {"model": {name: CPU tensor}}, readable with weights_only=True.
    Whole existing output is returned as it is. Raises CheckpointError.
    """
    ckpt_dir = Path(ckpt_dir)
    folder = ckpt_dir / CONSOLIDATE_FOLDER
    if _is_consolidated(folder):
        return folder
    if not is_checkpoint(ckpt_dir):
        raise CheckpointError(
            f"{ckpt_dir} is not a whole checkpoint ({METADATA_NAME} and {CONFIG_NAME} are needed):"
            " give a folder such as dump_dir/checkpoints/0000001000"
        )
    weights = read_model(ckpt_dir)
    # A name of its own: two programs may do this at the same time.
    partial = ckpt_dir / f"{PARTIAL_PREFIX}{CONSOLIDATE_FOLDER}_{uuid4().hex[:8]}"
    try:
        partial.mkdir()
        with open(partial / CONSOLIDATE_NAME, "wb") as file:
            torch.save({"model": weights}, file)
            file.flush()
            os.fsync(file.fileno())
        shutil.copy(ckpt_dir / CONFIG_NAME, partial / CONFIG_NAME)
        _sync_folder(partial)
        if not _is_consolidated(folder):
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
    except (OSError, RuntimeError) as error:
        reason = system_error(error)
        if reason is None:
            raise
        if not _is_consolidated(folder):  # else the other one was faster
            raise CheckpointError(
                f"{folder} cannot be written: {reason}: make room there, then run it again"
            ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    logger.info("consolidated %s", folder)
    return folder


def _is_consolidated(folder: Path) -> bool:
    return (folder / CONSOLIDATE_NAME).is_file() and (folder / CONFIG_NAME).is_file()


def read_model(ckpt_dir: str | Path, model_key: str = "model") -> dict[str, torch.Tensor]:
    """The weights of a distributed checkpoint as CPU tensors, by name, without a process group."""
    entries = _tensor_entries(Path(ckpt_dir), model_key)
    if not entries:
        raise CheckpointError(f"{ckpt_dir} holds no tensor of {model_key!r}: is it a checkpoint?")
    weights = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
    }
    _dcp_load({model_key: weights} if model_key else weights, Path(ckpt_dir), no_dist=True)
    return weights


def load_from_checkpoint(
    ckpt_dir: str | Path,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    model_key: str = "model",
    optim_key: str = "optim",
) -> None:
    """Load the weights (and the optimizer's state) of a distributed checkpoint, in place.

    The optimizer keeps its own learning rate, weight decay and so on; what it gets is its
    memory of the parameters. Raises CheckpointError.
    """
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_state_dict,
    )

    ckpt_dir = Path(ckpt_dir)
    model_state = get_model_state_dict(model)
    check_fits(model_state, ckpt_dir, model_key)
    state = {model_key: model_state} if model_key else dict(model_state)
    if optimizer is None:
        _dcp_load(state, ckpt_dir)
        set_model_state_dict(model, model_state, options=StateDictOptions(strict=True))
        return
    own = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    state[optim_key] = get_optimizer_state_dict(model, optimizer)
    _dcp_load(state, ckpt_dir)
    set_state_dict(
        model, optimizer, model_state_dict=model_state, optim_state_dict=state[optim_key]
    )
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)


def _tensor_entries(ckpt_dir: Path, model_key: str) -> "dict[str, TensorStorageMetadata]":
    """What the checkpoint's index says of the model's tensors, by name."""
    if not (ckpt_dir / METADATA_NAME).is_file():
        raise CheckpointError(
            f"{ckpt_dir} is not a distributed checkpoint ({METADATA_NAME} not found): give a folder"
            f" such as dump_dir/checkpoints/0000001000, not its {CONSOLIDATE_FOLDER}/"
        )
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from lingua._index import Reader

    try:
        index = Reader(ckpt_dir).read_metadata().state_dict_metadata
    except Exception as error:  # it is a pickle: broken ones raise anything
        raise CheckpointError(
            f"{ckpt_dir / METADATA_NAME} cannot be read ({error}): remove the folder to go on from"
            " an earlier checkpoint"
        ) from error
    prefix = f"{model_key}." if model_key else ""
    return {
        name.removeprefix(prefix): entry
        for name, entry in index.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }


def check_fits(model_state: dict, ckpt_dir: Path, model_key: str) -> None:
    """CheckpointError where names or shapes differ: loading alone takes what it finds."""
    saved = {name: list(x.size) for name, x in _tensor_entries(ckpt_dir, model_key).items()}
    own = {name: list(x.shape) for name, x in model_state.items()}
    differing = sorted(name for name in {*saved, *own} if saved.get(name) != own.get(name))
    if differing:
        name = differing[0]
        raise CheckpointError(
            f"{ckpt_dir} is of another model: {name} is {saved.get(name, 'absent')} there and"
            f" {own.get(name, 'absent')} here ({len(differing)} such differences): give model.* as"
            f" in its {CONFIG_NAME}"
        )


def _dcp_load(state: dict, ckpt_dir: Path, no_dist: bool = False) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    from lingua._index import Planner, Reader

    try:
        dcp.load(state, storage_reader=Reader(ckpt_dir), planner=Planner(), no_dist=no_dist)
    except CheckpointException as error:
        raise CheckpointError(
            f"{ckpt_dir} cannot be loaded ({_first_reason(error)}): if the folder is damaged,"
            " remove it to go on from an earlier checkpoint"
        ) from error


def _first_reason(error: Exception) -> Exception:
    """What one of the processes said, where the library only says that some failed."""
    failures = getattr(error, "failures", None)
    return next(iter(failures.values()))[0] if failures else error


class CheckpointManager:
    """Saves, prunes and resumes the checkpoints of one run. `args.path` must exist."""

    def __init__(self, args: CheckpointArgs):
        self.path = Path(args.path)
        self.dump_every = args.dump
        self.eval_every = args.eval
        self.init_ckpt_path = args.init_ckpt_path
        if not self.path.is_dir():
            raise CheckpointError(
                f"checkpoint.path={self.path} is not a folder: create it, or use"
                " instantiate_and_make_dir"
            )
        self._damaged: set[Path] = set()  # those that were found to be, and are written anew
        self.existing_saves = self.get_existing_saves()

    @classmethod
    def instantiate_and_make_dir(cls, args: CheckpointArgs) -> "CheckpointManager":
        """Make the folder, and remove from it what an interrupted run left half-done."""
        if get_is_master():
            Path(args.path).mkdir(parents=True, exist_ok=True)
            for partial in Path(args.path).glob(f"{PARTIAL_PREFIX}*"):
                logger.warning("removing %s, which a run left that was interrupted", partial)
                shutil.rmtree(partial, ignore_errors=True)
        _barrier()
        return cls(args)

    def get_existing_saves(self) -> list[Path]:
        """The whole checkpoints, oldest first. Anything else in the folder is left alone."""
        folders = (path for path in self.path.iterdir() if RE_FOLDER.fullmatch(path.name))
        whole = (path for path in folders if is_checkpoint(path) and path not in self._damaged)
        return sorted(whole, key=_step)

    def clean_up(self) -> None:
        """Delete what neither `dump.keep` nor `eval.keep` keeps; steps of neither stay."""
        kept = self._kept()
        if get_is_master():
            for folder in self.existing_saves:
                if folder not in kept:
                    _remove(folder)
        _barrier()
        self.existing_saves = [folder for folder in self.existing_saves if folder in kept]

    def _kept(self) -> set[Path]:
        kept, claimed = set(), set()
        for rule in (self.dump_every, self.eval_every):
            members = [folder for folder in self.existing_saves if _step(folder) % rule.every == 0]
            claimed.update(members)
            kept.update(members[-rule.keep :] if rule.keep > 0 else members)
        kept.update(folder for folder in self.existing_saves if folder not in claimed)
        return kept

    def get_last_step_path(self, dp_rank: int = 0) -> Path | None:
        """The newest checkpoint with a train state for this rank, or None."""
        for folder in reversed(self.existing_saves):
            if (folder / TRAIN_STATE_NAME.format(dp_rank)).is_file():
                return folder
        return None

    def get_state_dict(self, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model_state, optim_state = get_state_dict(model, optimizer)
        return {"model": model_state, "optim": optim_state}

    def save(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        train_state,
        config,
        device_mesh: DeviceMesh | None = None,
    ) -> bool:
        """Write the checkpoint of `train_state.step`, then prune. All ranks call it.

        An existing whole checkpoint of the same step is kept: the run that made it
        reached the same state.
        """
        from torch.distributed.checkpoint.api import CheckpointException

        rank, size = data_parallel_rank(device_mesh)
        folder = self.path / FOLDER_NAME.format(train_state.step)
        is_there = folder in self.existing_saves and _n_train_states(folder) == size
        if from_first(is_there):
            return True
        partial = _partial(folder)
        try:
            together(lambda: _make_room(partial, folder))
            self._write(partial, model, optimizer, train_state, config, rank)
            together(lambda: _publish(partial, folder))
        except (OSError, CheckpointException) as error:
            if get_is_master():
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(
                f"{folder} cannot be written ({_first_reason(error)}): free or mend the disk, then"
                " start the run again; it goes on from the newest checkpoint that is there"
            ) from error
        self._damaged.discard(folder)
        logger.info("saved %s", folder)
        # One listing for all: that of another node's file system may be a little older.
        self.existing_saves = from_first(self.get_existing_saves())
        self.clean_up()
        return True

    def _write(self, partial: Path, model, optimizer, train_state, config, rank: int) -> None:
        """All files of a checkpoint, synced, the manifest last."""
        import torch.distributed.checkpoint as dcp

        from lingua._writer import Writer

        dcp.save(self.get_state_dict(model, optimizer), storage_writer=Writer(partial))
        files = {TRAIN_STATE_NAME.format(rank): train_state.state_dict()}
        if get_is_master():
            files[CONFIG_NAME] = asdict(config)
        together(lambda: _write_files(partial, files))
        manifest = {"files": describe_checkpoint(partial)}
        files = {MANIFEST_NAME: manifest} if get_is_master() else {}
        together(lambda: _write_files(partial, files))

    def load(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        train_state,
        device_mesh: DeviceMesh,
        path: str | Path | None = None,
    ) -> bool:
        """Resume from `path` or the newest whole checkpoint; False where there is none.

        Rank 0 chooses the folder for all. Weights, the optimizer's memory and train state
        come from it; the learning rate follows the scheduler's restored state. Another
        number of processes goes on from places in the data that are logged.
        """
        rank, size = data_parallel_rank(device_mesh)
        folder = self._checked(Path(path)) if path else self._newest_whole()
        if folder is None:
            return False
        n_states = check_train_states(folder)
        logger.info("resuming from %s", folder)
        names = [TRAIN_STATE_NAME.format(i) for i in range(n_states)]
        if n_states == size:
            state = _read_json(folder / names[rank])
            load_from_checkpoint(folder, model, optimizer)
            train_state.load_state_dict(state)
        else:
            states = [_read_json(folder / name) for name in names]
            load_from_checkpoint(folder, model, optimizer)
            logger.warning("saved by %d processes that read data, resumed by %d", n_states, size)
            train_state.load_state_dicts_of_others(states, rank, size)
        return True

    def _candidates(self) -> list[Path]:
        """Newest first, what can be resumed, and what was written to be and has lost a file."""
        folders = [path for path in self.path.iterdir() if RE_FOLDER.fullmatch(path.name)]
        return [
            folder
            for folder in sorted(folders, key=_step, reverse=True)
            if (folder / MANIFEST_NAME).is_file()
            or (is_checkpoint(folder) and _n_train_states(folder) > 0)
        ]

    def _checked(self, folder: Path) -> Path:
        check_train_states(folder)
        damage = find_damage(folder)
        if damage:
            raise CheckpointError(f"{folder} is damaged: {damage}: resume from another checkpoint")
        return folder

    def _newest_whole(self) -> Path | None:
        """Newest first, until one is as it was written. CheckpointError where none is.

        A damaged one is left where it is, and replaced when the run gets there again.
        """
        candidates = from_first(self._candidates())
        for folder in candidates:
            damage = find_damage(folder)
            if damage is None:
                return folder
            logger.warning("%s is damaged and passed over: %s", folder, damage)
            self._damaged.add(folder)
            self.existing_saves = [one for one in self.existing_saves if one != folder]
        if candidates:
            raise CheckpointError(
                f"checkpoint.path={self.path} holds {len(candidates)} checkpoints and none is whole"
                f" ({damage}, in the oldest): put one back, or move the folder away to begin anew"
            )
        return None


def _partial(folder: Path) -> Path:
    """Where a checkpoint is written, and whereto it is moved to be deleted."""
    return folder.with_name(PARTIAL_PREFIX + folder.name)


def _make_room(partial: Path, folder: Path) -> None:
    """On the first rank: what is written goes into an empty folder."""
    if get_is_master():
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        partial.mkdir()


def _publish(partial: Path, folder: Path) -> None:
    """On the first rank: all of it is there."""
    if get_is_master():
        partial.rename(folder)
        _sync_folder(folder.parent)


def _remove(folder: Path) -> None:
    """Delete a checkpoint. That it cannot be deleted is no reason to end a run."""
    logger.info("removing checkpoint %s", folder)
    try:
        folder.rename(_partial(folder))
        shutil.rmtree(_partial(folder))
    except OSError as error:
        logger.warning("%s could not be removed: %s", folder, error)


def check_train_states(folder: Path) -> int:
    """How many processes saved it, each its own place in the data. CheckpointError for none."""
    saved = _n_train_states(folder)
    if saved == 0:
        raise CheckpointError(
            f"{folder} holds no {TRAIN_STATE_NAME.format(0)}, so nothing can be resumed from it:"
            " give a folder such as dump_dir/checkpoints/0000001000"
        )
    return saved


def _n_train_states(folder: Path) -> int:
    return len(list(folder.glob(TRAIN_STATE_NAME.replace("{:05d}", "*"))))


def data_parallel_rank(device_mesh: DeviceMesh | None) -> tuple[int, int]:
    """This process's index among those that read different data, and their number."""
    if device_mesh is None:
        return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    names = device_mesh.mesh_dim_names
    replicate = device_mesh["dp_replicate"]
    rank, size = replicate.get_local_rank(), replicate.size()
    if "dp_shard" in names:
        shard = device_mesh["dp_shard"]
        rank, size = rank * shard.size() + shard.get_local_rank(), size * shard.size()
    return rank, size


def _step(folder: Path) -> int:
    return int(folder.name)
