"""Adapters (LoRA and others of peft's) on the models, and settings of attention processors."""

from __future__ import annotations

import contextlib
import functools
import itertools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from diffusers.utils import USE_PEFT_BACKEND, scale_lora_layers, unscale_lora_layers

from hgc.models.structure import adapter_state

__all__ = ["Adapters", "Notice", "lora_scaled", "scales_lora", "take_lora_scale"]


class Adapters:
    """What adapters add to models now.

    Attributes:
        rewritten: How often weights were written to where no tensor's version shows it.
        processors: Attention processors that have settings, which count as well.
    """

    def __init__(self, models: Sequence[torch.nn.Module]) -> None:
        self._models = models
        self._known: dict[int, tuple[Any, list[torch.nn.Module]]] = {}
        self._none = False  # as far as known
        self.rewritten = 0
        self.processors: list[Any] = []

    def collect(self) -> None:
        """Look for adapters anew."""
        for model in self._models:
            config = model.__dict__.get("peft_config")
            self._known[id(model)] = (config and tuple(config.values()), _layers(model))
        found = any(config is not None for config, _ in self._known.values())
        self._none = not found and not self.processors

    def set_processors(self, processors: Sequence[Any]) -> None:
        """Take note of the attention processors that are in place."""
        self.processors = [each for each in processors if _settings(each)]
        self._none = self._none and not self.processors

    def state(self, model: torch.nn.Module) -> Any:
        """What adapters add to ``model`` now, and the settings of processors that have some."""
        if self._none and "peft_config" not in model.__dict__:
            return self.rewritten
        config = model.__dict__.get("peft_config")
        known, layers = self._known.get(id(model), (None, []))
        if config is None and known is None and not self.processors:
            return self.rewritten
        now = config and tuple(config.values())
        if (now is None) != (known is None) or any(
            a is not b for a, b in itertools.zip_longest(now or (), known or ())
        ):
            self.collect()
            _, layers = self._known[id(model)]
        settings = [_settings(processor) for processor in self.processors]
        return (*_state(model, layers), self.rewritten, settings)


def _layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    if model.__dict__.get("peft_config") is None:
        return []
    # every kind of peft's adapters, not LoRA alone; the model has a method of that name
    return [m for m in model.modules() if m is not model and hasattr(m, "active_adapters")]


def _state(model: torch.nn.Module, layers: list[Any]) -> tuple[Any, ...]:
    """Adapters of ``model``, which of them are active, their scales."""
    config: Any = model.__dict__.get("peft_config")
    if config is None:
        return ()
    return (
        # the configs themselves: another adapter may come under the same name
        tuple(config),
        tuple(config.values()),
        tuple(map(adapter_state, layers)),
    )


_MODULE_ATTRIBUTES = frozenset(vars(torch.nn.Module()))


def _settings(processor: Any) -> dict[str, Any]:
    """What is set on an attention processor, as it is now."""
    return {
        name: [*value] if isinstance(value, list) else value
        for name, value in getattr(processor, "__dict__", {}).items()
        if name not in _MODULE_ATTRIBUTES
    }


def take_lora_scale(arguments: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """``arguments`` without the LoRA scale, which diffusers' forwards take out of
    ``cross_attention_kwargs``."""
    cross = arguments["cross_attention_kwargs"]
    if cross is None:
        return arguments, 1.0
    rest = dict(cross)
    scale = rest.pop("scale", 1.0)
    return {**arguments, "cross_attention_kwargs": rest}, scale


def scales_lora(net: torch.nn.Module) -> bool:
    """Whether the forward of a ControlNet scales its LoRA layers: it is then in a decorator. Those
    of ControlNet-Union, and of diffusers before 0.37, hand the scale on to the attentions."""
    return hasattr(type(net).forward, "__wrapped__")


def lora_scaled(model: torch.nn.Module, scale: float) -> contextlib.AbstractContextManager[None]:
    """What diffusers' ``apply_lora_scale`` does around a forward."""
    if not USE_PEFT_BACKEND or scale == 1.0:
        return _NO_SCALE
    return _scaled_lora(model, scale)


_NO_SCALE = contextlib.nullcontext()


@contextlib.contextmanager
def _scaled_lora(model: torch.nn.Module, scale: float) -> Iterator[None]:
    scale_lora_layers(model, scale)
    try:
        yield
    finally:
        unscale_lora_layers(model, scale)


class Notice:
    """Stands for a method of a model that writes to its weights where no tensor's version shows
    it: peft fuses a LoRA, and swaps one for another (``hotswap=True``), through ``.data``; and it
    may be unloaded before the next evaluation. And for ``set_attn_processor``: an evaluation looks
    at the processors of the layers that it computes, and after this at all.

    noticed: Is called where the method was.
    """

    METHODS = ("fuse_lora", "unfuse_lora", "load_lora_adapter", "set_attn_processor")

    def __init__(self, module: torch.nn.Module, name: str, noticed: Callable[[], None]) -> None:
        self.module = module
        self.name = name
        self._noticed = noticed
        functools.update_wrapper(self, getattr(module, name))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return class_method(self.module, self.name)(*args, **kwargs)
        finally:
            self._noticed()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return class_method(memo.get(id(self.module), self.module), self.name)

    def __reduce__(self) -> Any:
        return (class_method, (self.module, self.name))


def class_method(module: torch.nn.Module, name: str) -> Any:
    """The method that the class of ``module`` has."""
    return types.MethodType(getattr(type(module), name), module)
