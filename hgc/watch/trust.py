"""Which code inside of models hgc knows, and so may skip, step through and give half of a batch.

Known is what torch, diffusers and peft ship, as they ship it: a class all of whose methods are in
their files, a module of such a class without hooks and without methods of its own, and diffusers'
attention processors. Hooks that move weights, accelerate's and diffusers', are known too. Anything
else may count its calls, keep what it sees or tell the rows of a batch apart. It is not looked
into: the run is left to diffusers.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import os
import sys
import types
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from diffusers.models import attention_processor as processors
from diffusers.models.attention_processor import Attention
from torch.nn.modules import module as all_modules

from hgc.models.attention import PLAIN_PROCESSORS, unwrapped
from hgc.models.structure import modules_inside
from hgc.models.supported import PACKAGES

__all__ = ["Trust", "hook_on_all_modules"]

# Other packages add methods of their own to all modules; of these a call is made.
_CALLED = ("__call__", "_wrapped_call_impl", "_call_impl", "forward", "__getattr__")
# Hooks that move weights or change their dtype, and nothing else.
_OFFLOADING = {
    "accelerate.hooks": ("AlignDevicesHook", "CpuOffload", "UserCpuOffloadHook"),
    "diffusers.hooks.group_offloading": (
        "GroupOffloadingHook", "LayerExecutionTrackerHook", "LazyPrefetchGroupOffloadingHook",
    ),
    "diffusers.hooks.layerwise_casting": ("LayerwiseCastingHook", "PeftInputAutocastDisableHook"),
}  # fmt: skip
# The files of diffusers with processors that keep nothing of what they see.
_PROCESSORS = (
    "attention_processor", "pipeline_text_to_video_zero", "pipeline_text_to_video_zero_sdxl",
)  # fmt: skip
# Processors of diffusers that treat each row of a batch by itself. That of perturbed-attention
# guidance does not: its batch has three parts.
_ROW_BY_ROW = (
    *PLAIN_PROCESSORS,
    processors.CustomDiffusionAttnProcessor,
    processors.CustomDiffusionAttnProcessor2_0,
    processors.IPAdapterAttnProcessor,
    processors.IPAdapterAttnProcessor2_0,
)


class Trust:
    """Whether all code inside of a UNet and its ControlNets is known.

    Args:
        models: The UNet and the ControlNets. What stands before a model (hooks on it, a forward
            put in its place) is called in any case.
        in_part: Modules of which a plan runs only some layers, so that nothing may stand before
            them, hooks that move weights neither.
        vouched: Classes of modules and processors, and functions that are processors, of which the
            caller says that they may be skipped and treat each row of a batch by itself.

    Raises:
        TypeError: ``vouched`` is no tuple of classes and functions.
    """

    def __init__(
        self,
        models: Sequence[torch.nn.Module],
        in_part: Collection[torch.nn.Module] = (),
        vouched: tuple[Any, ...] = (),
    ) -> None:
        if not isinstance(vouched, tuple) or not all(
            isinstance(each, (type, types.FunctionType)) for each in vouched
        ):
            raise TypeError(
                "trust must be a tuple of classes of modules or processors, or of functions that "
                f"are processors; got {vouched!r}"
            )
        self._models = tuple(models)
        self._in_part = {id(module) for module in in_part}
        self._vouched = frozenset(vouched)
        # of each class that was looked at: what it held then, and what is not known in it
        self._checked: dict[type, tuple[list[Any], str]] = {}
        # of each class of modules: what a module has of its own that is looked at: methods, which
        # none may have anew, and its processor
        self._watched: dict[type, frozenset[str]] = {}

    def stranger(self) -> str:
        """What is not known in the models now, and where; "" where everything is."""
        hook = hook_on_all_modules()
        if hook:
            return f"a hook on all modules is in place ({hook})"
        classes: dict[type, str] = {}  # of this walk: what is not known in each
        known = self._watched
        for model in self._models:
            for module in (model, *modules_inside(model)):
                cls, own = type(module), module.__dict__
                unknown = classes.get(cls)
                if unknown is None:
                    unknown = classes[cls] = self._unknown_in(cls)
                if (
                    unknown
                    or not known[cls].isdisjoint(own)
                    or own["_forward_hooks"]
                    or own["_forward_pre_hooks"]
                ):
                    found = self._of_module(module, model, classes)
                    if found:
                        return found
        return ""

    def _of_module(self, module: Any, model: Any, classes: dict[type, str]) -> str:
        cls, own = type(module), module.__dict__
        processor = unwrapped(own.get("processor"))
        if processor is not None:
            found = self._of_processor(processor, classes)
            if found:
                return f"{found}, the processor of {_place(module, model)}"
        if cls in self._vouched:
            return ""
        if classes[cls]:
            return f"{_place(module, model)} is not known: {classes[cls]}"
        if module is not model and (own["_forward_hooks"] or own["_forward_pre_hooks"]):
            return f"a hook is in place on {_place(module, model)}"
        for name in self._watched[cls].intersection(own).difference(("processor",)):
            value = own[name]
            put_back = getattr(value, "__self__", None) is module
            if put_back and value.__func__ is getattr(cls, name, None):
                continue
            if module is model and type(value).__module__.startswith("hgc."):
                continue
            if cls.__module__ == "torch._dynamo.eval_frame":  # what torch.compile returned
                continue
            if name != "forward" or not _moves_weights(module):
                if module is model and name in ("forward", "_old_forward"):
                    continue  # it stands before hgc, and calls it
                return f"{name} of {_place(module, model)} was replaced"
            if id(module) in self._in_part:
                return f"a hook is in place on {_place(module, model)}, which is run in part"
        return ""

    def _of_processor(self, processor: Any, classes: dict[type, str]) -> str:
        """What is not known of a processor; or ""."""
        if self._vouches(processor):
            return ""
        cls = type(processor)
        if cls is types.FunctionType:
            return f"{processor.__qualname__} is not known"
        if cls not in classes:
            classes[cls] = self._unknown_in(cls)
        unknown = classes[cls]
        if not unknown and cls.__module__.rpartition(".")[2] not in _PROCESSORS:
            unknown = f"its class is of {cls.__module__}"
        return f"{cls.__qualname__} is not known: {unknown}" if unknown else ""

    def _unknown_in(self, cls: type) -> str:
        """What is not known in ``cls`` and in what it derives from, as they are now; or ""."""
        unknown, changed = "", cls not in self._watched
        for each in cls.__mro__[:-1]:
            held, known = vars(each), self._checked.get(each)
            if known is None or not (
                len(held) == len(known[0]) and all(map(operator.is_, held.values(), known[0]))
            ):
                known = self._checked[each] = ([*held.values()], _not_shipped(each))
                changed = True
            unknown = unknown or known[1]
        if changed:
            methods = (
                name
                for each in cls.__mro__[:-1]
                for name, value in vars(each).items()
                if isinstance(value, types.FunctionType)
            )
            self._watched[cls] = frozenset(("processor", *methods))
        return unknown

    def knows(self, processor: Any) -> bool:
        """Whether a processor is known."""
        return not self._of_processor(unwrapped(processor), {})

    def treats_rows_alike(self, processor: Any) -> bool:
        """Whether a processor is known to treat each row of a batch by itself."""
        processor = unwrapped(processor)
        return type(processor) in _ROW_BY_ROW or self._vouches(processor)

    def vouches_around_attention(self) -> bool:
        """Whether the text of a model passes through a module that was vouched for, which is to be
        given a tensor."""
        return bool(self._vouched) and any(
            type(module) in self._vouched
            and any(isinstance(inner, Attention) for inner in (module, *modules_inside(module)))
            for model in self._models
            for module in modules_inside(model)
        )

    def _vouches(self, processor: Any) -> bool:
        if isinstance(processor, types.FunctionType):
            return processor in self._vouched
        return type(processor) in self._vouched


def _place(module: Any, model: Any) -> str:
    """Where ``module`` is in ``model``, for a message."""
    name = next(name for name, each in model.named_modules() if each is module)
    kind = type(model).__name__
    return f"{name} ({type(module).__name__}) in the {kind}" if name else f"the {kind}"


def _moves_weights(module: Any) -> bool:
    """Whether what replaced the forward of ``module`` are hooks that move its weights."""
    hook: Any = getattr(module, "_hf_hook", None)
    hooks: list[Any] = [*hook.hooks] if type(hook).__name__ == "SequentialHook" else [hook]
    registry = getattr(module, "_diffusers_hook", None)
    hooks += [] if registry is None else registry.hooks.values()
    hooks = [hook for hook in hooks if hook is not None]
    return bool(hooks) and all(
        type(hook).__name__ in _OFFLOADING.get(type(hook).__module__, ()) for hook in hooks
    )


@functools.cache
def _folder(package: str) -> str:
    return os.path.dirname(sys.modules[package].__file__ or "") + os.sep


def hook_on_all_modules() -> str:
    """The function that registered one that is not shipped; "" where there is none."""
    for kind in ("forward_hook", "forward_pre_hook"):
        hooks = getattr(all_modules, f"_global_{kind}s")
        if not all(map(_is_shipped, hooks.values())):  # torch's own count work
            return f"register_module_{kind}"
    return ""


def _is_shipped(function: Any) -> bool:
    """Whether a function or a method is in a file of a known package."""
    function = getattr(function, "__func__", function)
    if not isinstance(function, types.FunctionType):
        return False
    name = function.__code__.co_filename
    if any(name.startswith(_folder(each)) for each in PACKAGES if each in sys.modules):
        return True
    # around methods of theirs: `contextmanager`, and a decorator that checks the names of files
    decorated = name == contextlib.__file__ or name.startswith(_folder("huggingface_hub"))
    return decorated and _is_shipped(getattr(function, "__wrapped__", None))


def _functions(value: Any) -> Iterator[Any]:
    """The functions in an attribute of a class, and what else in it can be called."""
    if isinstance(value, (staticmethod, classmethod, types.MethodType)):
        yield from _functions(value.__func__)
    elif isinstance(value, property):
        for each in (value.fget, value.fset, value.fdel):
            yield from _functions(each)
    elif isinstance(value, types.FunctionType) or (
        callable(value)
        and not isinstance(value, type)
        and type(value).__module__ not in ("builtins", "types")
    ):
        yield value


def _not_shipped(cls: type) -> str:
    """What ``cls`` itself, not what it derives from, defines that its package does not ship."""
    package = cls.__module__.partition(".")[0]
    if package in sys.stdlib_module_names:
        return ""
    for name, value in vars(cls).items():
        if cls is torch.nn.Module and name not in _CALLED:
            continue
        for function in _functions(value):
            if package not in PACKAGES:
                # a class of one's own that adds no code to one that is known is that one
                if name != "__init__":
                    return f"its class is of {cls.__module__}"
            elif not _is_shipped(function) or (
                # another one that is shipped
                name in ("forward", "__call__")
                and package == "diffusers"
                and function.__qualname__ != f"{cls.__qualname__}.{name}"
            ):
                return f"{cls.__qualname__}.{name} was replaced"
    return ""
