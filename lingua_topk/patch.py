"""Put TopK into a model that is already built, and take it out again.

A patched block is the same object with a class derived from its own, so parameters,
hooks and `isinstance` stay as they are, and FSDP2 (which does the same) and
`torch.compile` go on top. The derived class adds one child, `topk`, which owns neither
parameters nor buffers: state-dict keys and shapes do not change.
"""

import inspect
import logging
from collections import Counter
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
_FEED_FORWARD_INPUTS = ("x",)


class _Patched:
    """What the derived classes share: copies and pickles are rebuilt from the own class."""

    _topk_patch: "type[_Patched]"
    _topk_own_class: type[nn.Module]

    def __reduce_ex__(self, protocol):
        # The class is made at run time and has no name to be found by; the rest is as usual.
        _, _, *state = super().__reduce_ex__(max(protocol, 2))
        return _blank, (self._topk_patch, self._topk_own_class), *state


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
    names = {"_topk_patch": patch, "_topk_own_class": own_class}
    return type(f"TopK{own_class.__name__}", (patch, own_class), names)


def _blank(patch: type[_Patched], own_class: type[nn.Module]) -> nn.Module:
    derived = _derived(patch, own_class)
    return derived.__new__(derived)


class TopKHandle:
    """The TopK of one model. A light view: any number of handles see the same state.

    Attributes:
        model: the patched model.
        args: a copy of the arguments it was patched with.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._marker = vars(model)[_ARGS_ATTRIBUTE]
        self.args = _copied(self._marker)

    @property
    def modules(self) -> dict[int, TopK]:
        """The TopK module of each patched block, by index of the block.

        ConfigError once the model has been restored: what would be set there no longer
        has an effect.
        """
        if vars(self.model).get(_ARGS_ATTRIBUTE) is not self._marker:
            raise ConfigError(
                "the TopK of this handle has been taken out of the model: use the handle that"
                " apply_topk() or topk_handle() gives now"
            )
        parts = {i: _part(block, self.args.site) for i, block in enumerate(self.model.layers)}
        found = {i: getattr(part, "topk", None) for i, part in parts.items()}
        return {i: module for i, module in found.items() if isinstance(module, TopK)}

    @property
    def alpha(self) -> float:
        """The annealing coefficient, the same in all blocks; setting it sets all.

        ConfigError outside [0, 1], with nothing changed.
        """
        return next(iter(self.modules.values())).alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        value = float(check_alpha(value))
        for module in self.modules.values():
            module.alpha = value

    def start_stats(self) -> dict[int, FiringStats]:
        """Count, from now on, what fires, by index of the block. Replaces earlier counts.

        Call it once the model's parameters are on their device: ConfigError on meta.
        """
        started = {}
        for i, module in self.modules.items():
            weight = self.model.layers[i].feed_forward.w1.weight  # [F, D]
            if weight.is_meta:
                raise ConfigError(
                    f"layers.{i} is still on the meta device, where nothing can be counted: call"
                    " start_stats() after to_empty()"
                )
            width = weight.shape[1] if self.args.site == "residual" else weight.shape[0]
            started[i] = module.stats = FiringStats(width, weight.device)
        return started

    def stop_stats(self) -> None:
        for module in self.modules.values():
            module.stats = None

    def restore(self) -> None:
        """Give every patched part its own class back. The model is then as it was.

        Raises ConfigError, with nothing changed, where another wrapper has since
        changed the class of a part (FSDP2 does): restore before sharding. The same
        where the TopK of this handle has been taken out already.
        """
        parts = {i: _part(self.model.layers[i], self.args.site) for i in self.modules}
        for i, part in parts.items():
            if not isinstance(part, _Patched) or type(part) is not _derived(
                part._topk_patch, part._topk_own_class
            ):
                raise ConfigError(
                    f"layers.{i} is now a {type(part).__name__}, which is not what the patch made"
                    " of it: restore before sharding or wrapping, or build the model anew"
                )
        for part in parts.values():
            _restore_part(part)
        delattr(self.model, _ARGS_ATTRIBUTE)


def apply_topk(model: nn.Module, args: TopKArgs) -> TopKHandle:
    """Patch a built Lingua-shaped model with TopK; alpha starts at 0.

    Args:
        model: has `layers`, an nn.ModuleList of pre-norm blocks with the parts and the
            forward signature of Lingua's TransformerBlock. Patch it before sharding,
            wrapping and compilation.
        args: copied; later changes to it have no effect.

    Returns:
        The handle. Applied again with equal arguments nothing changes, and the
        handle sees the existing state.

    Raises:
        ConfigError: arguments out of range; a model that is not recognised (the text
            names the missing part); a model already patched with other arguments.
            The model is unchanged then, as it is after any other exception.
    """
    args.validate()
    args = _copied(args)
    existing = topk_handle(model)
    if existing is not None:
        if existing.args != args:
            raise ConfigError(
                f"this model already has TopK with {existing.args}, asked for {args}: call"
                " restore() on its handle first"
            )
        return existing
    blocks = _blocks(model)
    chosen = args.topk_layers(len(blocks))
    for i in chosen:
        _check_block(blocks[i], f"layers.{i}", args.site)
    parts = [_part(block, args.site) for block in blocks]
    _check_distinct(parts, chosen)
    _patch_parts([parts[i] for i in chosen], args)
    setattr(model, _ARGS_ATTRIBUTE, args)
    logger.info("TopK: %s in layers %s", args, list(chosen))
    return TopKHandle(model)


def topk_handle(model: nn.Module) -> TopKHandle | None:
    """The handle of a patched model, or None.

    `model` can be a copy or an unpickled one, or stand inside a wrapper: sharded,
    compiled, or with activation checkpointing. ConfigError for a module that holds
    several patched models.
    """
    patched = [module for module in model.modules() if _ARGS_ATTRIBUTE in vars(module)]
    if len(patched) > 1:
        raise ConfigError(
            f"{type(model).__name__} holds {len(patched)} models with TopK: ask for the handle of"
            " each of them"
        )
    return TopKHandle(patched[0]) if patched else None


def _copied(args: TopKArgs) -> TopKArgs:
    """A copy of its own; `layers` sorted, so that equal sets are equal."""
    return replace(args, layers=None if args.layers is None else sorted(args.layers))


def _patch_parts(parts: list[nn.Module], args: TopKArgs) -> None:
    """Patch all of them or, if one fails, none."""
    patch = _TopKBlock if args.site == "residual" else _TopKFeedForward
    try:
        for part in parts:
            derived = _derived(patch, type(part))
            topk = TopK(args.k, args.activation, anneals_k=args.annealed == "k")
            part.topk = topk.train(part.training)
            part.__class__ = derived
    except BaseException:
        for part in parts:
            _restore_part(part)
        raise


def _restore_part(part: nn.Module) -> None:
    if isinstance(part, _Patched):
        part.__class__ = part._topk_own_class
    if hasattr(part, "topk"):
        del part.topk


def _part(block: nn.Module, site: str) -> nn.Module:
    # A block that was not chosen may be of any kind, and have no feed_forward.
    return block if site == "residual" else getattr(block, "feed_forward", block)


def _blocks(model: nn.Module) -> nn.ModuleList:
    # Its own child, not one that a wrapper passes on.
    blocks = vars(model)["_modules"].get("layers")
    if not isinstance(blocks, nn.ModuleList):
        raise ConfigError(
            f"{type(model).__name__} has no `layers` of type nn.ModuleList: TopK can be applied to"
            " models shaped like Lingua's BaseTransformer, before they are wrapped"
        )
    return blocks


def _check_block(block: nn.Module, where: str, site: str) -> None:
    _require(block, _BLOCK_PARTS, where)
    _require(block.feed_forward, _FEED_FORWARD_PARTS, f"{where}.feed_forward")
    for name, part in ((where, block), (f"{where}.feed_forward", block.feed_forward)):
        if "forward" in vars(part) or isinstance(part, _Patched):
            raise ConfigError(f"{name} is already patched by something else: restore it first")
    if site == "residual":
        _check_own(block, _BLOCK_INPUTS, where)
    else:
        _check_own(block.feed_forward, _FEED_FORWARD_INPUTS, f"{where}.feed_forward")


def _check_own(part: nn.Module, expected: tuple[str, ...], where: str) -> None:
    """Whether `part`, whose forward is to be replaced, could do the same with TopK."""
    inputs = tuple(inspect.signature(type(part).forward).parameters)[1:]
    if inputs != expected:
        raise ConfigError(
            f"{where}.forward takes ({', '.join(inputs)}), not ({', '.join(expected)}) as Lingua's"
            " does: it would not be the same module with TopK"
        )
    if hasattr(part, "topk"):
        raise ConfigError(
            f"{where} ({type(part).__name__}) already has an attribute `topk`, which is where TopK"
            " is to go: rename it"
        )


def _check_distinct(parts: list[nn.Module], chosen: tuple[int, ...]) -> None:
    uses = Counter(id(part) for part in parts)
    shared = [i for i in chosen if uses[id(parts[i])] > 1]
    if shared:
        kind = type(parts[shared[0]]).__name__
        raise ConfigError(
            f"layers {shared} share the module that TopK goes into, a {kind}, with other layers:"
            " give each layer its own"
        )


def _require(module: nn.Module, names: tuple[str, ...], where: str) -> None:
    missing = [name for name in names if not isinstance(getattr(module, name, None), nn.Module)]
    if missing:
        raise ConfigError(
            f"{where} ({type(module).__name__}) lacks {', '.join(missing)}: TopK can be applied to"
            " blocks shaped like Lingua's TransformerBlock"
        )
