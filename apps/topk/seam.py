"""The seam between TopK and the host's training loop: which names are replaced, by what.

The loop is the host's own. It looks these names up in its modules when it runs; each is
checked before any is replaced, and all are put back on exit.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from apps.topk import lingua_host, nonfinite
from apps.topk.annealing import AnnealingScheduler, ResumableScheduler
from apps.topk.model import TopKTrainArgs, TopKTransformer
from lingua_topk import topk_handle
from lingua_topk._host.lingua._lock import folders_of_run, held
from lingua_topk.errors import HostError

logger = logging.getLogger(__name__)

_NOT_GIVEN = object()


class Seam:
    """The replacements for one run; they share the scheduler that drives alpha.

    `args` is the run's config. `started` is called in every process once the run is certain:
    the config is checked, the log is open, the weights are in place. `resumed` is called after
    it where the run goes on from a checkpoint, with the steps that are done.
    """

    def __init__(
        self,
        train_module: ModuleType,
        eval_module: ModuleType,
        args: TopKTrainArgs,
        started: Callable[[], None],
        resumed: Callable[[int], None],
    ):
        self._args = args
        self._started = started
        self._resumed = resumed
        self._every_n_steps = _lookup(train_module, "every_n_steps")
        self._build_optimizer = _lookup(train_module, "build_optimizer")
        self._dist_mean_dict = _lookup(train_module, "dist_mean_dict")
        self._manager = _lookup(train_module, "CheckpointManager")
        self.annealing: AnnealingScheduler | None = None
        self.guard: nonfinite.Guard | None = None
        self.stops: lingua_host.Stops | None = None
        self._is_log_asked = False

        from apps.topk.eval import EvalArgs, launch_eval

        self.replacements: list[tuple[ModuleType, str, Any]] = [
            (train_module, "LMTransformer", TopKTransformer),
            (train_module, "build_optimizer", self.build_optimizer),
            (train_module, "dist_mean_dict", self.dist_mean_dict),
            (train_module, "every_n_steps", self.every_n_steps),
            (train_module, "CheckpointManager", self._guarded_manager()),
            (eval_module, "EvalArgs", EvalArgs),
            (eval_module, "launch_eval", launch_eval),
        ]
        if lingua_host.is_lingua():
            self.stops = lingua_host.Stops()
            self._folders = contextlib.ExitStack()
            self._dump_config = _lookup(train_module, "dump_config")
            self.replacements += [
                (train_module, "dump_config", self.dump_config),
                (train_module, "preemption_flag", self.stops),
                (train_module, "requeue_slurm_job", self.stops.requeue),
            ]
        for module, name, _ in self.replacements:
            _lookup(module, name)
        _lookup(train_module, "train")  # what all this is for

    def build_optimizer(self, model, args, n_steps):
        """The host's optimizer; a TopK model's scheduler also drives alpha.

        Called after the weights are on their device, which is when counters can be made.
        """
        optimizer, scheduler = self._build_optimizer(model, args, n_steps)
        if self.stops is not None:
            self.stops.listen()
        self._started()
        self.guard = nonfinite.Guard(self._args.nonfinite, model, optimizer, scheduler)
        handle = topk_handle(model)
        if handle is None:
            resumable = ResumableScheduler(scheduler, self._resumed)
        else:
            resumable = AnnealingScheduler(scheduler, handle, n_steps, self._resumed)
            self.annealing = resumable
        return optimizer, nonfinite.GuardedScheduler(resumable, self.guard)

    def _guarded_manager(self) -> type:
        """The host's keeper of checkpoints, which saves nothing once the run is to end."""
        seam = self

        class GuardedManager(self._manager):
            def save(self, *args: Any, **kwargs: Any) -> bool:
                if seam.guard is not None:
                    seam.guard.check()
                return super().save(*args, **kwargs)

        return GuardedManager

    def dump_config(self, config: Any, path: Path, *args: Any, **kwargs: Any) -> None:
        """Meta Lingua's, its first write, by one process, into folders that are this run's alone.

        The embedded host sees to that itself.
        """
        for field, folder in folders_of_run(self._args.dump_dir, self._args.checkpoint.path):
            note = self._folders.enter_context(held(folder, field))
            if note:
                logger.warning("%s", note)
        self._dump_config(config, path, *args, **kwargs)

    def close(self) -> None:
        """Give back what the run has taken of its process."""
        if self.stops is not None:
            self.stops.stop_listening()
            self._folders.close()

    def every_n_steps(self, train_state, freq, acc_step=None, acc_freq=_NOT_GIVEN) -> bool:
        """The host's answer, and yes for the steps of `save_at` where it asks what to save.

        It asks about the garbage, the log, saving and evaluating by frequencies that may be equal.
        With acc_freq it asks about the log, and what it asks next is whether to save.
        """
        if self.stops is not None:
            self.stops.is_step_done = train_state.acc_step == 0
        is_about_log = acc_freq is not _NOT_GIVEN
        is_about_saving = self._is_log_asked and not is_about_log
        self._is_log_asked = is_about_log
        acc_freq = acc_freq if is_about_log else None
        if self._every_n_steps(train_state, freq, acc_step=acc_step, acc_freq=acc_freq):
            return True
        is_wanted = train_state.step in self._args.save_at and train_state.acc_step == 0
        return is_about_saving and is_wanted

    def dist_mean_dict(self, x: dict) -> dict:
        """The host's mean over processes, `topk/*` and `optim/skipped` added.

        This is the last call before a log line that all processes make: the metric
        logger itself is called by one only, where a collective would wait for ever.
        """
        skipped = {} if self.guard is None else self.guard.metrics()
        means = {**self._dist_mean_dict(x), **skipped}
        if self.annealing is not None:
            means.update(self.annealing.metrics())
        return means


def _lookup(module: ModuleType, name: str) -> Any:
    if not hasattr(module, name):
        raise HostError(
            f"{module.__name__} of this host has no {name}, which apps.topk replaces: use"
            " facebookresearch/lingua at 437d680, or LINGUA_TOPK_HOST=embedded"
        )
    return getattr(module, name)


@contextlib.contextmanager
def install(
    args: TopKTrainArgs,
    started: Callable[[], None] = lambda: None,
    resumed: Callable[[int], None] = lambda step: None,
) -> Iterator[ModuleType]:
    """Within it the host's loop trains the TopK model of `args`. Yields the host's module."""
    import apps.main.eval as eval_module
    import apps.main.train as train_module

    seam = Seam(train_module, eval_module, args, started, resumed)
    originals = [(module, name, getattr(module, name)) for module, name, _ in seam.replacements]
    try:
        for module, name, replacement in seam.replacements:
            logger.debug("%s.%s replaced", module.__name__, name)
            setattr(module, name, replacement)
        yield train_module
    finally:
        for module, name, original in originals:
            setattr(module, name, original)
        seam.close()
