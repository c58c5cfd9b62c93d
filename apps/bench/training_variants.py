"""What the benchmark of training measures: models that take the same training step."""

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from apps.topk.model import TopKTrainArgs
from apps.topk.seam import install
from lingua.args import dataclass_from_dict
from lingua.distributed import get_device_mesh, setup_torch_distributed
from lingua_topk import TopKArgs, topk_handle
from lingua_topk.ops import backends

WIDE = {"fp64": torch.float64}  # of the weights; float32 for every other model_dtype
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Of libraries, beside the plain one.
LOSSES = ("torch", "liger", "cce")
# alpha in the middle of the annealing: every value counts, kept or not.
ANNEALED = 0.5


@dataclass(frozen=True)
class Variant:
    """One thing that is measured.

    Attributes:
        topk: whether the model has it.
        alpha: of its annealing.
        backend: of its operator, one of `lingua_topk.ops.backends.CHOICES`.
        loss: of its output layer, by the names of LINGUA_TOPK_LOSS.
    """

    what: str
    topk: bool
    alpha: float = 0.0
    backend: str = "auto"
    loss: str = "plain"


VARIANTS = {
    "vanilla": Variant("vanilla", False),
    "topk": Variant("topk", True),
    "annealed": Variant("annealed", True, ANNEALED),
    "plain": Variant("plain", True, backend="plain"),
    **{f"loss-{name}": Variant(f"loss-{name}", False, loss=name) for name in LOSSES},
}
LLAMA = "llama"


@dataclass
class Trained:
    """A model and its optimizer; calling it takes a whole step, and gives the loss, 0-d."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss_of: Callable[[nn.Module, Tensor, Tensor], Tensor]
    clip: float
    backend: str = "auto"

    def __call__(self, tokens: Tensor, target: Tensor) -> Tensor:
        """tokens, target: [B, S] int64 on the model's device."""
        with backends.use(self.backend):
            loss = self.loss_of(self.model, tokens, target)
            loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), max_norm=self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


@contextmanager
def processes(args: TopKTrainArgs) -> Iterator[None]:
    """Within it this process is a group of one, as in training without torchrun."""
    was_there = dist.is_initialized()
    if not was_there:
        setup_torch_distributed(args.distributed)
    try:
        yield
    finally:
        if not was_there:
            dist.destroy_process_group()


def build(args: TopKTrainArgs, variant: Variant, device: torch.device) -> Trained:
    """The bound host's model, made as its training loop makes it, and its optimizer.

    args: with a `model.topk` section, which a vanilla variant does without.
    """
    args = replace(args, model=deepcopy(args.model))
    if not variant.topk:
        args.model.topk = None
    with install(args) as host:
        with _meta(args.distributed.model_dtype):
            model = host.LMTransformer(args.model)
        model = host.parallelize_model(
            model,
            get_device_mesh(args.distributed),
            args.model,
            args.distributed,
            fsdp_grouping_plan=host.build_fsdp_grouping_plan(args.model),
            tp_parallelize=host.tp_parallelize,
            no_recompute_ops=host.get_no_recompute_ops(),
        ).to_empty(device=device)
        torch.manual_seed(args.model.seed)
        model.init_weights()
        # What counts the firing neurons begins here, as in training.
        optimizer, _ = host.build_optimizer(model.train(), args.optim, args.steps)
    if variant.loss != "plain":
        model.output.loss = variant.loss
    handle = topk_handle(model)
    if handle is not None:
        handle.alpha = variant.alpha
    return Trained(model, optimizer, _loss_of_ours, args.optim.clip, variant.backend)


@contextmanager
def _meta(dtype: str) -> Iterator[None]:
    """Within it modules are made without data; float64 ones where training is."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(WIDE.get(dtype, torch.float32))
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)


def _loss_of_ours(model: nn.Module, tokens: Tensor, target: Tensor) -> Tensor:
    return model(tokens, target)


def build_llama(args: TopKTrainArgs, ours: Trained, device: torch.device) -> Trained:
    """transformers' Llama with the weights of `ours`, which is vanilla; eager, sdpa.

    Its weights are float32 and its products in `distributed.model_dtype` by autocast, as
    transformers' own Trainer does it; the optimizer is the same as ours.
    """
    from transformers import LlamaForCausalLM

    from lingua_topk.hf.convert import to_hf_config, to_hf_weights

    weights = {name: _whole(weight) for name, weight in ours.model.state_dict().items()}
    hidden_dim = weights["layers.0.feed_forward.w1.weight"].shape[0]
    config = to_hf_config(args.model, None, hidden_dim)
    config._attn_implementation = "sdpa"
    wide = WIDE.get(args.distributed.model_dtype, torch.float32)
    model = LlamaForCausalLM(config).to(device, wide).train()
    model.load_state_dict(to_hf_weights(weights, config), strict=not args.model.weight_tying)
    optim = args.optim
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.epsilon,
        weight_decay=optim.weight_decay, fused=True,
    )  # fmt: skip
    half = HALF.get(args.distributed.model_dtype)
    return Trained(model, optimizer, functools.partial(_loss_of_llama, half), optim.clip)


def _whole(weight: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def _loss_of_llama(
    half: torch.dtype | None, model: nn.Module, tokens: Tensor, target: Tensor
) -> Tensor:
    # The targets are shifted already, which it would do itself.
    with torch.autocast(tokens.device.type, dtype=half, enabled=half is not None):
        return model(
            input_ids=tokens, labels=target, shift_labels=target, use_cache=False
        ).loss  # fmt: skip


def to_json(args: TopKTrainArgs) -> str:
    return json.dumps(asdict(args))


def from_json(text: str) -> TopKTrainArgs:
    return dataclass_from_dict(TopKTrainArgs, json.loads(text))


def small(args: TopKTrainArgs, dtype: str) -> TopKTrainArgs:
    """A model of a few thousand weights with the same kind of blocks, for the check."""
    model = replace(
        args.model, dim=32, n_layers=3, head_dim=8, n_heads=4, n_kv_heads=None, multiple_of=16,
        vocab_size=48, max_seqlen=16, topk=TopKArgs(k=5, n_last_nontopk=1, anneal_ratio=0.0),
    )  # fmt: skip
    distributed = replace(args.distributed, model_dtype=dtype, compile=False)
    optim = replace(args.optim, lr=1e-2)
    return replace(args, model=model, distributed=distributed, optim=optim)


def batches(vocab: int, rows: int, length: int, n: int, device: Any) -> list[tuple[Tensor, Tensor]]:
    """n batches of random tokens and, one further on, their targets: each [rows, length] int64."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(vocab, (n, rows, length + 1), generator=generator).to(device)
    return [(one[:, :-1].contiguous(), one[:, 1:].contiguous()) for one in drawn]
