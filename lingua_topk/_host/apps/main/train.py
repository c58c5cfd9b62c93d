"""The training loop: config in; checkpoints, metrics.jsonl and train.log out.

    python -m apps.main.train config=FILE key=value ...

`train` looks up the model class, the optimizer builder, the collectives and the
evaluation as names of this module (and of `apps.main.eval`) at the time it runs, as
Lingua's loop does: an extension replaces those names instead of copying the loop.
"""

import gc
import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from timeit import default_timer as timer
from typing import Any, Optional

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from yaml import YAMLError

from apps.main._checks import newest_checkpoint, validate_checkpoints, validate_train_args
from apps.main._folders import raise_in_all, take_folders, write_config
from apps.main._log_lines import Speed, log_line, metrics_of
from apps.main.eval import EVAL_FOLDER_NAME
from apps.main.transformer import (
    LMTransformer,
    LMTransformerArgs,
    build_fsdp_grouping_plan,
    get_no_recompute_ops,
    get_num_flop_per_token,
    tp_parallelize,
)
from lingua._ending import run as run_program
from lingua._manifest import find_damage, from_first
from lingua._requeue import is_preempted
from lingua._reshare import reshare
from lingua.args import dataclass_from_dict
from lingua.checkpoint import (
    FOLDER_NAME,
    CheckpointArgs,
    CheckpointManager,
    data_parallel_rank,
    load_from_checkpoint,
)
from lingua.data import (
    DataArgs,
    build_dataloader_from_args,
    init_dataloader_state_from_args,
)
from lingua.distributed import (
    DistributedArgs,
    EnvironmentArgs,
    check_model_value_range,
    dist_mean_dict,
    get_device,
    get_device_mesh,
    get_is_master,
    get_world_size,
    init_signal_handler,
    parallelize_model,
    requeue_slurm_job,
    setup_env,
    setup_torch_distributed,
)
from lingua.errors import CheckpointError, ConfigError, UserError
from lingua.logger import init_logger
from lingua.metrics import (
    GPUMemoryMonitor,
    LoggingArgs,
    MetricLogger,
    get_num_params,
)
from lingua.optim import OptimArgs, build_optimizer
from lingua.profiling import ProfilerArgs, maybe_run_profiler
from lingua.tokenizer import build_tokenizer

logger = logging.getLogger(__name__)


@dataclass
class TrainArgs:
    name: str = "lingua"
    dump_dir: str = ""

    seed: int = 42
    grad_acc_steps: int = 1  # micro-batches an optimizer step
    gc_collect_freq: int = 1000
    probe_freq: Optional[int] = None  # noqa: UP045
    steps: int = 1000

    data: DataArgs = field(default_factory=DataArgs)
    optim: OptimArgs = field(default_factory=OptimArgs)
    model: LMTransformerArgs = field(default_factory=LMTransformerArgs)
    distributed: DistributedArgs = field(default_factory=DistributedArgs)
    env: EnvironmentArgs = field(default_factory=EnvironmentArgs)
    checkpoint: CheckpointArgs = field(default_factory=CheckpointArgs)
    profiling: ProfilerArgs = field(default_factory=ProfilerArgs)
    logging: LoggingArgs = field(default_factory=LoggingArgs)

    async_eval_gpus: Optional[int] = None  # noqa: UP045
    eval: Optional[Any] = None  # noqa: UP045


@dataclass
class TrainState:
    """What a resumed run needs beside weights and optimizer; stored as JSON."""

    step: int  # optimizer steps done
    acc_step: int  # micro-batches done since
    scheduler: LambdaLR
    data_loader_state: dict

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "acc_step": self.acc_step,
            "data_loader_state": self.data_loader_state,
            "scheduler": self.scheduler.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step = state_dict["step"]
        self.acc_step = state_dict["acc_step"]
        self.data_loader_state = state_dict["data_loader_state"]
        self.scheduler.load_state_dict(state_dict["scheduler"])
        # LambdaLR restores its own state only: without this the next step would run
        # with the learning rate of step 0. By the schedule as it is now: `steps` may differ.
        scheduler = self.scheduler
        factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
        for group, base, factor in zip(
            scheduler.optimizer.param_groups, scheduler.base_lrs, factors, strict=True
        ):
            group["lr"] = base * factor

    def load_state_dicts_of_others(self, states: list[dict[str, Any]], rank: int, size: int):
        """Go on as process `rank` of `size`, after as many others as there are `states`."""
        loaders = [state["data_loader_state"] for state in states]
        step, scheduler = states[0]["step"], states[0]["scheduler"]
        if hasattr(self.scheduler, "state_dict_of_others"):  # where it counts something a process
            schedulers = [state["scheduler"] for state in states]
            scheduler = self.scheduler.state_dict_of_others(schedulers, rank, size)
        self.load_state_dict(
            {
                "step": step,
                "acc_step": 0,
                "data_loader_state": reshare(loaders, self.data_loader_state, rank, size, step),
                "scheduler": scheduler,
            }
        )


preemption_flag = {"flag": False, "requeue": False}


def set_preemption_flag(signum, frame) -> None:
    """Ask the loop to save and end after the step it is in.

    SIGUSR2 is SLURM's warning before a time limit, after which the job is to go on;
    SIGTERM is meant to end it, by scancel for example, unless SLURM then says that it preempts
    the job; and so is Ctrl-C, of which a second one does not wait for the step.
    """
    if signum == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    logger.warning("signal %s: saving and ending after this step", signal.Signals(signum).name)
    preemption_flag["flag"] = True
    preemption_flag["requeue"] |= signum == signal.SIGUSR2


@contextmanager
def _preemption_by_signal() -> Iterator[None]:
    """Within it a signal ends the run after a step; then the handlers before have it back."""
    numbers = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    preemption_flag.update(flag=False, requeue=False)
    init_signal_handler(set_preemption_flag)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, set_preemption_flag)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def every_n_steps(
    train_state: TrainState, freq: int, acc_step: int | None = None, acc_freq: int | None = None
) -> bool:
    """Whether the optimizer step (or, with acc_freq, the micro-batch) is a multiple."""
    test = train_state.step % freq == 0
    if acc_step is not None:
        test = test and train_state.acc_step == acc_step
    elif acc_freq is not None:
        test = test and train_state.acc_step % acc_freq == 0
    return test


def build_model(args: TrainArgs, device: torch.device, device_mesh) -> nn.Module:
    """The model on its device, cut for FSDP2, with initial or loaded weights.

    Built on the meta device, so that no process ever holds more than its part.
    """
    wide = torch.float64 if args.distributed.model_dtype == "fp64" else torch.float32
    before = torch.get_default_dtype()
    torch.set_default_dtype(wide)
    try:
        with torch.device("meta"):
            model = LMTransformer(args.model)
    finally:
        torch.set_default_dtype(before)
    logger.info("%s parameters", f"{get_num_params(model):,}")
    model = parallelize_model(
        model,
        device_mesh,
        args.model,
        args.distributed,
        fsdp_grouping_plan=build_fsdp_grouping_plan(args.model),
        tp_parallelize=tp_parallelize,
        no_recompute_ops=get_no_recompute_ops(),
    )
    try:
        model = model.to_empty(device=device)
    except RuntimeError as error:
        raise ConfigError(
            f"model.dim={args.model.dim}, model.n_layers={args.model.n_layers} and"
            f" data.seq_len={args.data.seq_len} need more memory than there is"
            f" ({str(error).splitlines()[0]}): give smaller numbers, or more processes"
        ) from None
    if args.checkpoint.init_ckpt_path:
        logger.info("initial weights from %s", args.checkpoint.init_ckpt_path)
        load_from_checkpoint(args.checkpoint.init_ckpt_path, model, model_key="model")
        model.rope_embeddings.reset_parameters()
        _check_finite(model, args.checkpoint.init_ckpt_path)
    else:
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(args.model.seed)
            model.init_weights()
    check_model_value_range(model, range=10.0, std=1.0)
    return model


def _check_finite(model: nn.Module, folder: str) -> None:
    from torch.distributed.tensor import DTensor

    for name, parameter in model.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if not torch.isfinite(local).all():
            raise CheckpointError(
                f"checkpoint.init_ckpt_path={folder}: {name} holds NaN or infinite values: use an"
                " earlier checkpoint"
            )


@dataclass
class Run:
    """The parts of a run that its steps share."""

    args: TrainArgs
    device: torch.device
    dp_degree: int
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    state: TrainState
    checkpoint: CheckpointManager
    memory: GPUMemoryMonitor
    flop_per_token: float

    @property
    def tokens_per_micro_batch(self) -> int:
        return self.args.data.batch_size * self.args.data.seq_len


def start_run(args: TrainArgs) -> Run:
    """Everything before the first step, once the processes know each other."""
    device = get_device()
    device_mesh = get_device_mesh(args.distributed)
    dp_rank, dp_degree = data_parallel_rank(device_mesh)
    torch.manual_seed(args.seed)

    model = build_model(args, device, device_mesh)
    optimizer, scheduler = build_optimizer(model, args.optim, args.steps)
    state = TrainState(
        step=0,
        acc_step=0,
        data_loader_state=init_dataloader_state_from_args(args.data, dp_rank, dp_degree),
        scheduler=scheduler,
    )
    checkpoint = CheckpointManager.instantiate_and_make_dir(args.checkpoint)
    checkpoint.load(model, optimizer, state, device_mesh)
    non_embedding = get_num_params(model) - args.model.vocab_size * args.model.dim
    return Run(
        args=args,
        device=device,
        dp_degree=dp_degree,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        state=state,
        checkpoint=checkpoint,
        memory=GPUMemoryMonitor(device),
        flop_per_token=get_num_flop_per_token(
            non_embedding, args.model.n_layers, args.model.dim, args.data.seq_len
        ),
    )


def train(args: TrainArgs) -> None:
    """Train, or go on training, the run that `args` describes, to its last step."""
    tokenizer = build_tokenizer(args.data.tokenizer.name, args.data.tokenizer.path)
    # Whatever can be refused is refused here: nothing has been written yet.
    validate_train_args(args, tokenizer.n_words)
    try:
        with torch.device("meta"):
            model = LMTransformer(args.model)
    except RuntimeError as error:  # sizes that overflow
        raise ConfigError(
            f"model.dim={args.model.dim} with model.n_layers={args.model.n_layers} makes no model"
            f" ({str(error).splitlines()[0]}): give smaller numbers"
        ) from None
    validate_checkpoints(args, model)
    dump_dir = Path(args.dump_dir)
    newest = newest_checkpoint(args.checkpoint)
    is_done = newest is not None and int(newest.name) >= args.steps
    with ExitStack() as stack:
        refused, notes = None, []
        if get_is_master():
            try:
                notes = take_folders(args, stack)
                if not is_done:
                    write_config(args, dump_dir)
            except UserError as error:
                refused = error
        init_logger(dump_dir / "train.log" if refused is None else None)
        for note in notes:
            logger.warning("%s", note)
        setup_env(args.env)
        setup_torch_distributed(args.distributed)
        raise_in_all(refused)
        # Another node's listing of the folder may be a little older, and all must go one way.
        newest, is_done = from_first((newest, is_done))
        if is_done and _is_all_done(args, newest):
            return
        stack.enter_context(_preemption_by_signal())
        run = start_run(args)
        metric_logger = stack.enter_context(MetricLogger(dump_dir / "metrics.jsonl", args))
        batches = stack.enter_context(
            build_dataloader_from_args(args.data, state=run.state.data_loader_state)
        )
        profiler = stack.enter_context(maybe_run_profiler(dump_dir, run.model, args.profiling))
        # A collection at a moment of its own choice, on one rank, would hold up all.
        gc.disable()
        stack.callback(gc.enable)
        gc.collect()
        progress = stack.enter_context(_progress_bar(args, run.state.step))
        _loop(run, batches, metric_logger, profiler, progress)


def _is_all_done(args: TrainArgs, newest: Path) -> bool:
    """Whether the run has done all steps and its newest checkpoint is whole; then it is finished.

    All ranks call it.
    """
    if find_damage(newest) is None:
        logger.info("this run has done its %d steps already; nothing to do", int(newest.name))
        _finish(args, newest)
        return True
    problem = None
    if get_is_master():
        try:
            write_config(args, Path(args.dump_dir))
        except UserError as error:
            problem = error
    raise_in_all(problem)
    return False


def _progress_bar(args: TrainArgs, done: int) -> tqdm:
    """A bar on rank 0's terminal; nothing where there is none."""
    return tqdm(
        total=args.steps,
        initial=done,
        desc=args.name,
        unit="step",
        disable=None if get_is_master() else True,
    )


def _loop(run: Run, batches, metric_logger: MetricLogger, profiler, progress: tqdm) -> None:
    args, state = run.args, run.state
    if state.step > 0 and _is_eval_step(args, state):
        _evaluate_if_missing(args, run.checkpoint.path / FOLDER_NAME.format(state.step))
    run.model.train()
    speed = Speed()
    losses: list[Tensor] = []
    saved = False
    while state.step < args.steps:
        state.acc_step = (state.acc_step + 1) % args.grad_acc_steps
        started = timer()
        batch, state.data_loader_state = next(batches)
        if state.acc_step == 0 and state.step % args.gc_collect_freq == 0:
            gc.collect()
        data_load_time = timer() - started

        lr = run.optimizer.param_groups[0]["lr"]
        losses.append(_forward_backward(run, batch))
        grad_norm = None
        if state.acc_step == 0:
            grad_norm = _optimizer_step(run)
            progress.update()
        speed.micro_batches += 1
        if profiler is not None and state.acc_step == 0:
            profiler.step()

        if _is_log_step(args, state):
            # Here, and nowhere else in a step, the device is waited for.
            loss = torch.stack(losses).mean().item()
            norm = -1.0 if grad_norm is None else grad_norm.item()
            metrics = metrics_of(run, speed, norm, lr, data_load_time)
            metrics.update(dist_mean_dict({"loss/out": loss}))
            if get_is_master():
                metric_logger.log(metrics)
            logger.info(log_line(metrics, loss))
            progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
            speed.reset()
            run.memory.reset_peak_stats()
        if state.acc_step != 0:
            continue
        losses.clear()

        saved = _is_save_step(args, state) and _save(run)
        if args.eval is not None and _is_eval_step(args, state):
            saved = saved or _save(run)
            evaluate(args, run.checkpoint.path / FOLDER_NAME.format(state.step))
            run.model.train()
        if _any_rank(preemption_flag["flag"]):
            saved or _save(run)
            logger.info("ending after step %d of %d, as asked", state.step, args.steps)
            if _any_rank(preemption_flag["requeue"] or (get_is_master() and is_preempted())):
                requeue_slurm_job()
            sys.exit(0)
    if not saved:
        _save(run)
    gc.collect()
    logger.info("done: %d steps", state.step)


def _forward_backward(run: Run, batch) -> Tensor:
    """Loss of one micro-batch, 0-d and detached; its gradients are added up."""
    from torch.distributed.fsdp import FSDPModule

    tensor = torch.as_tensor(batch, dtype=torch.long)  # [B, S, views]
    if run.device.type == "cuda":
        # From other memory it would be copied once the device has nothing else to do.
        tensor = tensor.pin_memory().to(run.device, non_blocking=True)
    loss = run.model(tensor[:, :, 0].contiguous(), tensor[:, :, 1].contiguous())
    # Gradients are exchanged once an optimizer step, with the last micro-batch.
    if run.args.grad_acc_steps > 1 and isinstance(run.model, FSDPModule):
        run.model.set_requires_gradient_sync(run.state.acc_step == 0)
    (loss / run.args.grad_acc_steps).backward()
    return loss.detach()


def _optimizer_step(run: Run) -> Tensor:
    """Clip, step, count. Returns the norm of the gradient before clipping, 0-d, on the device."""
    from torch.distributed.tensor import DTensor

    norm = nn.utils.clip_grad_norm_(run.model.parameters(), max_norm=run.args.optim.clip)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    run.optimizer.step()
    run.scheduler.step()
    run.optimizer.zero_grad()
    run.state.step += 1
    return norm


def _is_log_step(args: TrainArgs, state: TrainState) -> bool:
    # Always with acc_freq, as Lingua asks: an extension tells the question by it.
    acc_freq = args.logging.acc_freq
    acc_step = None if acc_freq else 0
    return every_n_steps(state, args.logging.freq, acc_step=acc_step, acc_freq=acc_freq)


def _is_save_step(args: TrainArgs, state: TrainState) -> bool:
    return every_n_steps(state, args.checkpoint.dump.every, acc_step=0) or every_n_steps(
        state, args.checkpoint.eval.every, acc_step=0
    )


def _is_eval_step(args: TrainArgs, state: TrainState) -> bool:
    return state.step == args.steps or every_n_steps(state, args.checkpoint.eval.every, acc_step=0)


def _save(run: Run) -> bool:
    return run.checkpoint.save(run.model, run.optimizer, run.state, run.args)


def _any_rank(flag: bool) -> bool:
    """Whether it is set on any rank: all must leave the loop after the same step.

    Asked by way of the CPUs: the device would be waited for, after every step.
    """
    if get_world_size() == 1:
        return flag
    number = torch.tensor(int(flag))
    dist.all_reduce(number, op=dist.ReduceOp.MAX)
    return bool(number)


def evaluate(args: TrainArgs, checkpoint: Path) -> None:
    """Evaluate a checkpoint of the run as the `eval` section says, on all ranks."""
    from apps.main.eval import EvalArgs, launch_eval

    eval_args = dataclass_from_dict(EvalArgs, deepcopy(args.eval))
    eval_args.global_step = int(checkpoint.name)
    eval_args.ckpt_dir = str(checkpoint)
    eval_args.dump_dir = str(_eval_folder(args, checkpoint))
    eval_args.metric_log_dir = args.dump_dir
    launch_eval(eval_args)


def _eval_folder(args: TrainArgs, checkpoint: Path) -> Path:
    return Path(args.dump_dir) / "evals" / EVAL_FOLDER_NAME.format(int(checkpoint.name))


def _evaluate_if_missing(args: TrainArgs, checkpoint: Path) -> None:
    """The evaluation of a checkpoint, where something ended the run before it or within it."""
    if args.eval is None:
        return
    # An evaluation writes this file last; one process looks for all.
    if from_first((_eval_folder(args, checkpoint) / "provenance.json").is_file()):
        return
    logger.info("the evaluation of %s is missing: doing it now", checkpoint)
    evaluate(args, checkpoint)


def _finish(args: TrainArgs, newest: Path) -> None:
    """What a run that has done its steps still lacks, where it was killed after the last."""
    CheckpointManager.instantiate_and_make_dir(args.checkpoint).clean_up()
    _evaluate_if_missing(args, newest)


def _read_args() -> TrainArgs:
    """Defaults < config=FILE < the command line. ConfigError for what these cannot be."""
    path = "the command line"
    try:
        words = OmegaConf.from_cli()
        path = words.pop("config", None)
        if path is None:
            raise ConfigError(
                "config=FILE is missing: python -m apps.main.train config=FILE key=value"
            )
        if not Path(str(path)).is_file():
            raise ConfigError(f"config={path} is not a file: give the path of a YAML file")
        config = OmegaConf.merge(OmegaConf.structured(TrainArgs()), OmegaConf.load(path), words)
        return OmegaConf.to_object(config)
    except (OmegaConfBaseException, YAMLError, UnicodeError, TypeError) as error:
        where = getattr(error, "full_key", None) or path
        raise ConfigError(
            f"{where}: {str(error).splitlines()[0]}: correct it (config={path}); the keys are those"
            " of TrainArgs in apps/main/train.py"
        ) from None


def main() -> None:
    """The command line; what is wrong there, or on a disk, is one line and status 2."""
    run_program(_main)


def _main() -> None:
    args = _read_args()
    if args.eval is not None:
        raise ConfigError(
            "eval is set, but apps.main.train of the embedded host does not evaluate: start"
            " the run with apps.topk.train (without model.topk it trains a plain model), or"
            " set eval=null"
        )
    train(args)


if __name__ == "__main__":
    main()
