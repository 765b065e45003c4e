"""Other caches: their published schedules as plans of hgc's executor, and the packages themselves.

A schedule compares method with method. Each is what the method's authors run by default, in the
terms of :class:`hgc.Config`. The engine, the scheduler and the counting are the same for all rows,
so what differs is the schedule.

- DeepCache (arXiv 2312.00858): everything every ``N`` evaluations, the outermost decoder layer
  between them. Its ControlNet runs at every evaluation: it knows none to skip.
- Faster Diffusion (arXiv 2312.09608): the encoder and the ControlNet at evaluations 0, 1, 2, 3, 5,
  10, 15, 25 and 35 of 50, the decoder at all of them; in other runs at the same shares of the run.
- T-GATE (arXiv 2404.02747): after evaluation 10 of 25 the cross-attention is not computed again and
  guidance ends. The kept cross-attention is the conditional half's, where T-GATE averages both.

- "skip-x0" needs no cache of features: between key steps neither network is run, and the output is
  what x0 on a line in the log-SNR says (Config's `depth=0`). With 8, 7, 6 and 5 key steps of 20.

The same evaluations, made by a plain pipeline and nothing between them, are the rows "8-steps@grid"
and so on: see :func:`grid`.

Of the packages DeepCache 0.1.1 runs with a ControlNet: the rows "deepcache-pypi-N", with the extra
``peers``. T-GATE 1.0.0 has no ControlNet pipeline: its row is refused with that reason.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from hgc.config import Config, ConfigError, StepPlan

if TYPE_CHECKING:
    from hgc.evaluation.models import ModelShapes
    from hgc.macs import Macs

__all__ = [
    "PACKAGES",
    "PEERS",
    "SKIPS",
    "grid",
    "installed_package",
    "method_of",
    "package_macs",
    "package_row",
    "peer",
]

# The rows that "peers" stands for.
PEERS = ("deepcache-2", "deepcache-3", "deepcache-5", "faster-diffusion", "t-gate")

# Where evaluations of a run of 20 do most, by how many are made.
_PLACES = {
    8: (0, 2, 4, 7, 10, 13, 16, 19),
    7: (0, 2, 5, 8, 11, 15, 19),
    6: (0, 3, 7, 11, 16, 19),
    5: (0, 4, 9, 14, 19),
}
# The rows that "skip-x0" stands for.
SKIPS = tuple(f"skip-x0-{count}" for count in _PLACES)
_SKIP = re.compile(r"skip-x0-(\d+)")

_DEEPCACHE = re.compile(r"deepcache-(\d+)")
_ENCODER_KEYS = (0, 1, 2, 3, 5, 10, 15, 25, 35)
_ENCODER_REFERENCE = 50
_GATE = 10 / 25
# Rows of the packages themselves, as PyPI has them.
PACKAGES = ("deepcache-pypi-3",)
_PACKAGE = re.compile(r"deepcache-pypi-([2-9]|[1-9]\d+)")


def peer(name: str, steps: int, layers: int = 12) -> Config | None:
    """The schedule called ``name`` for a run of ``steps`` evaluations; None: no peer has that name.

    name: "deepcache-N" with an interval of at least 2, "faster-diffusion", "t-gate", or "skip-x0-N"
        with N key steps of 20, and that share of them in a longer run.
    layers: all decoder layers of the UNet; SD1.5 has 12.
    """
    interval = _DEEPCACHE.fullmatch(name)
    if interval and int(interval.group(1)) > 1:
        return Config(
            name=name,
            num_evaluations=steps,
            key_steps=tuple(range(0, steps, int(interval.group(1)))),
            control="compute",
        )
    skip = _SKIP.fullmatch(name)
    if skip and 1 < int(skip.group(1)) <= 20:
        keys = grid(int(skip.group(1)), 20)
        return Config(name=name, num_evaluations=20, key_steps=keys, depth=0)
    if name == "faster-diffusion":
        scale = steps / _ENCODER_REFERENCE
        keys = tuple(sorted({round(key * scale) for key in _ENCODER_KEYS}))
        return Config(
            name=name,
            num_evaluations=steps,
            key_steps=keys,
            depth=layers,
            encoder="reuse",
        )
    if name == "t-gate":
        gate = max(1, round(_GATE * steps))
        after = StepPlan(attention="reuse", guidance="off")
        plan = (StepPlan(),) * gate + (after,) * (steps - gate)
        return Config(name=name, num_evaluations=steps, steps=plan)
    return None


def grid(count: int, steps: int) -> tuple[int, ...]:
    """The ``count`` of ``steps`` evaluations that are worth most: close at first, the last one
    among them. Other counts than those that were looked for lie between.

    Raises ConfigError where there are not so many.
    """
    if not 1 <= count <= steps:
        raise ConfigError(f"a grid of {steps} steps has no {count} of them")
    places = _PLACES[min(max(count, min(_PLACES)), max(_PLACES))]
    found: list[int] = []
    for j in range(count):
        at = Fraction(j * (len(places) - 1), max(count - 1, 1))
        low = places[int(at)]
        high = places[min(int(at) + 1, len(places) - 1)]
        place = (low + (at - int(at)) * (high - low)) * Fraction(steps - 1, places[-1])
        # none twice, and room for those to come
        least, most = found[-1] + 1 if found else 0, steps - count + j
        found.append(min(max(int(place + Fraction(1, 2)), least), most))
    return tuple(found)


def method_of(name: str) -> str | None:
    """The method whose schedule the row ``name`` is; None: of no peer."""
    if _DEEPCACHE.fullmatch(name):
        return "DeepCache's schedule"
    if _SKIP.fullmatch(name):
        return "skipped, x0 forecast"
    known = {"faster-diffusion": "Faster Diffusion's schedule", "t-gate": "T-GATE's schedule"}
    return known.get(name)


def package_row(name: str) -> str | None:
    """``name`` where it is a row of a package that is installed; None: no such row.

    Raises ConfigError where the package is not installed, or does not run with a ControlNet.
    """
    if name == "tgate-pypi":
        raise ConfigError(
            "row 'tgate-pypi': T-GATE 1.0.0 has loaders for pipelines without a ControlNet only; "
            "its published schedule is the row 't-gate'"
        )
    if _PACKAGE.fullmatch(name) is None:
        return None
    _deepcache()
    return name


def _deepcache() -> Any:
    try:
        from DeepCache import DeepCacheSDHelper
    except ImportError:
        raise ConfigError(
            'a row of DeepCache\'s package needs it: pip install "hybrid-grained-cache[peers]"'
        ) from None
    return DeepCacheSDHelper


def _interval(name: str) -> int:
    return int(name.rpartition("-")[2])


@contextlib.contextmanager
def installed_package(name: str, pipe: Any) -> Iterator[Callable[[], int]]:
    """``pipe`` with a package's cache switched on. Yields what counts the bytes it holds."""
    helper = _deepcache()(pipe=pipe)
    helper.set_params(cache_interval=_interval(name), cache_branch_id=0)
    helper.enable()

    def held() -> int:
        import torch
        from torch.utils import _pytree

        leaves = _pytree.tree_leaves(helper.cached_output)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
        return sum(storage.nbytes() for storage in storages.values())

    try:
        yield held
    finally:
        helper.disable()


def package_macs(name: str, steps: int, shapes: ModelShapes, full: Macs) -> Macs | None:
    """MACs of one picture under guidance with a package's cache; None where they are not counted.

    full: of one evaluation without a cache. The package's own code is run on the meta device; the
    ControlNet is computed at every evaluation.
    """
    if shapes.unet.config.addition_embed_type is not None:
        return None
    from hgc.macs import Macs

    saved = _saved(_interval(name), shapes)
    skips = steps - len(range(0, steps, _interval(name)))
    return Macs(full.total * steps - saved.total * skips, full.paper * steps - saved.paper * skips)


@functools.cache
def _saved(interval: int, shapes: ModelShapes) -> Macs:
    """What an evaluation that the package shortens costs less than a full one."""
    import torch

    from hgc.macs import Macs, flop_counter, macs_of

    unet = shapes.unet
    pipe = SimpleNamespace(unet=unet, scheduler=SimpleNamespace(timesteps=torch.arange(2)))
    side = unet.config.sample_size
    sample = torch.empty(2, unet.config.in_channels, side, side, device="meta")
    text = torch.empty(2, 77, unet.config.cross_attention_dim, device="meta")
    counted = []
    with torch.no_grad(), installed_package(f"deepcache-pypi-{interval}", pipe):
        for step in range(2):
            with flop_counter() as counter:
                unet.forward(sample, torch.tensor(step), encoder_hidden_states=text)
            counted.append(macs_of(counter))
    # unwrapping leaves an attribute where there was a method
    unet.__dict__.pop("forward", None)
    key, short = counted
    return Macs(key.total - short.total, key.paper - short.paper)
