"""What a training run needs: parameters, tokens, FLOPs, memory a GPU, hours. Nothing is run."""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from apps.topk import cli
from lingua_topk.errors import ConfigError

if TYPE_CHECKING:
    from apps.topk.model import TopKTrainArgs, TopKTransformer

PROGRAM = "apps.topk.plan"
GIB = 1024**3
BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}
# Dense bf16 of one H100 or H200 (SXM), from NVIDIA's data sheets.
PEAK_TFLOPS = 989.0
MEMORY_GIB = 131.0  # the 141 GB of an H200

HELP = f"""\
usage: python -m {PROGRAM} config=FILE [gpus=8] [mfu=0.4] [peak_tflops={PEAK_TFLOPS:.0f}] \
[memory_gib={MEMORY_GIB:.0f}] [vocab_size=N] [json=true] [key=value ...]

{__doc__}
config and the other keys are those of apps.topk.train.
  gpus         how many run it; their product with batch and accumulation is the global batch
  mfu          the share of peak_tflops that the run reaches: measure it, or take 0.4
  peak_tflops  of one GPU in the model's dtype; the default is dense bf16 of an H100 or H200
  memory_gib   of one GPU; the default is an H200's
  vocab_size   in place of the tokenizer's, where that is not made yet
  json         print the numbers as JSON

Every number is computed from the config. Activations are what autograd keeps of the blocks in an
eager run; compilation keeps less, the allocator wastes some: leave a tenth of the memory free."""


@dataclass
class Machine:
    """The machine that a run is planned for."""

    gpus: int = 8
    mfu: float = 0.4
    peak_tflops: float = PEAK_TFLOPS
    memory_gib: float = MEMORY_GIB
    vocab_size: int = 0  # 0: the tokenizer's
    json: bool = False


@dataclass
class Plan:
    """The numbers; see `plan` for their formulas."""

    parameters: int
    non_embedding_parameters: int
    tokens_a_step: int
    steps: int
    tokens: int
    flop_a_token: float
    flop: float
    hours: float
    tokens_a_second: float
    weights_gib: float
    optimizer_gib: float
    gradients_gib: float
    gathered_gib: float
    activations_gib: float
    logits_gib: float
    memory_gib: float
    fits: bool


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake ends the process with status 2."""
    cli.run(lambda: _main(sys.argv[1:] if argv is None else list(argv)))


def _main(argv: list[str]) -> None:
    if "--help" in argv or "-h" in argv:
        print(HELP)
        return
    names = tuple(f"{name}=" for name in asdict(Machine()))
    own = [a for a in argv if a.startswith(names)]
    rest = [a for a in argv if not a.startswith(names)]
    machine = cli.merge(Machine, (cli.dot_list(own), "the command line"))
    _check(machine)
    from apps.topk.model import TopKTrainArgs  # with torch, which takes seconds

    args = cli.read_config(TopKTrainArgs, PROGRAM, "", argv=rest)
    for name, value in (
        ("steps", args.steps),
        ("grad_acc_steps", args.grad_acc_steps),
        ("data.batch_size", args.data.batch_size),
        ("data.seq_len", args.data.seq_len),
        ("model.n_layers", args.model.n_layers),
    ):
        if value < 1:
            raise ConfigError(f"{name}={value} is too small: give at least 1")
    if args.distributed.model_dtype not in BYTES:
        raise ConfigError(
            f"distributed.model_dtype={args.distributed.model_dtype!r} is not known: choose one of"
            f" {', '.join(BYTES)}"
        )
    if args.model.topk is not None:
        args.model.topk.validate(args.model.n_layers)
    result = plan(args, machine)
    if machine.json:
        print(json.dumps(asdict(result), indent=2))
    else:
        Console().print(_table(result, machine))


def _check(machine: Machine) -> None:
    for name, fits, allowed in (
        ("gpus", machine.gpus >= 1, "at least 1"),
        ("mfu", 0 < machine.mfu <= 1, "a share above 0, at most 1"),
        ("peak_tflops", 0 < machine.peak_tflops < math.inf, "a number above 0"),
        ("memory_gib", 0 < machine.memory_gib < math.inf, "a number above 0"),
        ("vocab_size", machine.vocab_size >= 0, "the tokenizer's size, or 0 to read it"),
    ):
        if not fits:
            raise ConfigError(f"{name}={getattr(machine, name)} is not allowed: give {allowed}")


def plan(args: "TopKTrainArgs", machine: Machine) -> Plan:
    """The numbers of a run.

    Parameters N are counted on the model itself. FLOPs a token are the host's: 6 N without
    embeddings (Kaplan et al., arXiv 2001.08361) and the attention. Memory of one of G GPUs
    with full_shard, b bytes the model's dtype: weights 4 N / G, AdamW's two moments 8 N / G and
    gradients 4 N / G in fp32 (ZeRO stage 3, arXiv 1910.02054); the weights gathered for a
    step, which are not freed after the forward, b N.
    """
    import torch

    from apps.main.transformer import get_num_flop_per_token
    from apps.topk.model import TopKTransformer

    args.model.vocab_size = _vocab_size(args, machine)
    args.model.max_seqlen = args.data.seq_len
    with torch.device("meta"):
        model = TopKTransformer(args.model)
    n = sum(parameter.numel() for parameter in model.parameters())
    non_embedding = n - args.model.vocab_size * args.model.dim
    micro_batch = args.data.batch_size * args.data.seq_len
    tokens_a_step = machine.gpus * micro_batch * args.grad_acc_steps
    flop_a_token = get_num_flop_per_token(
        non_embedding, args.model.n_layers, args.model.dim, args.data.seq_len
    )
    tokens_a_second = machine.gpus * machine.peak_tflops * 1e12 * machine.mfu / flop_a_token
    tokens = tokens_a_step * args.steps
    b = BYTES[args.distributed.model_dtype]
    shards = machine.gpus if args.distributed.fsdp_type == "full_shard" else 1
    memory = {
        "weights_gib": 4 * n / shards / GIB,
        "optimizer_gib": 8 * n / shards / GIB,
        "gradients_gib": 4 * n / shards / GIB,
        "gathered_gib": b * n / GIB,
        "activations_gib": micro_batch * activation_bytes_a_token(model, b) / GIB,
        "logits_gib": micro_batch * logit_bytes_a_token(args.model.vocab_size, b) / GIB,
    }
    total = sum(memory.values())
    return Plan(
        parameters=n,
        non_embedding_parameters=non_embedding,
        tokens_a_step=tokens_a_step,
        steps=args.steps,
        tokens=tokens,
        flop_a_token=flop_a_token,
        flop=flop_a_token * tokens,
        hours=tokens / tokens_a_second / 3600,
        tokens_a_second=tokens_a_second,
        **memory,
        memory_gib=total,
        fits=total <= machine.memory_gib,
    )


def activation_bytes_a_token(model: "TopKTransformer", b: int) -> float:
    """What the blocks keep of a token for the backward pass, with b bytes a number.

    In the manner of Korthikanti et al. (arXiv 2205.05198), for this block, attention fused:
    of width D the block's input, both norms' outputs, the residual sum and (with TopK) its
    input, twice in fp32 inside the norms; q, the attention's output and twice k and v of their
    own widths; of the feed-forward's width F the two products, the SiLU and the result.
    """
    total = 0.0
    for block in model.layers:
        q = block.n_heads * block.head_dim
        kv = block.n_kv_heads * block.head_dim
        d, f = model.dim, block.feed_forward.hidden_dim
        total += b * (5 * d + 3 * q + 4 * kv + 4 * f) + 4 * 2 * d
    return total


def logit_bytes_a_token(vocab_size: int, b: int) -> int:
    """The logits and their gradient in b bytes, and in fp32 the log-softmax and its gradient.

    Lingua's loss computes all of them at once for a micro-batch.
    """
    return vocab_size * (2 * b + 2 * 4)


def _vocab_size(args: "TopKTrainArgs", machine: Machine) -> int:
    from lingua.tokenizer import build_tokenizer

    if machine.vocab_size or args.model.vocab_size > 0:
        return machine.vocab_size or args.model.vocab_size
    tokenizer = args.data.tokenizer
    if tokenizer.path and not Path(tokenizer.path).is_file():
        raise ConfigError(
            f"data.tokenizer.path={tokenizer.path} is not there yet, so the vocabulary is unknown:"
            " give vocab_size=N, for example vocab_size=32000"
        )
    return build_tokenizer(tokenizer.name, tokenizer.path).n_words


def _table(result: Plan, machine: Machine) -> Table:
    table = Table(
        title=f"{machine.gpus} GPUs at {machine.mfu:.0%} of {machine.peak_tflops:g} TFLOPS"
    )
    table.add_column("")
    table.add_column("", justify="right")
    for label, value in (
        ("parameters", f"{result.parameters:,}"),
        ("  without embeddings", f"{result.non_embedding_parameters:,}"),
        ("tokens a step", f"{result.tokens_a_step:,}"),
        ("steps", f"{result.steps:,}"),
        ("tokens", f"{result.tokens:,}"),
        ("FLOPs a token", f"{result.flop_a_token:.3g}"),
        ("FLOPs", f"{result.flop:.3g}"),
        ("tokens a second", f"{result.tokens_a_second:,.0f}"),
        ("hours", f"{result.hours:,.1f}"),
        ("GiB a GPU", f"{result.memory_gib:.1f}"),
        ("  weights, fp32", f"{result.weights_gib:.1f}"),
        ("  optimizer, fp32", f"{result.optimizer_gib:.1f}"),
        ("  gradients, fp32", f"{result.gradients_gib:.1f}"),
        ("  weights gathered", f"{result.gathered_gib:.1f}"),
        ("  activations", f"{result.activations_gib:.1f}"),
        ("  logits", f"{result.logits_gib:.1f}"),
        (f"fits in {machine.memory_gib:g} GiB", "yes" if result.fits else "no"),
    ):
        table.add_row(label, value)
    return table


if __name__ == "__main__":
    main()
