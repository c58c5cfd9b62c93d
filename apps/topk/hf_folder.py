"""What an exported folder holds, written from a checkpoint and read back into one."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import transformers
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from apps.topk import cli
from apps.topk.checkpoint import CONFIG_NAME, DTYPES, Checkpoint
from apps.topk.model import TopKTransformer, TopKTransformerArgs
from apps.topk.provenance import provenance, write_json
from lingua.args import dataclass_from_dict
from lingua.tokenizer import ByteTokenizer, SentencePieceTokenizer, TikTokenTokenizer
from lingua_topk import topk_handle
from lingua_topk.errors import CheckpointError, ConfigError
from lingua_topk.hf import modeling_topk_lm
from lingua_topk.hf.convert import from_hf_weights, to_hf_config, to_hf_weights
from lingua_topk.hf.tokenizer import (
    bytes_tokenizer,
    check_same_ids,
    control_ids,
    sentencepiece_tokenizer,
    tiktoken_tokenizer,
    trial_texts,
    wrapped,
)

WEIGHTS_NAME = "model.safetensors"
HF_CONFIG_NAME = "config.json"
PROVENANCE_NAME = "provenance.json"
MODULE = Path(modeling_topk_lm.__file__)
AUTO_MAP = {
    "AutoConfig": f"{MODULE.stem}.TopKLMConfig",
    "AutoModel": f"{MODULE.stem}.TopKLMModel",
    "AutoModelForCausalLM": f"{MODULE.stem}.TopKLMForCausalLM",
}


def export(
    checkpoint: Checkpoint, new: Path, dtype: str, as_trained: bool, with_tokenizer: bool
) -> None:
    """Fill the folder `new`; dtype "" is that of training."""
    dtype = dtype or _default_dtype(checkpoint)
    model = checkpoint.model("cpu", DTYPES[dtype], as_trained)
    handle = topk_handle(model)
    alpha = handle.alpha if handle else 0.0
    ids: dict[str, int | None] = {}
    if with_tokenizer:
        tokenizer = _hf_tokenizer(checkpoint)
        tokenizer.save_pretrained(new)
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = to_hf_config(
        checkpoint.model_args,
        checkpoint.model_args.topk,
        model.layers[0].feed_forward.hidden_dim,
        alpha=alpha,
        **ids,
    )
    config.dtype = DTYPES[dtype]
    if handle:
        config.auto_map = AUTO_MAP
        shutil.copyfile(MODULE, new / MODULE.name)
    config.save_pretrained(new)
    # A model without an end goes on until max_new_tokens.
    GenerationConfig(pad_token_id=ids.get("eos_token_id"), **ids).save_pretrained(new)
    weights = to_hf_weights(model.state_dict(), config)
    save_file(weights, new / WEIGHTS_NAME, metadata={"format": "pt"})
    made = provenance(
        ckpt=str(checkpoint.folder),
        step=checkpoint.step,
        dtype=dtype,
        alpha=alpha,
        transformers=transformers.__version__,
        params=checkpoint.params,
    )
    write_json(new / PROVENANCE_NAME, made)


def _default_dtype(checkpoint: Checkpoint) -> str:
    return "fp64" if checkpoint.params["distributed"]["model_dtype"] == "fp64" else "fp32"


def _hf_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerFast:
    """The tokenizer of training in transformers' form; ConfigError if it cannot be the same."""
    ours = checkpoint.tokenizer()
    special: Sequence[int] = ()
    if isinstance(ours, ByteTokenizer):
        backend, n_tokens = bytes_tokenizer(), 0
    elif isinstance(ours, SentencePieceTokenizer):
        path = Path(checkpoint.params["data"]["tokenizer"]["path"])
        backend, n_tokens = sentencepiece_tokenizer(path.read_bytes()), ours.n_words
        special = control_ids(path.read_bytes())
    elif isinstance(ours, TikTokenTokenizer):
        known = ours.tkt_model
        special = list(known._special_tokens.values())
        backend = tiktoken_tokenizer(known._mergeable_ranks, known._pat_str, known._special_tokens)
        n_tokens = len(known._mergeable_ranks)
    else:
        name = checkpoint.params["data"]["tokenizer"].get("name")
        raise ConfigError(
            f"data.tokenizer.name={name!r} has no form that transformers loads: only bytes, sp and"
            " tiktoken have; give --tokenizer false to export the model alone"
        )
    theirs = wrapped(
        backend,
        bos_id=ours.bos_id,
        eos_id=ours.eos_id,
        special_ids=special,
        add_bos=bool(checkpoint.params["data"].get("add_bos", True)),
        max_length=checkpoint.model_args.max_seqlen,
    )
    tokens = [text for i in range(n_tokens) if (text := ours.decode([i]))]
    check_same_ids(theirs, lambda text: ours.encode(text, False, False), trial_texts(tokens))
    return theirs


def checkpoint_of(source: Path, new: Path) -> None:
    """A checkpoint in `new` with the weights of `source` and the config they were trained with."""
    params = _read_json(source / PROVENANCE_NAME).get("params")
    if not isinstance(params, dict):
        raise CheckpointError(
            f"from_hf={str(source)!r}: {PROVENANCE_NAME} has no params, which say how the model was"
            f" trained: put the {PROVENANCE_NAME} there that the export wrote"
        )
    model = _model_of(params, source)
    config = _hf_config(source)
    _check_same_model(model, params, config, source)
    try:
        model.load_state_dict(from_hf_weights(load_file(source / WEIGHTS_NAME), config))
    except (OSError, SafetensorError, RuntimeError, LookupError) as error:
        raise CheckpointError(
            f"{source / WEIGHTS_NAME} cannot be loaded into this model:"
            f" {cli.one_line(str(error))[:300]}"
        ) from None
    dcp.save({"model": model.state_dict()}, checkpoint_id=str(new), no_dist=True)
    write_json(new / CONFIG_NAME, params)
    write_json(new / PROVENANCE_NAME, provenance(from_hf=str(source)))


def _model_of(params: dict[str, Any], source: Path) -> TopKTransformer:
    try:
        args = dataclass_from_dict(TopKTransformerArgs, params["model"])
    except (OmegaConfBaseException, LookupError) as error:
        raise CheckpointError(
            f"{source / PROVENANCE_NAME}: params.model is not one that this version knows"
            f" ({cli.one_line(str(error))[:200]})"
        ) from None
    model = TopKTransformer(args)
    wide = params.get("distributed", {}).get("model_dtype") == "fp64"
    return model.to(torch.float64 if wide else torch.float32)


def _hf_config(source: Path) -> LlamaConfig:
    content = _read_json(source / HF_CONFIG_NAME)
    kinds = {"llama": LlamaConfig, "topk_lm": modeling_topk_lm.TopKLMConfig}
    kind = content.get("model_type")
    if kind not in kinds:
        raise CheckpointError(
            f"{source / HF_CONFIG_NAME}: model_type={kind!r} is not known: choose a folder of"
            f" {' or '.join(kinds)}"
        )
    try:
        return kinds[kind].from_dict(content)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{source / HF_CONFIG_NAME}: {cli.one_line(str(error))}") from None


def _check_same_model(
    model: TopKTransformer, params: dict[str, Any], config: LlamaConfig, source: Path
) -> None:
    """CheckpointError where the folder's config is not what `params` would be exported as."""
    args = dataclass_from_dict(TopKTransformerArgs, params["model"])
    expected = to_hf_config(args, args.topk, model.layers[0].feed_forward.hidden_dim)
    ours, theirs = expected.to_dict(), config.to_dict()
    free = {"bos_token_id", "eos_token_id", "pad_token_id", "dtype", "architectures", "auto_map"}
    free |= {"transformers_version", "use_cache", "_name_or_path", "topk_alpha"}
    for name, value in ours.items():
        if name not in free and theirs.get(name) != value:
            raise CheckpointError(
                f"{source / HF_CONFIG_NAME}: {name}={theirs.get(name)!r}, but the model was trained"
                f" with {value!r} ({PROVENANCE_NAME}): a Lingua checkpoint would be another model"
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
        reason = "it is no JSON object"
    except (OSError, ValueError, RecursionError) as error:
        reason = cli.one_line(str(error))
    raise CheckpointError(f"{path} cannot be read ({reason}): give an exported folder") from None
