"""The context in which a model is steered."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lingua_topk.errors import ConfigError
from lingua_topk.ops.definition import wide_sum
from lingua_topk.steering.interventions import Intervention
from lingua_topk.steering.places import current
from lingua_topk.steering.sharing import shared
from lingua_topk.steering.sites import Site, check_interventions, decoder_of, output_of, sites_of
from lingua_topk.steering.telling import telling_places


@contextmanager
def steer(
    model: nn.Module, interventions: Iterable[Intervention], dense: bool = False
) -> Iterator[None]:
    """Within it the model's neurons are turned; behind it all is as before, whatever happened.

    Holds for every way to run the model: plain forward passes, `apps.topk.generation.Generator`,
    and, of an exported model, transformers' `generate`, with and without cached keys and values,
    padded or not. Contexts can be nested; interventions act in the order given, inner contexts
    after outer ones. The model is steered for all threads that use it; a copy that is made
    within stays steered. What torch.compile has compiled runs uncompiled within, in all models:
    it would not see what steers.

    A backward pass belongs within, too: activation checkpointing runs blocks again there, where
    no `where` but "all" can be told.

    Args:
        model: a host's with TopK, or an exported one; it may stand inside a wrapper. For
            transformers' `generate` without a cache not its decoder alone, which is not told
            where the prompt ends.
        interventions: on any neurons of any TopK layers.
        dense: the neurons are the components of what a block returns, TopK or not. For models
            without TopK, such as the vanilla twin.

    Raises: ConfigError for a layer or neuron that is not there, or a layer without TopK; the
    model is not touched then. While it runs, for a `where` that a forward pass cannot tell.
    """
    interventions = _listed(interventions)
    sites = sites_of(model, dense)
    check_interventions(interventions, sites, len(decoder_of(model).layers), dense)
    with ExitStack() as undo:
        for layer in sorted({one.layer for one in interventions}):
            here = [one for one in interventions if one.layer == layer]
            for handle in _hooked(sites[layer], here):
                undo.callback(handle.remove)
        if any(not isinstance(one.where, str) or one.where != "all" for one in interventions):
            undo.enter_context(telling_places(model))
        if interventions and "torch._dynamo" in sys.modules:  # otherwise nothing is compiled
            undo.enter_context(
                shared("uncompiled", lambda: torch.compiler.set_stance("force_eager"))
            )
        yield


def _listed(interventions: Iterable[Intervention]) -> list[Intervention]:
    is_several = isinstance(interventions, Iterable)
    listed = list(interventions) if is_several else [interventions]
    wrong = [one for one in listed if not (is_several and isinstance(one, Intervention))]
    if wrong:
        raise ConfigError(
            f"interventions: got {type(wrong[0]).__name__}, which is no list of them: give for"
            " example [Add(layer=3, neuron=417, delta=8.0)]"
        )
    return listed


def _hooked(site: Site, interventions: list[Intervention]) -> Iterator[Any]:
    """The handles of the hooks of one layer."""
    before = [one for one in interventions if one.before_selection]
    after = [one for one in interventions if not one.before_selection]
    if before:
        yield site.module.register_forward_pre_hook(partial(_edit_input, before))
    if after:
        yield site.module.register_forward_hook(partial(_edit_output, after))


def _edit_input(interventions: list[Intervention], module: nn.Module, inputs: tuple) -> tuple:
    """The input of TopK: the residual stream, with what is added to it, as it is selected on."""
    h, update, *_ = *inputs, None
    if update is None:
        return _edited(h, interventions), *inputs[1:]
    x = _edited(wide_sum(h, update), interventions)
    return x, None, torch.promote_types(h.dtype, update.dtype)


def _edit_output(
    interventions: list[Intervention], module: nn.Module, inputs: tuple, output: Tensor | tuple
) -> Tensor | tuple:
    y = _edited(output_of(output), interventions)
    return (y, *output[1:]) if isinstance(output, tuple) else y


def _edited(x: Tensor, interventions: list[Intervention]) -> Tensor:
    for one in interventions:
        x = one.applied(x, current())
    return x
