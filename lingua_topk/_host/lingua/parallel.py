"""How a model is spread over processes: the mesh, FSDP2, recomputation, compilation.

What torch has for that is imported where it is used: it takes seconds, and programs that only
read a config come by here too.
"""

import logging

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from lingua._timeout import set_timeout
from lingua.errors import ConfigError

logger = logging.getLogger(__name__)

TORCH_DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
FSDP_TYPES = ("no_shard", "full_shard")

# What activation checkpointing keeps rather than computes again: the matrix products
# and the attention, which is where the time goes.
default_no_recompute_ops = {
    torch.ops.aten.mm.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
}


def check_parallelism(args) -> None:
    """ConfigError for what of the `distributed` section is unknown or not offered."""
    for field, allowed in (("model_dtype", tuple(TORCH_DTYPES)), ("fsdp_type", FSDP_TYPES)):
        value = getattr(args, field)
        if value not in allowed:
            raise ConfigError(
                f"distributed.{field}={value!r} is not known: choose one of {', '.join(allowed)}"
            )
    for field, without in (("tp_size", 1), ("float8_recipe", None)):
        value = getattr(args, field)
        if value != without:
            raise ConfigError(
                f"distributed.{field}={value} is not offered by the embedded host: set it to"
                f" {'null' if without is None else without}, or run inside Meta Lingua"
                " (LINGUA_HOME)"
            )
    if args.fsdp_type == "no_shard" and args.dp_shard != 1:
        raise ConfigError(
            f"distributed.dp_shard={args.dp_shard} with distributed.fsdp_type=no_shard, which keeps"
            " the whole weights on every process: set fsdp_type=full_shard, or dp_shard=1"
        )


def get_device_mesh(distributed_args) -> DeviceMesh:
    """Processes as (dp_replicate, dp_shard); dp_shard is left out where it would be idle."""
    check_parallelism(distributed_args)
    product = distributed_args.dp_replicate * distributed_args.dp_shard
    if dist.is_initialized() and product != dist.get_world_size():
        raise ConfigError(
            f"distributed.dp_replicate={distributed_args.dp_replicate} times"
            f" dp_shard={distributed_args.dp_shard} is not {dist.get_world_size()}, the number of"
            " processes: correct one of them"
        )
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    shape, names = [distributed_args.dp_replicate], ["dp_replicate"]
    if distributed_args.dp_shard > 1 or distributed_args.fsdp_type == "no_shard":
        shape.append(distributed_args.dp_shard)
        names.append("dp_shard")
    mesh = init_device_mesh(device_type, tuple(shape), mesh_dim_names=tuple(names))
    set_timeout(mesh)
    return mesh


def get_module(module: nn.Module, access_string: str) -> nn.Module:
    """The submodule at a dotted path."""
    return module.get_submodule(access_string)


def set_module(module: nn.Module, access_string: str, value: nn.Module) -> None:
    """Put `value` in the place of the submodule at a dotted path."""
    parent, _, name = access_string.rpartition(".")
    setattr(module.get_submodule(parent), name, value)


def default_fsdp_grouping_plan(n_layers: int) -> list[tuple[str, bool]]:
    """One group a layer; the last need not be freed, backward begins with it."""
    return [(f"layers.{i}", i < n_layers - 1) for i in range(n_layers)]


def get_default_policy(no_recompute_ops=None):
    """A policy for selective activation checkpointing that keeps the listed operators."""
    kept = default_no_recompute_ops if no_recompute_ops is None else no_recompute_ops

    def policy(context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


def parallelize_model(
    model: nn.Module,
    device_mesh: DeviceMesh,
    model_args,
    distributed_args,
    fsdp_grouping_plan: list[tuple[str, bool]] | None = None,
    tp_parallelize=None,
    no_recompute_ops=None,
) -> nn.Module:
    """Apply activation checkpointing, FSDP2 and compilation, in this order, in place.

    The master weights keep their dtype; the forward and backward run in
    `distributed.model_dtype`, gradients are summed in float32 or better. `tp_parallelize`
    is not used: tensor parallelism is refused.
    """
    check_parallelism(distributed_args)
    if distributed_args.selective_activation_checkpointing:
        _recompute_blocks(model, model_args.n_layers, no_recompute_ops)
    _shard(model, device_mesh, distributed_args, fsdp_grouping_plan, model_args.n_layers)
    if distributed_args.compile:
        torch._dynamo.config.cache_size_limit = distributed_args.compile_cache_size_limit
        model.compile()
    return model


def _recompute_blocks(model: nn.Module, n_layers: int, no_recompute_ops) -> None:
    """One wrapper a block: what lives between blocks is kept, the rest follows the policy."""

    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    def contexts():
        return create_selective_checkpoint_contexts(get_default_policy(no_recompute_ops))

    for i in range(n_layers):
        block = get_module(model, f"layers.{i}")
        set_module(model, f"layers.{i}", checkpoint_wrapper(block, context_fn=contexts))


def _shard(model, device_mesh, distributed_args, plan, n_layers) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    dtype = TORCH_DTYPES[distributed_args.model_dtype]
    if device_mesh.size() == 1 and all(weight.dtype == dtype for weight in model.parameters()):
        return  # nothing to share and nothing to cast: weights and gradients would be copied only
    policy = MixedPrecisionPolicy(
        param_dtype=dtype,
        reduce_dtype=torch.promote_types(dtype, torch.float32),
        # The weights alone set the dtype. FSDP's default would also round the rotary table,
        # an input of every block, and training would rotate otherwise than evaluation.
        cast_forward_inputs=False,
    )
    settings = {"mesh": device_mesh, "mp_policy": policy}
    for path, reshard in plan or default_fsdp_grouping_plan(n_layers):
        fully_shard(get_module(model, path), **settings, reshard_after_forward=reshard)
    fully_shard(model, **settings, reshard_after_forward=True)


@torch.no_grad()
def check_model_value_range(model: nn.Module, range: float = 1e3, std: float = 1e3) -> None:
    """Warn of parameters and buffers that look uninitialised or out of proportion."""
    from torch.distributed.tensor import DTensor

    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        complaint = _complaint(local, range, std)
        if complaint and not (local.numel() == 0 and tensor.numel() > 0):
            logger.warning("%s %s", name, complaint)


def _complaint(x: torch.Tensor, range: float, std: float) -> str | None:
    if x.numel() == 0:
        return "is empty"
    if not x.is_floating_point():
        return None
    if not torch.isfinite(x).all():
        return "holds NaN or infinite values"
    if not x.any():
        return "is zero throughout"
    low, high = torch.aminmax(x)
    if high - low > range:
        return f"spans {(high - low).item():.3g}, more than {range:g}"
    if x.numel() > 1 and x.std() > std:
        return f"has a standard deviation of {x.std().item():.3g}, more than {std:g}"
    return None
