"""Put TopK into a model that is already built, and take it out again.

A patched block is the same object with a class derived from its own, so parameters,
hooks and `isinstance` stay as they are, and FSDP2 (which does the same) and
`torch.compile` go on top. The derived class adds one child, `topk`, which owns neither
parameters nor buffers: state-dict keys and shapes do not change.
"""

import inspect
import logging
from dataclasses import replace
from functools import cache

from torch import Tensor, nn

from lingua_topk.config import TopKArgs
from lingua_topk.errors import ConfigError
from lingua_topk.nn import TopK
from lingua_topk.ops.topk import check_alpha
from lingua_topk.stats import FiringStats

logger = logging.getLogger(__name__)

_ARGS_ATTRIBUTE = "_topk_args"
_BLOCK_PARTS = ("attention", "attention_norm", "feed_forward", "ffn_norm")
_BLOCK_INPUTS = ("x", "freq_cis", "tok_idx", "mask", "attn_impl")
_FEED_FORWARD_PARTS = ("w1", "w2", "w3")


class _Patched:
    """What the derived classes share: copies and pickles are rebuilt from the own class."""

    own_class: type[nn.Module]

    def __reduce_ex__(self, protocol):
        return _blank, (self.patch, self.own_class), self.__dict__


class _TopKBlock(_Patched):
    """A pre-norm transformer block that ends in TopK (`site: residual`)."""

    def forward(self, x: Tensor, freq_cis, tok_idx=None, mask=None, attn_impl="sdpa") -> Tensor:
        h = x + self.attention(
            self.attention_norm(x), freq_cis, tok_idx=tok_idx, mask=mask, attn_impl=attn_impl
        )  # [B, S, D]
        return self.topk(h, self.feed_forward(self.ffn_norm(h)))


class _TopKFeedForward(_Patched):
    """A gated feed-forward whose gate is TopK (`site: mlp`)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.topk(self.w1(x)) * self.w3(x))  # [B, S, D]


@cache
def _derived(patch: type[_Patched], own_class: type[nn.Module]) -> type[nn.Module]:
    name = f"TopK{own_class.__name__}"
    return type(name, (patch, own_class), {"patch": patch, "own_class": own_class})


def _blank(patch: type[_Patched], own_class: type[nn.Module]) -> nn.Module:
    derived = _derived(patch, own_class)
    return derived.__new__(derived)


class TopKHandle:
    """The TopK of one model. A light view: any number of handles see the same state.

    Attributes:
        model: the patched model.
        args: a copy of the arguments it was patched with.
        modules: the TopK module of each patched block, by index of the block.
    """

    def __init__(self, model: nn.Module, args: TopKArgs, modules: dict[int, TopK]):
        self.model = model
        self.args = replace(args)
        self.modules = modules

    @property
    def alpha(self) -> float:
        """The annealing coefficient, the same in all blocks; setting it sets all."""
        return next(iter(self.modules.values())).alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        value = float(check_alpha(value))
        for module in self.modules.values():
            module.alpha = value

    def start_stats(self) -> dict[int, FiringStats]:
        """Count, from now on, what fires, by index of the block. Replaces earlier counts.

        Call it once the model's parameters are on their device.
        """
        for i, module in self.modules.items():
            weight = self.model.layers[i].feed_forward.w1.weight  # [F, D]
            width = weight.shape[1] if self.args.site == "residual" else weight.shape[0]
            module.stats = FiringStats(width, weight.device)
        return {i: module.stats for i, module in self.modules.items()}

    def stop_stats(self) -> None:
        for module in self.modules.values():
            module.stats = None

    def restore(self) -> None:
        """Give every patched part its own class back. The model is then as it was.

        Raises ConfigError, with nothing changed, where another wrapper has since
        changed the class of a part (FSDP2 does): restore before sharding.
        """
        parts = [_part(self.model.layers[i], self.args.site) for i in self.modules]
        for i, part in zip(self.modules, parts, strict=True):
            if not isinstance(part, _Patched) or type(part) is not _derived(
                part.patch, part.own_class
            ):
                raise ConfigError(
                    f"layers.{i} is now a {type(part).__name__}, which is not what the patch made"
                    " of it: restore before sharding or wrapping, or build the model anew"
                )
        for part in parts:
            part.__class__ = part.own_class
            del part.topk
        delattr(self.model, _ARGS_ATTRIBUTE)


def apply_topk(model: nn.Module, args: TopKArgs) -> TopKHandle:
    """Patch a built Lingua-shaped model with TopK; alpha starts at 0.

    Args:
        model: has `layers`, an nn.ModuleList of pre-norm blocks with the parts and the
            forward signature of Lingua's TransformerBlock. Patch it before sharding
            and compilation.
        args: copied; later changes to it have no effect.

    Returns:
        The handle. Applied again with equal arguments nothing changes, and the
        handle sees the existing state.

    Raises:
        ConfigError: arguments out of range; a model that is not recognised (the text
            names the missing part); a model already patched with other arguments.
            The model is unchanged then.
    """
    args = replace(args, layers=None if args.layers is None else list(args.layers))
    args.validate()
    existing = getattr(model, _ARGS_ATTRIBUTE, None)
    if existing is not None:
        return _existing_handle(model, existing, args)
    blocks = _blocks(model)
    chosen = args.topk_layers(len(blocks))
    for i in chosen:
        _check_block(blocks[i], f"layers.{i}")
    modules = {i: _patch_block(blocks[i], args) for i in chosen}
    setattr(model, _ARGS_ATTRIBUTE, args)
    logger.info("TopK: %s in layers %s", args, list(chosen))
    return TopKHandle(model, args, modules)


def topk_handle(model: nn.Module) -> TopKHandle | None:
    """The handle of a patched model (a copy or an unpickled one included), or None."""
    args = getattr(model, _ARGS_ATTRIBUTE, None)
    return None if args is None else _existing_handle(model, args, args)


def _existing_handle(model: nn.Module, existing: TopKArgs, wanted: TopKArgs) -> TopKHandle:
    if existing != wanted:
        raise ConfigError(
            f"this model already has TopK with {existing}, asked for {wanted}: call restore() on"
            " its handle first"
        )
    chosen = existing.topk_layers(len(model.layers))
    modules = {i: _part(model.layers[i], existing.site).topk for i in chosen}
    return TopKHandle(model, existing, modules)


def _patch_block(block: nn.Module, args: TopKArgs) -> TopK:
    part = _part(block, args.site)
    patch = _TopKBlock if args.site == "residual" else _TopKFeedForward
    part.topk = TopK(args.k, args.activation).train(part.training)
    part.__class__ = _derived(patch, type(part))
    return part.topk


def _part(block: nn.Module, site: str) -> nn.Module:
    return block if site == "residual" else block.feed_forward


def _blocks(model: nn.Module) -> nn.ModuleList:
    blocks = getattr(model, "layers", None)
    if not isinstance(blocks, nn.ModuleList):
        raise ConfigError(
            f"{type(model).__name__} has no `layers` of type nn.ModuleList: TopK can be applied to"
            " models shaped like Lingua's BaseTransformer"
        )
    return blocks


def _check_block(block: nn.Module, where: str) -> None:
    _require(block, _BLOCK_PARTS, where)
    _require(block.feed_forward, _FEED_FORWARD_PARTS, f"{where}.feed_forward")
    inputs = tuple(inspect.signature(type(block).forward).parameters)[1:]
    if inputs != _BLOCK_INPUTS:
        raise ConfigError(
            f"{where}.forward takes ({', '.join(inputs)}), not ({', '.join(_BLOCK_INPUTS)}) as"
            " Lingua's TransformerBlock does: it would not be the same block with TopK"
        )
    for name, part in ((where, block), (f"{where}.feed_forward", block.feed_forward)):
        if "forward" in vars(part) or isinstance(part, _Patched):
            raise ConfigError(f"{name} is already patched by something else: restore it first")


def _require(module: nn.Module, names: tuple[str, ...], where: str) -> None:
    missing = [name for name in names if not isinstance(getattr(module, name, None), nn.Module)]
    if missing:
        raise ConfigError(
            f"{where} ({type(module).__name__}) lacks {', '.join(missing)}: TopK can be applied to"
            " blocks shaped like Lingua's TransformerBlock"
        )
