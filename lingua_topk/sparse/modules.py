"""What sparse decoding must know of the modules whose products it takes, and how it stands in."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from lingua_topk.errors import ConfigError


class StandIn:
    """What a module's attribute `forward` is for a time: it hides the method of its class.

    A copy or a pickle of the module calls the method of its class.
    """

    def __init__(self, module: nn.Module, forward: Callable[[Tensor], Tensor] | None = None):
        self._module, self._forward = module, forward

    def __call__(self, x: Tensor) -> Tensor:
        if self._forward is None:
            return type(self._module).forward(self._module, x)
        return self._forward(x)

    def __reduce__(self):
        return StandIn, (self._module,)


def check_linear(linear: nn.Module | None, where: str) -> None:
    """ConfigError for what is not an nn.Linear with a weight of its own and nothing else."""
    if type(linear) is nn.Linear and linear.bias is None and "weight" in linear._parameters:
        return
    kind = type(linear).__name__
    what = "an nn.Linear with more than a weight" if kind == "Linear" else f"a {kind}"
    raise ConfigError(
        f"{where} is {what}: decoding sparsely takes an nn.Linear without bias, of a model shaped"
        " like Lingua's; decode densely"
    )


def holds(owner: nn.Module, parts: dict[str, nn.Module]) -> bool:
    """Whether these are still the parts of owner, by name."""
    return all(getattr(owner, name, None) is part for name, part in parts.items())


def is_plain(linear: nn.Module) -> bool:
    """Whether calling it is the product with its weight, but for hooks."""
    return (
        type(linear) is nn.Linear  # no adapter, not sharded
        and linear.bias is None
        and type(linear._parameters.get("weight")) is nn.Parameter  # not sharded
        and is_own(linear)
    )


def is_own(module: nn.Module) -> bool:
    """Whether calling it is calling the method of its class: neither replaced nor compiled."""
    return "forward" not in vars(module) and not is_compiled(module)


def is_compiled(module: nn.Module) -> bool:
    """Whether its own `compile` was called."""
    return module._compiled_call_impl is not None


def is_hooked(module: nn.Module) -> bool:
    """Whether hooks wait for what goes into a module or out of it, which they may change."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or _has_any_global_hook()


def could_gather(x: Tensor, weight: Tensor) -> bool:
    """Whether the product of x with weight may be one that has no gradient and casts nothing."""
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and (x.dtype, x.device) == (weight.dtype, weight.device)
        and not torch.is_autocast_enabled(x.device.type)
    )
