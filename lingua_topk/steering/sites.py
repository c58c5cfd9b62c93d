"""Where in a model neurons can be turned: a host's model, or an exported one of transformers."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lingua_topk.errors import ConfigError
from lingua_topk.nn import TopK
from lingua_topk.steering.interventions import AddDirection, Intervention


@dataclass(frozen=True)
class Site:
    """Of one layer.

    Attributes:
        module: its output, [B, S, D], are the neurons' values.
        width: D, how many neurons there are.
        selects: whether the module is TopK, so that there is a before.
    """

    module: nn.Module
    width: int
    selects: bool


def steerable(model: nn.Module, dense: bool = False) -> dict[int, int]:
    """The layers whose neurons `steer` can turn, and how many each has.

    dense: as for `steer`. ConfigError for a model that is not known, or that has none.
    """
    return {layer: site.width for layer, site in sites_of(model, dense).items()}


def decoder_of(model: nn.Module) -> nn.Module:
    """The part of a model that has its blocks as `layers`. ConfigError for another model."""
    # A wrapper hides what it wraps: compiled, parallel, or transformers' language model head.
    for module in model.modules():
        if isinstance(vars(module)["_modules"].get("layers"), nn.ModuleList):
            return module
    raise ConfigError(
        f"{type(model).__name__} has no `layers`: give a model shaped like Lingua's, or one that"
        " was exported from it"
    )


def sites_of(model: nn.Module, dense: bool) -> dict[int, Site]:
    layers = decoder_of(model).layers
    if dense:
        return {i: Site(block, _widths(block)[1], False) for i, block in enumerate(layers)}
    found = {i: _topk_site(block) for i, block in enumerate(layers)}
    found = {i: site for i, site in found.items() if site is not None}
    if not found:
        raise ConfigError(
            "this model has no TopK layer: give one that has, or dense=True to turn components of"
            " the residual stream"
        )
    return found


def _topk_site(block: nn.Module) -> Site | None:
    feed_forward, width = _widths(block)
    for module in (getattr(block, "topk", None), getattr(feed_forward, "topk", None)):
        if isinstance(module, TopK):
            is_residual = module is getattr(block, "topk", None)
            return Site(module, width if is_residual else feed_forward.w1.out_features, True)
    # The module file of an exported folder is loaded under a name of its own, so that its class is
    # known by what it has.
    own, gate = getattr(block, "topk", None), getattr(feed_forward, "act_fn", None)
    if _is_exported_topk(own):
        return Site(own, width, True)
    if _is_exported_topk(gate):
        return Site(gate, feed_forward.gate_proj.out_features, True)
    return None


def _is_exported_topk(module: nn.Module | None) -> bool:
    return type(module).__name__ == "TopKLMTopK" and isinstance(module, nn.Module)


def _widths(block: nn.Module) -> tuple[nn.Module, int]:
    """The feed-forward of a block, and the width of the residual stream."""
    for feed_forward, gate in (("feed_forward", "w1"), ("mlp", "gate_proj")):
        part = getattr(block, feed_forward, None)
        if part is not None and hasattr(part, gate):
            return part, getattr(part, gate).in_features
    raise ConfigError(
        f"a {type(block).__name__} is no block that is known: give a model shaped like Lingua's, or"
        " one that was exported from it"
    )


def check_interventions(
    interventions: list[Intervention], sites: Mapping[int, Site], n_layers: int, dense: bool
) -> None:
    """ConfigError for the first that names what is not there."""
    for one in interventions:
        check_layer(one.layer, list(sites), n_layers)
        width = sites[one.layer].width
        if isinstance(one, AddDirection):
            if len(one.direction) != width:
                raise ConfigError(
                    f"direction has {len(one.direction)} numbers, where layer {one.layer} has"
                    f" {width} neurons: give as many"
                )
        else:
            for neuron in one.neurons:
                check_neuron(one.layer, neuron, width)
        if one.before_selection and dense:
            raise ConfigError(
                "before_selection=True: with dense=True nothing is selected: set one of them False"
            )


def check_layer(layer: int, allowed: list[int], n_layers: int) -> None:
    """ConfigError for a layer that is not there, or has no TopK."""
    if layer in allowed:
        return
    nearest = min(allowed, key=lambda one: abs(one - layer))
    if 0 <= layer < n_layers:
        raise ConfigError(
            f"layer={layer} is not a TopK layer: those are {_listed(allowed)}; the nearest is"
            f" {nearest}"
        )
    raise ConfigError(
        f"layer={layer} is not there: the model has 0 to {n_layers - 1}, with TopK"
        f" {_listed(allowed)}; the nearest is {nearest}"
    )


def check_neuron(layer: int, neuron: int, width: int) -> None:
    """ConfigError for a neuron that is not there."""
    if not 0 <= neuron < width:
        raise ConfigError(
            f"neuron={neuron} is not there: layer {layer} has 0 to {width - 1}; the nearest is"
            f" {min(max(neuron, 0), width - 1)}"
        )


def _listed(layers: list[int]) -> str:
    is_run = len(layers) > 2 and layers == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]} to {layers[-1]}" if is_run else ", ".join(map(str, layers))


def output_of(result: Tensor | tuple) -> Tensor:
    """The hidden states in what a block returns; older ones of transformers return a tuple."""
    return result[0] if isinstance(result, tuple) else result
