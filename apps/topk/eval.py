"""Evaluate a checkpoint: perplexity on held-out documents, measured L0, and lm-eval's tasks."""

import functools
import logging
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from apps.topk import cli, lingua_host
from apps.topk.checkpoint import DTYPES, Checkpoint, open_checkpoint
from apps.topk.evaluation import results as files
from apps.topk.evaluation.processes import in_the_first, rank_and_size
from apps.topk.evaluation.sources import ValidationArgs, ValidationPlan, plan_validation
from apps.topk.evaluation.steered import Steering, read_steering
from apps.topk.evaluation.tasks import HarnessArgs, check_harness, forget_work, run_tasks
from apps.topk.evaluation.validation import measures, negative_log_likelihoods, tokenised
from apps.topk.provenance import provenance, write_text
from lingua.distributed import (
    DistributedArgs,
    get_local_rank,
    get_world_size,
    setup_torch_distributed,
)
from lingua.logger import init_logger
from lingua_topk._host.lingua._ending import group_left_together
from lingua_topk.errors import ConfigError

logger = logging.getLogger(__name__)

PROGRAM = "apps.topk.eval"
DESCRIPTION = """\
Evaluate one checkpoint. Several processes share the work:
  torchrun --nproc-per-node 8 -m apps.topk.eval config=FILE ckpt_dir=DIR dump_dir=DIR
Writes to DUMP_DIR
  validation.json  for every source the negative log-likelihood a token (nats), perplexity with its
                   95% confidence interval, bits a byte, and the mean number of survivors a token
                   of every TopK layer; validation_documents.jsonl has a line a document
  results.json     what lm-eval says of the tasks in harness.tasks
Stopped and started again it repeats one task at most."""
_NOTES = """\
ckpt_dir is the folder of one checkpoint, such as DUMP_DIR/checkpoints/0000001000.
validation.sources are files of text, folders with *.val.jsonl files, or data sets of the Hugging
Face hub (hf:OWNER/NAME[@REVISION][:CONFIG[:SPLIT]]); those of the sources that the model was
trained on are added unless validation.use_val_from_train_src=false.
harness.tasks are tasks of lm-eval by name, harness.include_path a folder of your own ones. Of
generator, which Meta Lingua's configs have, dtype is used where dtype is not set; its other keys
are without effect, since tasks say themselves how to generate. So is wandb.

steer evaluates the model with neurons turned (what does this intervention cost elsewhere?):
  steer='[{neuron: "3:417", delta: 8}, {neuron: "2:5", mode: ablate}]'
in a config the same, an entry a line. Of each entry:
  neuron            LAYER:NEURON, in quotes
  mode              add (by default) with delta, set with value, clamp with minimum or maximum or
                    both, scale with factor, or ablate
  unit              absolute (by default), mean or maximum: multiples of the neuron's own |value|
                    where it fires, from analysis, by default the folder neurons of the run
  where             all (by default), prompt or generated: a text whose likelihood is asked for is a
                    prompt from its beginning to its end
  before_selection  true: before TopK selects, where the neuron has to be among the k largest
Entries act in their order; l0 counts what fires behind them. Steered results say so, in
provenance.steer, and belong into a folder of their own, compared with the model as it is by
  python -m apps.topk.eval config=FILE ckpt_dir=DIR dump_dir=OUT
  python -m apps.topk.eval config=FILE ckpt_dir=DIR dump_dir=OUT-steered steer=...
  python -m apps.topk.compare OUT OUT-steered"""

# Meta Lingua's keys of `generator`.
GENERATOR_KEYS = (
    "temperature", "top_p", "top_k", "max_gen_len", "max_tokens", "max_prompt_len", "until",
    "compile_prefilling", "reduce_generation_overhead", "show_progress", "dtype", "device",
)  # fmt: skip


@dataclass
class EvalArgs:
    """What is evaluated, and where the results go."""

    name: str = "evals"
    dump_dir: Optional[str] = None  # noqa: UP045 (OmegaConf reads this spelling only)
    # Where metrics.validation.jsonl and metrics.eval.jsonl are appended to; training sets its
    # own dump_dir.
    metric_log_dir: Optional[str] = None  # noqa: UP045
    ckpt_dir: str = ""
    generator: Optional[Any] = None  # noqa: UP045
    # null: no tasks.
    harness: Optional[HarnessArgs] = None  # noqa: UP045
    # null: no held-out documents.
    validation: Optional[ValidationArgs] = field(default_factory=ValidationArgs)  # noqa: UP045
    wandb: Optional[Any] = None  # noqa: UP045
    # fp64, fp32, bf16 or fp16; null: as in training.
    dtype: Optional[str] = None  # noqa: UP045
    # Evaluate a checkpoint from inside the annealing phase with the alpha it had reached.
    as_trained: bool = False
    # Interventions on neurons that the model is evaluated under; null: as it is.
    steer: Optional[Any] = None  # noqa: UP045
    # Folder of apps.topk.analyze that steer's units are from; null: that of the run.
    analysis: Optional[str] = None  # noqa: UP045
    global_step: Optional[int] = None  # noqa: UP045


def main() -> None:
    """The command line; a user's mistake ends the process with status 2."""
    cli.run(_main)


def _main() -> None:
    args = cli.read_config(EvalArgs, PROGRAM, DESCRIPTION, f"{_NOTES}\n\n{harness_help()}")
    init_logger()
    # Meta Lingua's needs NCCL, which one process on a CPU does not.
    if get_world_size() > 1 or not lingua_host.is_lingua():
        setup_torch_distributed(DistributedArgs())
    with group_left_together():
        launch_eval(args)


def harness_help(prefix: str = "") -> str:
    """The keys of the section harness, which is null where nobody gives it, for --help."""
    section = OmegaConf.to_yaml(OmegaConf.create({"harness": asdict(HarnessArgs())}))
    return (
        f"The section {prefix}harness, where given, and its defaults (what lm-eval's"
        f" simple_evaluate takes,\nand include_path, batch_tokens, add_bos):\n\n{section}"
    ).rstrip()


def launch_eval(args: EvalArgs) -> dict[str, dict[str, Any]]:
    """Evaluate `args.ckpt_dir`; every process calls it. The measures of validation by source.

    Process 0 writes the files, and with metric_log_dir a line of each of the run's records.
    """
    if not args.dump_dir:
        raise ConfigError("dump_dir is not set: give a folder for what the evaluation writes")
    if not args.ckpt_dir:
        raise ConfigError(
            "ckpt_dir is not set: give the folder of a checkpoint, such as"
            " DUMP_DIR/checkpoints/0000001000"
        )
    checkpoint = open_checkpoint(args.ckpt_dir)
    params = checkpoint.params
    dtype, plan = check_eval(
        args, params["data"], checkpoint.model_args.max_seqlen, params["distributed"]["model_dtype"]
    )
    evaluation = _Evaluation(args, checkpoint, dtype, _steering(args, checkpoint))
    evaluation.load()  # what is wrong with the weights is known before anything is written
    with ExitStack() as stack:
        in_the_first(lambda: evaluation.begin(stack))
        with evaluation.steered():
            evaluation.run_tasks()
            results = {} if plan is None else evaluation.validate(plan)
        evaluation.finish()
    return results


def _steering(args: EvalArgs, checkpoint: Checkpoint) -> Steering | None:
    """What the model is steered by. ConfigError where its results would pass for the run's."""
    if args.steer is None:
        return None
    if args.metric_log_dir:
        raise ConfigError(
            f"metric_log_dir={args.metric_log_dir}: the records of a run are of its model as it is,"
            " and steer is set: leave one of them out"
        )
    if files.is_its_place(Path(args.dump_dir), checkpoint.folder):
        raise ConfigError(
            f"dump_dir={args.dump_dir} is the place of the run's own evaluation: give another"
            f" folder for that of the steered model, such as {Path(args.dump_dir)}-steered"
        )
    steering = read_steering(args.steer, checkpoint, args.analysis)
    if args.harness is None and all(one.where == "generated" for one in steering.interventions):
        raise ConfigError(
            "steer: where=generated changes nothing where nothing is generated: add to"
            " harness.tasks one that generates, or give where: all"
        )
    return steering


def check_eval(
    args: EvalArgs, data: dict[str, Any], longest: int, model_dtype: str
) -> tuple[str, ValidationPlan | None]:
    """The dtype and what is read of held-out documents; ConfigError, DataError.

    data, model_dtype: of the training config; longest: the model's max_seqlen.
    """
    if args.harness is None and args.validation is None:
        raise ConfigError("harness and validation are both null: nothing is left to evaluate")
    generator = args.generator or {}
    if not isinstance(generator, dict):
        raise ConfigError(f"generator={generator} is no section: write for example generator.dtype")
    unknown = [name for name in generator if name not in GENERATOR_KEYS]
    if unknown:
        raise ConfigError(
            f"generator.{unknown[0]} is no known key: {cli.nearest(unknown[0], GENERATOR_KEYS)}"
        )
    dtype = args.dtype or generator.get("dtype") or model_dtype
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not known: choose one of {', '.join(DTYPES)}")
    if args.harness is not None:
        check_harness(args.harness)
    if args.validation is None:
        return dtype, None
    return dtype, plan_validation(args.validation, data, longest, files.PROVENANCE)


class _Evaluation:
    """One checkpoint's."""

    def __init__(
        self, args: EvalArgs, checkpoint: Checkpoint, dtype: str, steering: Steering | None
    ):
        self.args = args
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.steering = steering
        self.steer = None if steering is None else steering.describe()  # as results tell it
        self.folder = Path(args.dump_dir)
        self.tokenizer = checkpoint.tokenizer()
        has_bos = getattr(self.tokenizer, "bos_id", None) is not None
        self.add_bos = has_bos and bool(checkpoint.params["data"].get("add_bos", True))

    def begin(self, stack: ExitStack) -> None:
        """What is written in the end can be written: better known before the work than after.

        The folder is this evaluation's alone until `stack` ends.
        """
        for name in ("metric_log_dir", "dump_dir"):
            folder = getattr(self.args, name)
            try:
                if folder:
                    Path(folder).mkdir(parents=True, exist_ok=True)
                    tempfile.TemporaryFile(dir=folder).close()
            except OSError as error:
                raise ConfigError(
                    f"{name}={folder} cannot be written ({error.strerror}): give another folder"
                ) from None
        stack.enter_context(cli.alone(self.folder, "dump_dir"))
        files.begin(self.folder, self.checkpoint.folder, self.steer)

    def load(self) -> None:
        """The model, on this process's device. CheckpointError."""
        self.model = self.checkpoint.model(_device(), DTYPES[self.dtype], self.args.as_trained)

    def steered(self) -> AbstractContextManager[None]:
        """Within it the model is as it is evaluated; every process enters it."""
        return nullcontext() if self.steering is None else self.steering.applied(self.model)

    @functools.cached_property
    def origin(self) -> dict[str, Any]:
        """What the results come from, the same in all files."""
        return provenance(
            checkpoint=str(self.checkpoint.folder.resolve()), step=self.checkpoint.step,
            dtype=self.dtype, processes=get_world_size(), args=asdict(self.args),
            model=self.checkpoint.describe(), steer=self.steer,
        )  # fmt: skip

    def run_tasks(self) -> None:
        """lm-eval's tasks, where there are any."""
        harness = self.args.harness
        if harness is None:
            return
        settings = {
            "checkpoint": self.checkpoint.state(), "dtype": self.dtype,
            "as_trained": self.args.as_trained, "steer": self.steer,
        }  # fmt: skip
        results = run_tasks(self._harness_model(), harness, self.folder, settings)
        if results is None:  # process 0 has them
            return
        files.write_tasks(self.folder, results, {**self.origin, "bos": self._tasks_add_bos})
        self._record(files.TASK_RECORDS, results["results"])
        self._say(tasks_summary(results))

    def _harness_model(self):
        from apps.topk.evaluation.adapter import HarnessModel

        harness = self.args.harness
        return HarnessModel(
            self.model, self.tokenizer, self.checkpoint.model_args.max_seqlen,
            harness.batch_tokens, self._tasks_add_bos, name=f"{self.checkpoint.folder}{self._mark}",
            seed=harness.torch_random_seed,
        )  # fmt: skip

    @property
    def _tasks_add_bos(self) -> bool:
        asked = self.args.harness.add_bos
        return self.add_bos if asked is None else asked

    def validate(self, plan: ValidationPlan) -> dict[str, dict[str, Any]]:
        """The measures of every source; every process has them."""
        results, lines = {}, []
        for name in plan.sources:
            documents = tokenised(plan.texts(name), self.tokenizer, self.add_bos)
            nll, l0 = negative_log_likelihoods(
                self.model, documents, plan.window, plan.context, plan.batch_tokens,
                f"evaluating {name}",
            )  # fmt: skip
            result = {
                **measures(documents, nll), "window": plan.window, "context": plan.context,
                "bos": self.add_bos,
            }  # fmt: skip
            results[name] = {**result, "l0": {str(layer): mean for layer, mean in l0.items()}}
            lines += files.document_lines(name, documents, nll)
        if rank_and_size()[0] == 0:
            files.write_validation(self.folder, results, lines, self.origin)
            self._record(files.VALIDATION_RECORDS, results)
            self._say(summary(results))
        return results

    @property
    def _mark(self) -> str:
        """What tells results of a steered model from its own."""
        return "" if self.steering is None else f" [steered: {self.steering.told}]"

    def _say(self, lines: str) -> None:
        """Numbers, a line each, for the terminal and the log."""
        marked = (f"{line}{self._mark}" for line in lines.splitlines())
        logger.info("%s (in %s)", "\n".join(marked), self.folder)

    def _record(self, name: str, content: dict[str, Any]) -> None:
        if self.args.metric_log_dir:
            path = Path(self.args.metric_log_dir, name)
            files.append_record(path, content, self.args.global_step)

    def finish(self) -> None:
        """Say that all is there."""
        if rank_and_size()[0] == 0:
            config = OmegaConf.to_yaml(OmegaConf.structured(self.args))
            write_text(self.folder / "config.yaml", config)
            files.write_done(self.folder, self.origin)
            forget_work(self.folder)
        if dist.is_initialized():
            dist.barrier()


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", get_local_rank() % torch.cuda.device_count())
    return torch.device("cpu")


def tasks_summary(results: dict[str, Any]) -> str:
    """A line a task with its numbers, for the terminal and the log."""
    return "\n".join(
        f"{task}: {', '.join(_numbers(measured))}" for task, measured in results["results"].items()
    )


def _numbers(measured: dict[str, Any]) -> Iterator[str]:
    """lm-eval's names are METRIC,FILTER and METRIC_stderr,FILTER."""
    for key, value in measured.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = measured.get(f"{metric}_stderr,{kind}")
        name = metric if kind == "none" else f"{metric} ({kind})"
        shown = f" ± {error:.4g}" if isinstance(error, int | float) else ""
        yield f"{name} {value:.4g}{shown}"


def summary(results: dict[str, dict[str, Any]]) -> str:
    """A line a source, for the terminal and the log."""
    return "\n".join(
        f"{name}: perplexity {result['perplexity']:.3f}{_interval(result['perplexity_ci95'])},"
        f" {result['bits_per_byte']:.4f} bits a byte,"
        f" {result['nll_per_token']:.4f} nats a token"
        f" (standard error {_shown(result['nll_per_token_stderr'])}),"
        f" {result['tokens']:,} tokens in {result['documents']:,} documents"
        for name, result in results.items()
    )


def _interval(interval: list[float] | None) -> str:
    return "" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]"


def _shown(error: float | None) -> str:
    return "unknown" if error is None else f"{error:.4f}"


if __name__ == "__main__":
    main()
