"""Evaluate a checkpoint: token-weighted perplexity on held-out documents, and measured L0."""

import json
import logging
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed as dist

from apps.topk import cli, lingua_host
from apps.topk.checkpoint import DTYPES, Checkpoint, open_checkpoint
from apps.topk.corpus.local_files import LocalFiles
from apps.topk.corpus.tally import Tally
from apps.topk.provenance import provenance, write_json
from apps.topk.records import drop_step
from apps.topk.validation import measures, negative_log_likelihoods, tokenised
from lingua.distributed import (
    DistributedArgs,
    get_global_rank,
    get_local_rank,
    get_world_size,
    setup_torch_distributed,
)
from lingua.logger import init_logger
from lingua_topk.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

PROGRAM = "apps.topk.eval"
DESCRIPTION = """\
Evaluate one checkpoint. Several processes share the work:
  torchrun --nproc-per-node 8 -m apps.topk.eval config=FILE ckpt_dir=DIR dump_dir=DIR
Writes DUMP_DIR/validation.json: for every source the negative log-likelihood a token (nats),
perplexity, bits a byte, and the mean number of survivors a token of every TopK layer."""
NOTES = """\
ckpt_dir is the folder of one checkpoint, such as DUMP_DIR/checkpoints/0000001000.
validation.sources are .jsonl files or folders with *.val.jsonl files; those of the sources that
the model was trained on are added unless validation.use_val_from_train_src=false."""

# The key of validation.json that is no source.
PROVENANCE = "provenance"
VALIDATION_PATTERN = "*.val.jsonl"
TEXT_KEYS = ["text", "content"]


@dataclass
class ValidationArgs:
    """Which documents, and how they are read; see `apps.topk.validation`."""

    # Documents a source; null: all of them.
    max_documents: Optional[int] = None  # noqa: UP045 (OmegaConf reads this spelling only)
    # Also the *.val.jsonl files of the sources that the model was trained on.
    use_val_from_train_src: bool = True
    root_dir: str = ""
    sources: list[str] = field(default_factory=list)
    # Tokens that the model sees at once; null: as in training.
    window: Optional[int] = None  # noqa: UP045
    # Least tokens before a scored one, where the document has them; null: half the window.
    context: Optional[int] = None  # noqa: UP045
    # Tokens a batch, padding included.
    batch_tokens: int = 4096


@dataclass
class EvalArgs:
    """What is evaluated, and where the results go."""

    name: str = "evals"
    dump_dir: Optional[str] = None  # noqa: UP045
    # Where metrics.validation.jsonl is appended to; training sets its own dump_dir.
    metric_log_dir: Optional[str] = None  # noqa: UP045
    ckpt_dir: str = ""
    validation: ValidationArgs = field(default_factory=ValidationArgs)
    # fp64, fp32, bf16 or fp16; null: as in training.
    dtype: Optional[str] = None  # noqa: UP045
    # Evaluate a checkpoint from inside the annealing phase with the alpha it had reached.
    as_trained: bool = False
    global_step: Optional[int] = None  # noqa: UP045


def main() -> None:
    """The command line; a user's mistake ends the process with status 2."""
    cli.run(_main)


def _main() -> None:
    args = cli.read_config(EvalArgs, PROGRAM, DESCRIPTION, NOTES)
    init_logger()
    # Meta Lingua's needs NCCL, which one process on a CPU does not.
    if get_world_size() > 1 or not lingua_host.is_lingua():
        setup_torch_distributed(DistributedArgs())
    try:
        launch_eval(args)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def launch_eval(args: EvalArgs) -> dict[str, dict[str, Any]]:
    """Evaluate `args.ckpt_dir`; every process calls it. The measures by source.

    Process 0 writes validation.json and, with metric_log_dir, a line of
    metrics.validation.jsonl.
    """
    if not args.dump_dir:
        raise ConfigError("dump_dir is not set: give a folder for what the evaluation writes")
    if not args.ckpt_dir:
        raise ConfigError(
            "ckpt_dir is not set: give the folder of a checkpoint, such as"
            " DUMP_DIR/checkpoints/0000001000"
        )
    checkpoint = open_checkpoint(args.ckpt_dir)
    longest, data = checkpoint.model_args.max_seqlen, checkpoint.params["data"]
    sources, window, context = check_validation(args.validation, data, longest)
    dtype = check_dtype(args.dtype or checkpoint.params["distributed"]["model_dtype"])
    tokenizer = checkpoint.tokenizer()
    model = checkpoint.model(_device(), DTYPES[dtype], args.as_trained)
    _make_folders(args)
    results = {}
    for name, files in sources.items():
        documents = tokenised(_texts(files, name, args.validation.max_documents), tokenizer)
        nll, l0 = negative_log_likelihoods(
            model, documents, window, context, args.validation.batch_tokens, f"evaluating {name}"
        )
        result = {**measures(documents, nll), "window": window, "context": context}
        results[name] = {**result, "l0": {str(layer): mean for layer, mean in l0.items()}}
    if get_global_rank() == 0:
        _write(args, checkpoint, dtype, results)
        logger.info("%s (in %s)", summary(results), args.dump_dir)
    _barrier()
    return results


def _make_folders(args: EvalArgs) -> None:
    """What is written in the end can be written: better known before the work than after."""
    for field_name in ("metric_log_dir", "dump_dir"):
        folder = getattr(args, field_name)
        try:
            if folder and get_global_rank() == 0:
                Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"{field_name}={folder} cannot be written ({error.strerror}): give another folder"
            ) from None


def check_validation(
    args: ValidationArgs, data: dict[str, Any], longest: int
) -> tuple[dict[str, list[Path]], int, int]:
    """The files of every source, the window and the context that `args` ask for.

    data: the data section of the training config; longest: the model's max_seqlen.
    ConfigError for what is not allowed, DataError for text that is not there.
    """
    window = longest if args.window is None else args.window
    if not 2 <= window <= longest:
        raise ConfigError(
            f"validation.window={window} is not allowed: give 2 to {longest}, the length that the"
            " model is trained with"
        )
    context = window // 2 if args.context is None else args.context
    if not 1 <= context < window:
        raise ConfigError(
            f"validation.context={context} is not allowed: give 1 to {window - 1}, less than"
            f" validation.window={window}"
        )
    for name in ("batch_tokens", "max_documents"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"validation.{name}={value} is too small: give at least 1")
    return find_sources(args, data), window, context


def check_dtype(dtype: str) -> str:
    """`dtype` as it is when it is known, else ConfigError."""
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not known: choose one of {', '.join(DTYPES)}")
    return dtype


def find_sources(args: ValidationArgs, data: dict[str, Any]) -> dict[str, list[Path]]:
    """The files of every source, by the name it has in the results.

    data: the data section of the training config. ConfigError, DataError.
    """
    paths = [Path(args.root_dir, source) for source in args.sources]
    if args.use_val_from_train_src:
        paths += [Path(data["root_dir"] or "", source) for source in data["sources"]]
    if not paths:
        raise ConfigError(
            "validation.sources is empty and validation.use_val_from_train_src=false: name at"
            " least one source"
        )
    names = [path.name for path in paths] + [PROVENANCE]
    return {path.name if names.count(path.name) == 1 else str(path): _files(path) for path in paths}


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    files = sorted(path.glob(VALIDATION_PATTERN))
    if not files:
        raise DataError(
            f"validation: {path} is neither a file nor a folder with {VALIDATION_PATTERN} files:"
            " prepare it with python -m apps.topk.prepare, or name another in validation.sources"
        )
    return files


def _texts(files: list[Path], name: str, max_documents: int | None) -> list[str]:
    tally = Tally()
    texts = [
        text for file in files for text in LocalFiles(file, str(file), TEXT_KEYS).documents(tally)
    ]
    for line in tally.lines():
        logger.warning("%s: %s", name, cli.one_line(line))
    return texts[:max_documents]


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", get_local_rank() % torch.cuda.device_count())
    return torch.device("cpu")


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _write(
    args: EvalArgs, checkpoint: Checkpoint, dtype: str, results: dict[str, dict[str, Any]]
) -> None:
    origin = provenance(
        checkpoint=str(checkpoint.folder), step=checkpoint.step, dtype=dtype,
        processes=get_world_size(), args=args.__dict__ | {"validation": args.validation.__dict__},
    )  # fmt: skip
    if args.metric_log_dir:
        _append(Path(args.metric_log_dir, "metrics.validation.jsonl"), results, args.global_step)
    # Last, since whether it is there tells whether all is done.
    write_json(Path(args.dump_dir, "validation.json"), {**results, PROVENANCE: origin})


def _append(path: Path, results: dict[str, dict[str, Any]], step: int | None) -> None:
    """A line of metrics.validation.jsonl; an evaluation that is done again replaces its own."""
    line = {"created_at": datetime.now(timezone.utc).isoformat(), **results}
    if step is not None:
        line["global_step"] = step
    if path.is_file() and step is not None:
        drop_step(path, step)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def summary(results: dict[str, dict[str, Any]]) -> str:
    """A line a source, for the terminal and the log."""
    return "\n".join(
        f"{name}: perplexity {result['perplexity']:.3f},"
        f" {result['bits_per_byte']:.4f} bits a byte,"
        f" {result['nll_per_token']:.4f} nats a token"
        f" (standard error {_shown(result['nll_per_token_stderr'])}),"
        f" {result['tokens']:,} tokens in {result['documents']:,} documents"
        for name, result in results.items()
    )


def _shown(error: float | None) -> str:
    return "unknown" if error is None else f"{error:.4f}"


if __name__ == "__main__":
    main()
