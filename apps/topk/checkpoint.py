"""Reading a checkpoint: its arguments, its tokenizer, its model with the weights in it.

Written by either host: a distributed checkpoint (dump_dir/checkpoints/0000001000), or the
folder with consolidated.pth that was made from one.
"""

import hashlib
import json
import logging
import pickle
import re
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf.errors import OmegaConfBaseException

from apps.main.transformer import LMTransformer
from apps.topk.cli import one_line
from apps.topk.lingua_host import check_without_code
from apps.topk.model import TopKTransformer, TopKTransformerArgs
from lingua.args import dataclass_from_dict
from lingua.checkpoint import load_from_checkpoint
from lingua.tokenizer import TokenizerArgs, build_tokenizer
from lingua_topk import topk_handle
from lingua_topk._host.lingua._manifest import find_damage
from lingua_topk.anneal import alpha_at
from lingua_topk.errors import CheckpointError

logger = logging.getLogger(__name__)

CONFIG_NAME = "params.json"
METADATA_NAME = ".metadata"
CONSOLIDATED_NAME = "consolidated.pth"
TRAIN_STATE_NAME = "train_state_00000.json"
DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@dataclass
class Checkpoint:
    """What a checkpoint folder says of itself.

    Attributes:
        folder: where it lies.
        params: the training run's whole config.
        model_args: of the model, with `topk` where it has TopK.
        step: optimizer steps done; None where a folder holds the weights alone.
    """

    folder: Path
    params: dict[str, Any]
    model_args: TopKTransformerArgs
    step: int | None

    @property
    def alpha(self) -> float:
        """The annealing coefficient that training would go on with; 0 for a vanilla model."""
        topk = self.model_args.topk
        if topk is None or self.step is None:
            return 0.0
        n_steps = self.params["steps"]
        return alpha_at(self.step, n_steps, topk.anneal_ratio, topk.anneal_schedule)

    @property
    def tokens(self) -> int | None:
        """How many tokens it has been trained on; None where the folder does not tell."""
        # One a process; a consolidated folder lies inside the checkpoint it was made from.
        found = (
            list(place.glob("train_state_*.json")) for place in (self.folder, self.folder.parent)
        )
        n_files = len(next(filter(None, found), []))
        try:
            per_process = self.params["data"]["batch_size"] * self.params["data"]["seq_len"]
            n_readers = n_files // max(self.params["distributed"].get("tp_size") or 1, 1)
            n_batches = self.step * self.params.get("grad_acc_steps", 1)
            return n_batches * per_process * n_readers or None
        except (LookupError, TypeError):
            return None

    def describe(self) -> dict[str, Any]:
        """The model and its training as results name them; JSON."""
        with torch.device("meta"):
            model = LMTransformer(self.model_args)
        topk, n_layers = self.model_args.topk, self.model_args.n_layers
        tokenizer = self.params["data"]["tokenizer"]
        return {
            "name": self.params.get("name"),
            "dim": self.model_args.dim,
            "n_layers": n_layers,
            "vocab_size": self.model_args.vocab_size,
            "parameters": sum(p.numel() for p in model.parameters()),
            "steps": self.params["steps"],
            "tokens": self.tokens,
            "seed": self.params.get("seed"),
            "topk": topk and {**asdict(topk), "layers": list(topk.topk_layers(n_layers))},
            "tokenizer": {
                "name": tokenizer.get("name"),
                "path": tokenizer.get("path"),
                "sha256": file_digest(tokenizer.get("path")),
            },
        }

    def state(self) -> dict[str, Any]:
        """JSON that is another when the folder holds other weights."""
        paths = (self.folder / name for name in (METADATA_NAME, CONSOLIDATED_NAME))
        stats = {path.name: path.stat() for path in paths if path.is_file()}
        files = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
        return {"folder": str(self.folder.resolve()), "step": self.step, "files": files}

    def tokenizer(self):
        """The tokenizer that the model was trained with."""
        try:
            args = dataclass_from_dict(TokenizerArgs, self.params["data"]["tokenizer"])
        except OmegaConfBaseException as error:
            raise CheckpointError(
                f"{self.folder / CONFIG_NAME}: data.tokenizer is not one that this version knows"
                f" ({one_line(str(error).splitlines()[0])})"
            ) from None
        tokenizer = build_tokenizer(args.name, args.path)
        known = self.params.get("tokenizer_sha256")
        if known is not None and file_digest(args.path) != known:
            raise CheckpointError(
                f"{self.folder}: its tokenizer's file {args.path} is another one than the model was"
                " trained with (its SHA-256 differs): put that file back"
            )
        if tokenizer.n_words > self.model_args.vocab_size:
            raise CheckpointError(
                f"{self.folder}: its tokenizer ({args.name}, {args.path}) now has"
                f" {tokenizer.n_words} tokens, the model {self.model_args.vocab_size}: put the"
                " file back that the model was trained with"
            )
        return tokenizer

    def model(
        self, device: torch.device | str, dtype: torch.dtype, as_trained: bool = False
    ) -> TopKTransformer:
        """The model in evaluation mode, with its weights.

        alpha is 0, or with `as_trained` what training had reached: CheckpointError where the
        folder does not tell.
        """
        model = TopKTransformer(self.model_args)
        if self.params["distributed"].get("model_dtype") == "fp64":
            model = model.double()
        self._load(model)
        if as_trained and self.step is None:
            raise CheckpointError(
                f"{self.folder} does not say at which step it was saved, so as_trained=true has no"
                " alpha to use: give the folder that training wrote"
            )
        handle = topk_handle(model)
        if handle is not None and self.alpha > 0:
            if as_trained:
                handle.alpha = self.alpha
            logger.warning(
                "%s lies inside the annealing phase (alpha %.3f); it is used with alpha %.3f",
                self.folder, self.alpha, handle.alpha,
            )  # fmt: skip
        model = model.eval().requires_grad_(False)
        for parameter in model.parameters():  # the rotary table stays in float32
            parameter.data = parameter.data.to(device=device, dtype=dtype)
        return model.to(device)

    def _load(self, model: TopKTransformer) -> None:
        if (self.folder / METADATA_NAME).is_file():
            load_from_checkpoint(str(self.folder), model, model_key="model")
        else:
            _load_consolidated(self.folder / CONSOLIDATED_NAME, model)
        for name, parameter in model.named_parameters():
            if not torch.isfinite(parameter).all():
                raise CheckpointError(
                    f"{self.folder}: {name} holds NaN or infinite values; use an earlier checkpoint"
                )


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """The checkpoint in `folder`. CheckpointError where there is none, or not a whole one.

    Under torchrun every process calls it, and reads a part of the files to see if they are
    as they were written.
    """
    folder = Path(folder)
    if not str(folder) or not folder.is_dir():
        raise CheckpointError(
            f"ckpt_dir={str(folder)!r} is not a folder: give one such as"
            " DUMP_DIR/checkpoints/0000001000"
        )
    if not any((folder / name).is_file() for name in (METADATA_NAME, CONSOLIDATED_NAME)):
        raise CheckpointError(
            f"ckpt_dir={str(folder)!r} holds neither {METADATA_NAME} nor {CONSOLIDATED_NAME}: give"
            f" the folder of one checkpoint{_example(folder)}"
        )
    params = _read_params(folder / CONFIG_NAME)
    damage = find_damage(folder) if (folder / METADATA_NAME).is_file() else None
    if damage:
        raise CheckpointError(f"ckpt_dir={folder} is damaged: {damage}: use another checkpoint")
    check_without_code(folder)
    return Checkpoint(
        folder=folder, params=params, model_args=_model_args(folder, params), step=_step(folder)
    )


def file_digest(path: str | None) -> str | None:
    """SHA-256 of a file, None where there is none."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else None
    except (OSError, ValueError):  # ValueError: a path with a NUL
        return None


def _step(folder: Path) -> int | None:
    """The step at which training saved `folder`, whatever it is called now."""
    # A consolidated folder lies inside the checkpoint it was made from.
    for place in (folder, folder.parent):
        try:
            state = json.loads((place / TRAIN_STATE_NAME).read_text(encoding="utf-8"))
            return int(state["step"])
        except (OSError, ValueError, LookupError, TypeError):
            continue
    return None


def newest_checkpoint(dump_dir: str | Path) -> Path:
    """The folder of the last checkpoint of a run. CheckpointError where there is none."""
    found = Path(dump_dir, "checkpoints").glob(f"*/{METADATA_NAME}")
    folders = [path.parent for path in found if re.fullmatch(r"\d{10,}", path.parent.name)]
    if not folders:
        raise CheckpointError(f"{dump_dir} has no checkpoint: give the dump_dir of a training run")
    return max(folders, key=lambda folder: int(folder.name))


def checkpoint_folder(ckpt: str) -> Path:
    """The folder of a checkpoint, where `ckpt` is that of a run its newest one."""
    folder = Path(ckpt).expanduser()
    is_checkpoint = any((folder / name).is_file() for name in (METADATA_NAME, CONSOLIDATED_NAME))
    has_checkpoints = not is_checkpoint and (folder / "checkpoints").is_dir()
    return newest_checkpoint(folder) if has_checkpoints else folder


def _example(folder: Path) -> str:
    inside = sorted(folder.glob(f"**/{METADATA_NAME}"))
    return f", for example {inside[-1].parent}" if inside else ""


def _read_params(path: Path) -> dict[str, Any]:
    try:
        params = json.loads(path.read_text(encoding="utf-8"))
        sections = [params["model"], params["data"], params["distributed"]]
        sections += [params["data"]["tokenizer"], params["data"]["sources"]]
        dtype = params["distributed"]["model_dtype"]
        if (
            all(isinstance(one, dict) for one in sections)
            and isinstance(params["steps"], int)
            and isinstance(dtype, str)
            and isinstance(params["data"]["root_dir"], str | None)
        ):
            return params
        reason = "model, data, distributed or steps is not what training writes"
    except LookupError as error:
        reason = f"{error} is missing"
    except (OSError, ValueError, TypeError, RecursionError) as error:
        reason = one_line(str(error))
    raise CheckpointError(f"{path} is not the config of a training run ({reason})")


def _model_args(folder: Path, params: dict[str, Any]) -> TopKTransformerArgs:
    try:
        args = dataclass_from_dict(TopKTransformerArgs, params["model"])
    except OmegaConfBaseException as error:
        raise CheckpointError(
            f"{folder / CONFIG_NAME}: model is not one that this version knows"
            f" ({one_line(str(error).splitlines()[0])})"
        ) from None
    if args.topk is not None:
        args.topk.validate(args.n_layers)
    return args


def _load_consolidated(path: Path, model: TopKTransformer) -> None:
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip() is not None:
                raise ValueError("it is not as it was written, by its own checksums")
        weights = torch.load(path, map_location="cpu", weights_only=True)["model"]
        model.load_state_dict(weights)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} holds other things than weights, which are not unpickled, or is damaged: give"
            " one that consolidate_checkpoints made"
        ) from None
    except Exception as error:  # a damaged file raises a dozen kinds
        raise CheckpointError(
            f"{path} cannot be loaded into this model: {one_line(str(error))[:300]}"
        ) from None
