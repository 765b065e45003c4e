"""What stands in the slots of a patched model, and how it comes off again."""

from __future__ import annotations

import contextlib
import functools
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from hgc.watch.adapters import Notice

__all__ = ["Patch", "PatchedModels", "owner_of"]

_MARK = "_hgc_installation"

# torch's own namespaces are large: a look-up in one misses the processor's caches
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_is_exporting = torch.compiler.is_exporting


class _Passing(threading.local):
    calls = 0


class Patch:
    """Stands in a module's ``forward`` slot while hgc is installed.

    run: Takes the module and the arguments of a call.
    """

    def __init__(self, module: torch.nn.Module, run: Callable[..., Any]) -> None:
        self.module = module
        self.slot = "_old_forward" if hasattr(module, "_hf_hook") else "forward"
        self.had_own = self.slot in module.__dict__
        self._replaced = getattr(module, self.slot)
        self._run = run
        self._passing = _Passing()
        functools.update_wrapper(self, self._replaced)
        setattr(module, self.slot, self)

    @property
    def original(self) -> Callable[..., Any]:
        """What this stands in the place of: where that is the class's, what it is now."""
        return self._replaced if self.had_own else _class_forward(self.module)

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """Calls of the module by this thread go to the original, through the hooks before it."""
        self._passing.calls += 1
        try:
            yield
        finally:
            self._passing.calls -= 1

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _is_dynamo_compiling():
            _refuse_tracing(type(self.module).__name__)
        if self._passing.calls:
            return self.original(*args, **kwargs)
        if _is_exporting():
            raise TypeError(
                f"{type(self.module).__name__}: hgc is installed on it, and an export would trace "
                "its bookkeeping: uninstall hgc first"
            )
        return self._run(self.module, *args, **kwargs)

    @property
    def __code__(self) -> Any:
        # torch.export reads it before it calls
        return self.original.__code__

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # a copied model is an uninstalled one
        return _class_forward(memo.get(id(self.module), self.module))

    def __reduce__(self) -> Any:
        return (_class_forward, (self.module,))

    def place(self) -> str:
        """The slot that holds this object; raises RuntimeError where none does."""
        for slot in (self.slot, "forward", "_old_forward"):
            if self.module.__dict__.get(slot) is self:
                return slot
        raise RuntimeError(
            f"{type(self.module).__name__}.forward was replaced by something else after hgc was "
            "installed: undo that first, then uninstall hgc"
        )

    def restore(self) -> None:
        """Put back what was there."""
        slot = self.place()
        # in `forward` in place of `_old_forward`: the hook was removed meanwhile, and moved us here
        if slot == "_old_forward" or (slot == self.slot and self.had_own):
            setattr(self.module, slot, self.original)
        else:
            delattr(self.module, slot)


_TRACED = (
    "hgc is installed on a model that was compiled afterwards, which would trace its bookkeeping: "
    "call .compile() of the Installation that hgc.install returned instead"
)


@functools.partial(torch.compiler.disable, reason=_TRACED)  # called from the graph: not traced
def _refuse_tracing(name: str) -> None:
    raise TypeError(f"{name}: {_TRACED}")


def _class_forward(module: torch.nn.Module) -> Any:
    return types.MethodType(type(module).forward, module)


class _EndOfCall:
    """``_reset_stateful_cache``: diffusers calls it at the end of a pipeline call."""

    def __init__(self, end: Callable[[], None]) -> None:
        self._end = end

    def __call__(self) -> None:
        self._end()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _nothing

    def __reduce__(self) -> Any:
        return (_do_nothing, ())


def _nothing() -> None:
    """Stands for :class:`_EndOfCall` in a copied model."""


def _do_nothing() -> Callable[[], None]:
    return _nothing


class _Mark:
    """Says on a module who has patched it; not copied with it."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> Any:
        return (type(None), ())


def owner_of(module: Any) -> Any:
    """Who has patched ``module``; None where nobody has."""
    mark = getattr(module, "__dict__", {}).get(_MARK)
    return None if mark is None else mark.owner


class PatchedModels:
    """A UNet and its ControlNets whose calls go to hgc.

    Args:
        owner: What :func:`owner_of` returns of them.
        calls: Of each model, the UNet first: what takes its calls.
        noticed: What to do where a method of ``Notice.METHODS`` was called, by its name.
        end: What to do at the end of a pipeline call.
    """

    def __init__(
        self,
        owner: Any,
        calls: list[tuple[Any, Callable[..., Any]]],
        noticed: Callable[[str], Callable[[], None]],
        end: Callable[[], None],
    ) -> None:
        self._unet = calls[0][0]
        self._of: dict[int, Patch] = {}
        for module, run in calls:
            setattr(module, _MARK, _Mark(owner))
            self._of[id(module)] = Patch(module, run)
            for name in Notice.METHODS:
                if hasattr(type(module), name) and name not in module.__dict__:
                    setattr(module, name, Notice(module, name, noticed(name)))
        self._unet._reset_stateful_cache = _EndOfCall(end)

    def of(self, module: Any) -> Patch:
        """What stands in the slot of ``module``."""
        return self._of[id(module)]

    def remove(self) -> None:
        """Give the models back as they were found.

        Raises RuntimeError, and removes nothing, where a forward was replaced since.
        """
        for patch in self._of.values():
            patch.place()
        for patch in self._of.values():
            patch.restore()
        for patch in self._of.values():
            module = patch.module
            module.__dict__.pop(_MARK, None)
            for name in Notice.METHODS:
                if isinstance(module.__dict__.get(name), Notice):
                    delattr(module, name)
        self._unet.__dict__.pop("_reset_stateful_cache", None)
