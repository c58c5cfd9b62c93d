"""How long a training step takes with TopK and without, beside transformers' Llama and Lingua."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from apps.bench.devices import check_device
from apps.bench.rows import RESULTS, append, origin
from apps.bench.training_check import check_small_runs, check_timed_losses
from apps.bench.training_variants import (
    LLAMA,
    VARIANTS,
    Trained,
    batches,
    build,
    build_llama,
    from_json,
    processes,
    to_json,
)
from apps.topk import cli
from apps.topk.checkpoint import DTYPES
from apps.topk.corpus import flags
from apps.topk.model import TopKTrainArgs
from apps.topk.provenance import ROOT
from lingua_topk import TopKArgs, host
from lingua_topk.errors import ConfigError, DataError

PROGRAM = "apps.bench.training"
EXAMPLE = "--dim 1024 --layers 4 --batch 2 --seq_len 1024"
WARM_UP = 2
LINGUA = "lingua"
SLOW = "it takes many times as long on a CPU"
GIB = 1 << 30
# Products of bfloat16 or float16 a second, dense, by the data sheets.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}


def main(argv: Sequence[str] | None = None) -> None:
    flags.call(measure, PROGRAM, sys.argv[1:] if argv is None else argv, EXAMPLE)


def measure(
    *,
    device: str = "cpu",
    config: str = "",
    dim: int = 0,
    layers: int = 0,
    vocab: int = 0,
    batch: int = 0,
    seq_len: int = 0,
    k: int = 0,
    n_last_nontopk: int = -1,
    dtype: str = "",
    compile: str = "",
    steps: int = 5,
    variants: str = "",
    save: bool = False,
) -> list[dict[str, Any]]:
    """Measure a whole training step: forward, loss, backward, clip and AdamW.

    In turns, in one process, on the same tokens and from the same weights: the embedded host's
    vanilla twin; the same with TopK, hard, in the middle of its annealing, and with the
    definition as backend; transformers' LlamaForCausalLM of that shape in a plain loop. On
    CUDA also the twin with the losses that LINGUA_TOPK_LOSS can name and that are installed,
    and, where LINGUA_HOME names a checkout, Meta Lingua's vanilla twin and TopK model in a
    process of its own.

    `time_ratio` is the time over that of the vanilla twin in the same turn: the median, and
    the 10th and 90th percentile; below 1 is faster. `cpu_time_ratio` is the same of the
    processors' time in this process, which others on the machine disturb less. Tokens a
    second, MFU and memory are written for a GPU only. MFU counts 6 times the parameters
    without the embedding and 3.5 times the attention's two causal products a token, over the
    dense peak of the data sheet.

    Nothing is reported where losses are not what they must be, in this very run.

    Args:
        device: cpu or cuda.
        config: a training config, whose shape is measured; the flags below replace its values.
        dim: width of the model; 1024 without a config.
        layers: its blocks; 4 without a config.
        vocab: its tokens; 32000 where the config has none.
        batch: sequences a step; 2 without a config.
        seq_len: tokens a sequence; 1024 without a config.
        k: values a row that TopK keeps; 64 without a config.
        n_last_nontopk: blocks without TopK, at the end; 2 without a config.
        dtype: fp64, fp32, bf16 or fp16; bf16 on CUDA and fp32 on a CPU without a config.
        compile: true or false, of ours; without a config true on CUDA and false on a CPU.
        steps: turns that count; two before them do not.
        variants: some of vanilla,topk,annealed,plain,loss-torch,loss-liger,loss-cce,llama,
            lingua, vanilla first; all that can run by default, on a CPU without loss-torch.
        save: append rows to apps/bench/results/training.csv.

    Returns: a row for each.
    """
    _check_host()
    where = _device(device)
    args = _args(config, where, dim, layers, vocab, batch, seq_len, k, n_last_nontopk, dtype,
                 compile)  # fmt: skip
    names = _names(variants, where, DTYPES[args.distributed.model_dtype])
    if steps < 1:
        raise ConfigError(f"steps={steps} is too small: give at least 1")
    with processes(args):
        check_small_runs(args, where, LLAMA in names)
        measured = _in_turns(args, names, where, steps)
    if LINGUA in names:
        measured.update(_of_lingua(args, steps))
    losses = {name: one.losses for name, one in measured.items()}
    hard = [name for name in measured if name in ("topk", "plain", f"{LINGUA} topk")]
    twins = [name for name in measured if name not in (*hard, "annealed")]
    check_timed_losses(losses, twins, hard, args.distributed.model_dtype)
    rows = _rows(measured, args, where, steps)
    _show(rows)
    for row in rows if save else []:
        append(RESULTS / "training.csv", row)
    return rows


def _check_host() -> None:
    bound = host.bound()
    if bound is not None and bound.kind != "embedded":
        raise ConfigError(
            f"{host.HOME_VARIABLE} binds {bound.describe()}, which is measured in a process of its"
            f" own: set {host.HOST_VARIABLE}=embedded"
        )


def _device(name: str) -> torch.device:
    check_device(name)
    if name == "cpu" and torch.cuda.is_available():
        raise ConfigError(
            "device=cpu: training takes the GPU where there is one; set CUDA_VISIBLE_DEVICES="
        )
    return torch.device(name)


def _args(
    config: str, device: torch.device, dim: int, layers: int, vocab: int, batch: int,
    seq_len: int, k: int, n_last_nontopk: int, dtype: str, compile: str,
) -> TopKTrainArgs:  # fmt: skip
    """The training arguments of what is measured."""
    on_gpu = device.type == "cuda"
    if config:
        args = cli.merge(TopKTrainArgs, (cli.read_yaml(config), config))
    else:
        args = TopKTrainArgs()
        args.model.dim, args.model.n_layers = 1024, 4
        args.data.batch_size, args.data.seq_len = 2, 1024
        args.distributed.model_dtype = "bf16" if on_gpu else "fp32"
        args.distributed.compile = on_gpu
        args.distributed.fsdp_type = "full_shard"
        args.optim.clip = 10.0
    model, topk = args.model, args.model.topk or TopKArgs()
    if dim or not config:
        model.dim = dim or model.dim
        # As in the paper's setting, and narrower where four such heads would not fit.
        model.head_dim = 128 if model.dim >= 512 else max(2, model.dim // 4)
        model.n_heads, model.n_kv_heads = model.dim // model.head_dim, None
    model.n_layers = layers or model.n_layers
    model.vocab_size = vocab or (model.vocab_size if model.vocab_size > 0 else 32_000)
    args.data.batch_size = batch or args.data.batch_size
    args.data.seq_len = model.max_seqlen = seq_len or args.data.seq_len
    last = topk.n_last_nontopk if n_last_nontopk < 0 else n_last_nontopk
    model.topk = replace(topk, k=k or topk.k, n_last_nontopk=last, anneal_ratio=0.0)
    args.distributed.model_dtype = dtype or args.distributed.model_dtype
    args.distributed.compile = _boolean(compile, args.distributed.compile)
    args.distributed.compile_cache_size_limit = 64  # several models, and backends, a process
    args.optim.scheduler, args.optim.warmup = "constant", 0
    _check(args)
    return args


def _boolean(text: str, default: bool) -> bool:
    if text not in ("", "true", "false"):
        raise ConfigError(f"compile={text!r} is not allowed: give true or false")
    return default if text == "" else text == "true"


def _check(args: TopKTrainArgs) -> None:
    if args.distributed.model_dtype not in DTYPES:
        raise ConfigError(
            f"dtype={args.distributed.model_dtype!r} is not known: choose one of"
            f" {', '.join(DTYPES)}"
        )
    for field_, value in (
        ("dim", args.model.dim), ("layers", args.model.n_layers), ("vocab", args.model.vocab_size),
        ("batch", args.data.batch_size), ("seq_len", args.data.seq_len),
    ):  # fmt: skip
        if value < 1:
            raise ConfigError(f"{field_}={value} is too small: give at least 1")
    args.model.topk.validate(args.model.n_layers)


def _names(variants: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    known = (*VARIANTS, LLAMA, LINGUA)
    if not variants:
        return [name for name in known if _why_not(name, device, dtype) is None]
    names = variants.split(",")
    for name in names:
        if name not in known:
            raise ConfigError(f"variants: {name!r} is not known: choose of {', '.join(known)}")
        reason = _why_not(name, device, dtype)
        if reason not in (None, SLOW):
            raise ConfigError(f"variants: {name} cannot run: {reason}; leave it out")
    if names[0] != "vanilla":
        raise ConfigError(f"variants={variants}: begin with vanilla, the base of the ratios")
    return list(dict.fromkeys(names))


def _why_not(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a variant cannot run, or is not asked for by default; else None."""
    if name == LINGUA:
        if device.type == "cuda" and os.environ.get(host.HOME_VARIABLE):
            return None
        return f"it needs CUDA and {host.HOME_VARIABLE}, the folder of a checkout"
    if name in VARIANTS and VARIANTS[name].loss != "plain":
        from lingua._loss import why_not

        return why_not(VARIANTS[name].loss, device, dtype) or (
            SLOW if device.type == "cpu" else None
        )
    return None


@dataclass
class Measured:
    """Of each turn that counts: seconds, and those of the processors; and all the losses."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    resident: int = 0  # bytes on the GPU between its steps
    peak: int = 0  # and within them, other variants left out

    def note(self, trained: Trained, tokens: Any, target: Any, counts: bool) -> None:
        """Take a step."""
        on_gpu = tokens.is_cuda
        before = _start_memory() if on_gpu else 0
        start, cpu_start = _now(on_gpu), time.process_time()
        loss = trained(tokens, target)
        seconds, cpu_seconds = _now(on_gpu) - start, time.process_time() - cpu_start
        self.losses.append(loss.item())
        if on_gpu:
            # The first step makes the optimizer's state, which stays.
            self.resident += torch.cuda.memory_allocated() - before
            others = torch.cuda.memory_allocated() - self.resident
            self.peak = max(self.peak, torch.cuda.max_memory_allocated() - others)
        if counts:
            self.seconds.append(seconds)
            self.cpu_seconds.append(cpu_seconds)


def _now(on_gpu: bool) -> float:
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter()


def _start_memory() -> int:
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _in_turns(
    args: TopKTrainArgs, names: Sequence[str], device: torch.device, steps: int
) -> dict[str, Measured]:
    """Of each variant of `names` that runs in this process, in their order."""
    trained, measured = {}, {}
    for name in names:
        if name == LINGUA:
            continue
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        if name == LLAMA:
            trained[name] = build_llama(args, trained["vanilla"], device)
        else:
            trained[name] = build(args, VARIANTS[name], device)
        after = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        measured[name] = Measured(resident=after - before)
    data = batches(
        args.model.vocab_size, args.data.batch_size, args.data.seq_len, WARM_UP + steps, device
    )
    for turn, (tokens, target) in enumerate(data):
        for name, one in trained.items():
            measured[name].note(one, tokens, target, counts=turn >= WARM_UP)
    return measured


# --- Meta Lingua, in a process of its own ---


def _of_lingua(args: TopKTrainArgs, steps: int) -> dict[str, Measured]:
    """What `print_measured` measures on Meta Lingua. DataError where it fails."""
    program = "from apps.bench.training import print_measured; print_measured()"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, text=True, capture_output=True, check=False,
        input=json.dumps({"args": to_json(args), "steps": steps}),
        env={**os.environ, host.HOST_VARIABLE: "lingua"},
    )  # fmt: skip
    if done.returncode:
        raise DataError(f"measuring Meta Lingua failed: {' '.join(done.stderr.split()[-60:])}")
    found = json.loads(done.stdout.splitlines()[-1])
    names = {"vanilla": LINGUA, "topk": f"{LINGUA} topk"}
    return {names[name]: Measured(**one) for name, one in found.items()}


def print_measured() -> None:
    """Measure the bound host's vanilla twin and TopK model; from JSON on stdin to JSON."""
    asked = json.loads(sys.stdin.read())
    args = from_json(asked["args"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with processes(args):
        measured = _in_turns(args, ("vanilla", "topk"), device, asked["steps"])
    print(json.dumps({name: asdict(one) for name, one in measured.items()}))


# --- rows ---


def _rows(
    measured: dict[str, Measured], args: TopKTrainArgs, device: torch.device, steps: int
) -> list[dict[str, Any]]:
    model, topk = args.model, args.model.topk
    made_on = {
        **origin(), "transformers": version("transformers"), "device": device.type,
        "dtype": args.distributed.model_dtype, "compile": args.distributed.compile,
        "dim": model.dim, "layers": model.n_layers, "vocab": model.vocab_size,
        "batch": args.data.batch_size, "seq_len": args.data.seq_len, "k": topk.k,
        "n_last_nontopk": topk.n_last_nontopk, "steps": steps,
    }  # fmt: skip
    base = measured["vanilla"]
    return [
        {**made_on, "what": name, **_ratios(one, base), **_on_gpu(one, args, device)}
        for name, one in measured.items()
    ]


def _ratios(one: Measured, base: Measured) -> dict[str, float]:
    ratios = np.array(one.seconds) / np.array(base.seconds)  # [steps]
    cpu_ratios = np.array(one.cpu_seconds) / np.array(base.cpu_seconds)
    tenth, median, ninetieth = np.percentile(ratios, (10, 50, 90))
    return {
        "time_ratio": round(float(median), 3),
        "time_ratio_p10": round(float(tenth), 3),
        "time_ratio_p90": round(float(ninetieth), 3),
        "cpu_time_ratio": round(float(np.median(cpu_ratios)), 3),
    }


def _on_gpu(one: Measured, args: TopKTrainArgs, device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"tokens_a_second": None, "mfu": None, "peak_gib": None}
    tokens = args.data.batch_size * args.data.seq_len / float(np.median(one.seconds))
    peak = _peak_flops(args.distributed.model_dtype)
    share = None if peak is None else round(flop_per_token(args) * tokens / peak, 3)
    return {
        "tokens_a_second": round(tokens),
        "mfu": share,
        "peak_gib": round(one.peak / GIB, 2),
    }


def _peak_flops(dtype: str) -> float | None:
    """Of this GPU in half precision; None where it is not known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    known = [peak for part, peak in PEAK_FLOPS.items() if part in name]
    return known[0] if known and dtype in ("bf16", "fp16") else None


def flop_per_token(args: TopKTrainArgs) -> float:
    """Of forward and backward: the formula behind speed/FLOPS in metrics.jsonl."""
    from apps.main.transformer import LMTransformer, get_num_flop_per_token
    from lingua.metrics import get_num_params

    with torch.device("meta"):
        n_params = get_num_params(LMTransformer(args.model))
    non_embedding = n_params - args.model.vocab_size * args.model.dim
    return get_num_flop_per_token(
        non_embedding, args.model.n_layers, args.model.dim, args.data.seq_len
    )


def _show(rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    shape = (
        f"D={first['dim']}, L={first['layers']}, V={first['vocab']:,}, {first['batch']} x"
        f" {first['seq_len']} tokens, {first['dtype']}, {first['threads']} threads"
    )
    table = Table("what", "time", "10%", "90%", "CPU time", "tokens/s", "MFU", "GiB", title=shape)
    for row in rows:
        *_, time_, tenth, ninetieth, cpu_time, tokens, mfu, peak = row.values()
        ratios = (f"{value:.3f}" for value in (time_, tenth, ninetieth, cpu_time))
        on_gpu = ("" if value is None else f"{value:,}" for value in (tokens, mfu, peak))
        table.add_row(row["what"], *ratios, *on_gpu)
    Console().print(table)


if __name__ == "__main__":
    cli.run(main)
