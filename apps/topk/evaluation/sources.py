"""Which held-out documents a model is evaluated on, and how they are read."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, Optional

from apps.topk import cli
from apps.topk.corpus import hub
from apps.topk.corpus.local_files import TEXT_KEYS, LocalFiles
from apps.topk.corpus.output import validation_name
from apps.topk.corpus.sources import Source
from apps.topk.corpus.tally import Tally
from lingua_topk.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

VALIDATION_PATTERN = validation_name("*")
TRAINING_PATTERN = "*.chunk.*.jsonl"


@dataclass
class ValidationArgs:
    """Which documents, and how they are read; see `apps.topk.evaluation.validation`."""

    # Documents a source; null: all of them.
    max_documents: Optional[int] = None  # noqa: UP045 (OmegaConf reads this spelling only)
    # Meta Lingua's name of the same.
    max_steps: Optional[int] = None  # noqa: UP045
    # Also the *.val.jsonl files of the sources that the model was trained on.
    use_val_from_train_src: bool = True
    root_dir: str = ""
    # Folders with *.val.jsonl files, other files and folders of text, and
    # hf:OWNER/NAME[@REVISION][:CONFIG[:SPLIT]].
    sources: list[str] = field(default_factory=list)
    # Tokens that the model sees at once; null: as in training.
    window: Optional[int] = None  # noqa: UP045
    # Least tokens before a scored one, where the document has them; null: half the window.
    context: Optional[int] = None  # noqa: UP045
    # Tokens a batch, padding included.
    batch_tokens: int = 4096


@dataclass(frozen=True)
class ValidationPlan:
    """What is read, and how: `documents` limits each of the sources."""

    sources: dict[str, list[Source]]
    window: int
    context: int
    max_documents: int | None
    batch_tokens: int

    def texts(self, name: str) -> list[str]:
        """The documents of a source. DataError for what cannot be read."""
        tally = Tally()
        parts = self.sources[name]
        for part in parts:
            part.open()
        documents: Iterator[str] = chain.from_iterable(part.documents(tally) for part in parts)
        texts = list(islice(documents, self.max_documents))
        for line in tally.lines():
            logger.warning("%s: %s", name, cli.one_line(line))
        return texts


def plan_validation(
    args: ValidationArgs, data: dict[str, Any], longest: int, reserved: str
) -> ValidationPlan:
    """The plan that `args` ask for, its text found, though not read.

    data: the data section of the training config; longest: the model's max_seqlen; reserved: a
    name that no source may have. ConfigError for what is not allowed, DataError for text that
    is not there.
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
    for name in ("batch_tokens", "max_documents", "max_steps"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"validation.{name}={value} is too small: give at least 1")
    limits = [one for one in (args.max_documents, args.max_steps) if one is not None]
    return ValidationPlan(
        sources=find_sources(args, data, reserved), window=window, context=context,
        max_documents=min(limits, default=None), batch_tokens=args.batch_tokens,
    )  # fmt: skip


def find_sources(
    args: ValidationArgs, data: dict[str, Any], reserved: str
) -> dict[str, list[Source]]:
    """The parts of every source, by the name it has in the results. ConfigError, DataError."""
    named = [
        source if source.startswith(hub.PREFIX) else str(Path(args.root_dir, source))
        for source in args.sources
    ]
    if args.use_val_from_train_src:
        named += [str(Path(data["root_dir"] or "", source)) for source in data["sources"]]
    if not named:
        raise ConfigError(
            "validation.sources is empty and validation.use_val_from_train_src=false: name at"
            " least one source"
        )
    short = [_short(name) for name in named]
    taken = [*short, reserved]
    return {
        brief if taken.count(brief) == 1 else name: _parts(name)
        for name, brief in zip(named, short, strict=True)
    }


def _short(name: str) -> str:
    return name if name.startswith(hub.PREFIX) else Path(name).name


def _parts(name: str) -> list[Source]:
    if name.startswith(hub.PREFIX):
        return [hub.HubDataset(name, TEXT_KEYS)]
    path = Path(name)
    files = [path] if path.is_file() else sorted(path.glob(VALIDATION_PATTERN))
    # A folder of something else than training data is read whole.
    if not files and path.is_dir() and not any(path.glob(TRAINING_PATTERN)):
        files = [path]
    if not files:
        raise DataError(
            f"validation: {path} is neither a file nor a folder with {VALIDATION_PATTERN} files:"
            " prepare it with python -m apps.topk.prepare, or name another in validation.sources"
        )
    return [LocalFiles(file, str(file), TEXT_KEYS) for file in files]
