"""Computes, on the host that LINGUA_TOPK_HOST names, the numbers that both hosts must agree on.

    python compute_numbers.py JOBS RESULTS

JOBS holds {name: job}, saved by torch: "kind" is a key of KINDS, "config" the config of a run;
the rest is in the function of that kind. RESULTS becomes {name: {quantity: tensor}}.
"""

import sys
from typing import Any

import torch
from torch import Tensor

from apps.topk.model import TopKTrainArgs, TopKTransformer
from apps.topk.seam import install
from lingua.args import dataclass_from_dict
from lingua_topk import topk_handle

Numbers = dict[str, Tensor]


def keep_float64() -> None:
    """Let `.float()` leave float64 as it is, in this process.

    Lingua calls it on the inputs and weights of RMSNorm, on the rotations of RoPE and on the
    logits before the softmax, with half precision in mind. Without this a model in float64 is
    rounded to float32 in each of those places: gradients were seen to differ by 1e-6, weights
    after twenty steps by 2e-4. The table of RoPE is computed in float32 by both hosts, and
    `.double()` keeps its numbers: it is compared too.
    """
    to_float32 = Tensor.float
    Tensor.float = lambda self: self if self.dtype == torch.float64 else to_float32(self)


def outputs(job: dict[str, Any]) -> Numbers:
    """Logits and loss, and the gradient of every parameter.

    The job has weights, a dtype by name, alpha, and `inputs`: keywords of the model's forward.
    """
    args = dataclass_from_dict(TopKTrainArgs, job["config"])
    model = loaded(TopKTransformer(args.model), job)
    handle = topk_handle(model)
    if handle is not None:
        handle.alpha = job["alpha"]
    inputs = dict(job["inputs"])
    target = inputs.pop("target")  # [B, S]
    logits = model(**inputs)  # [B, S, V]
    loss = model(**inputs, target=target)
    loss.backward()
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    rotations = model.rope_embeddings.freqs_cis  # [max_seqlen, E / 2, 2, 2]
    return {"logits": logits.detach(), "loss": loss.detach(), "rotations": rotations, **gradients}


def training(job: dict[str, Any]) -> Numbers:
    """Every step of a run in float64 as the host's loop makes it, and the weights after it.

    The loop itself is not used: Lingua has no float64. The job has weights and batches, [T, B, S,
    2] of tokens and targets. What is there by step: [T].
    """
    args = dataclass_from_dict(TopKTrainArgs, job["config"])
    steps = []
    with install(args) as train_module:
        model = loaded(train_module.LMTransformer(args.model), job)
        optimizer, scheduler = train_module.build_optimizer(model, args.optim, args.steps)
        for batch in job["batches"]:
            steps.append(step(model, optimizer, scheduler, batch, args.optim.clip))
    by_step = {
        key: torch.tensor([one[key] for one in steps], dtype=torch.float64) for key in steps[0]
    }
    return {**by_step, **{f"final {name}": w.detach() for name, w in model.named_parameters()}}


def step(model, optimizer, scheduler, batch: Tensor, clip: float) -> dict[str, float]:
    """One step; what it used. batch: [B, S, 2]."""
    handle = topk_handle(model)
    used = {"lr": optimizer.param_groups[0]["lr"]}
    if handle is not None:
        used["alpha"] = handle.alpha
    loss = model(batch[..., 0], batch[..., 1])
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=clip, foreach=True)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    metrics = {} if handle is None else scheduler.metrics()
    return {"loss": loss.item(), "gradient norm": norm.item(), **used, **metrics}


def initial_weights(job: dict[str, Any]) -> Numbers:
    """All parameters and buffers as a run makes them: on meta, emptied, initialised."""
    args = dataclass_from_dict(TopKTrainArgs, job["config"]).model
    with torch.device("meta"):
        model = TopKTransformer(args)
    model.to_empty(device="cpu")
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.fill_(torch.nan)  # what the host leaves as it is cannot go unnoticed
    torch.manual_seed(args.seed)
    model.init_weights()
    return {name: tensor.detach() for name, tensor in tensors.items()}


def loaded(model: torch.nn.Module, job: dict[str, Any]) -> torch.nn.Module:
    """`model` with the weights of the job, in its dtype; buffers are cast as well."""
    model = model.to(getattr(torch, job["dtype"]))
    model.load_state_dict(job["weights"], strict=True)
    return model


KINDS = {"outputs": outputs, "training": training, "initial weights": initial_weights}


if __name__ == "__main__":
    jobs, results = sys.argv[1:]
    keep_float64()
    torch.save(
        {
            name: KINDS[job["kind"]](job)
            for name, job in torch.load(jobs, weights_only=True).items()
        },
        results,
    )
