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
- Spectrum (arXiv 2603.01623), with its settings for SDXL: the first 5 evaluations, then one at the
  end of each window of 2, 2.75, 3.5, ... evaluations, rounded down. The others are forecast: half a
  line through the last two, half a ridge regression (0.1) on Chebyshev polynomials of degree 4 over
  all before. That is linear in what was computed, so a plan says it with one coefficient for each.
  What differs: the model's output is forecast, where Spectrum forecasts the input of the layers
  that make it (a norm and a convolution, which it runs each time); its time is the share of the
  run, where its code divides by 50 steps; sums are in float32, not bfloat16; and the ControlNet is
  left out with the UNet, where Spectrum's own code fails with a ControlNet. "spectrum-N" computes N
  evaluations of 20 and that share of other runs: the first tenth, as 5 of its 50 are, and windows
  that grow by another number, the largest that gives so many.
- "skip-x0" needs no cache of features: between key steps neither network is run, and the output is
  what x0 on a line in the log-SNR says (Config's `depth=0`). With 8 to 4 key steps of 20.

The same evaluations, made by a plain pipeline and nothing between them, are the rows "8-steps@grid"
and so on: see :func:`grid`.

"fewer-steps-6-calibrated" is so many of them by DPM++ 2M, with coefficients of their outputs
refined as those of "balanced-calibrated" are: see :func:`refined_rows`.

Of the packages DeepCache 0.1.1 runs with a ControlNet: the rows "deepcache-pypi-N", with the extra
``peers``. T-GATE 1.0.0 has no ControlNet pipeline: its row is refused with that reason.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from hgc.planning.config import PRESETS, Config, ConfigError, StepPlan
from hgc.planning.rule import scaled_key_steps

if TYPE_CHECKING:
    from hgc.evaluation.models import ModelShapes
    from hgc.report.macs import Macs

__all__ = [
    "PACKAGES",
    "PEERS",
    "SKIPS",
    "deepcache",
    "deepcache_class",
    "grid",
    "interval_of",
    "method_of",
    "package_macs",
    "package_row",
    "peer",
    "refined_rows",
]

# The rows that "peers" stands for.
PEERS = ("deepcache-2", "deepcache-3", "deepcache-5", "faster-diffusion", "t-gate", "spectrum")

# Where evaluations of a run of 20 do most, by how many are made, for a run that forecasts those
# between them: the presets' key steps; and one more than theirs.
_PRESETS = {len(each.key_steps): each.key_steps for each in PRESETS.values() if each.key_steps}
_PLACES = {8: (0, 2, 4, 7, 10, 13, 16, 19), **_PRESETS}
# The same for a plain run of DPM++ 2M at them, searched in the same way on the same models.
_GRID_PLACES = {
    8: (0, 2, 4, 7, 10, 13, 16, 19),
    7: (0, 2, 4, 8, 12, 16, 19),
    6: (0, 3, 6, 10, 14, 18),
    5: (0, 4, 8, 13, 18),
    4: (0, 5, 10, 16),
}
# The rows that "skip-x0" stands for.
SKIPS = tuple(f"skip-x0-{count}" for count in _PLACES)
_SKIP = re.compile(r"skip-x0-(\d+)")
# Rows with refined coefficients: so many plain steps with DPM++ 2M, or a preset.
_REFINED_STEPS = re.compile(r"fewer-steps(?:-(\d+))?-calibrated")
_REFINED_PRESETS = {f"{name}-calibrated": name for name, each in PRESETS.items() if each.key_steps}

_DEEPCACHE = re.compile(r"deepcache-(\d+)")
_ENCODER_KEYS = (0, 1, 2, 3, 5, 10, 15, 25, 35)
_ENCODER_REFERENCE = 50
_GATE = 10 / 25
_SPECTRUM = re.compile(r"spectrum(?:-(\d+))?")
_WARM_UP, _WARM_UP_SHARE = 5, 5 / 50
_WINDOW, _GROWTH = 2, 0.75
_DEGREE, _RIDGE, _CHEBYSHEV = 4, 0.1, 0.5
# Rows of the packages themselves, as PyPI has them.
PACKAGES = ("deepcache-pypi-3",)
_PACKAGE = re.compile(r"deepcache-pypi-([2-9]|[1-9]\d+)")


def peer(name: str, steps: int, layers: int = 12) -> Config | None:
    """The schedule called ``name`` for a run of ``steps`` evaluations; None: no peer has that name.

    name: "deepcache-N" with an interval of at least 2, "faster-diffusion", "t-gate", "spectrum", or
        "spectrum-N" or "skip-x0-N" with N key steps of 20, and that share of them in a longer run.
    layers: all decoder layers of the UNet; SD1.5 has 12.

    Raises ConfigError where Spectrum's rule makes no run with so many.
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
        keys = grid(int(skip.group(1)), 20, _PLACES)
        return Config(name=name, num_evaluations=20, key_steps=keys, depth=0)
    spectrum = _SPECTRUM.fullmatch(name)
    if spectrum:
        return _spectrum(name, None if spectrum.group(1) is None else int(spectrum.group(1)), steps)
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


def _spectrum(name: str, of_20: int | None, steps: int) -> Config:
    keys = _spectrum_keys(steps, _WARM_UP, _GROWTH)
    if of_20 is not None:
        warm_up = max(2, round(_WARM_UP_SHARE * steps))
        count = round(of_20 * steps / 20)
        growths = (growth / 20 for growth in range(20 * steps, -1, -1))
        tried = (_spectrum_keys(steps, warm_up, growth) for growth in growths)
        found = next((keys for keys in tried if len(keys) == count), None)
        if found is None:
            raise ConfigError(
                f"row {name!r}: Spectrum's rule makes no run of {steps} steps that computes {count}"
            )
        keys = found
    plan = [
        StepPlan()
        if i in keys
        else StepPlan(control="off", depth=0, forecast=_spectrum_forecast(keys, i, steps))
        for i in range(steps)
    ]
    return Config(name=name, num_evaluations=steps, steps=tuple(plan))


def _spectrum_keys(steps: int, warm_up: int, growth: float) -> tuple[int, ...]:
    """The evaluations that Spectrum computes."""
    keys = list(range(min(warm_up, steps)))
    window = float(_WINDOW)
    while (at := keys[-1] + int(window)) < steps:
        keys.append(at)
        window += growth
    return tuple(keys)


def _spectrum_forecast(keys: tuple[int, ...], at: int, steps: int) -> tuple[float, ...]:
    """Spectrum's coefficients at evaluation ``at`` of what ``keys`` computed, newest first."""
    import numpy as np

    past = [key for key in keys if key < at][::-1]
    basis = np.polynomial.chebyshev.chebvander(2 * np.array([*past, at]) / steps - 1, _DEGREE)
    known, wanted = basis[:-1], basis[-1]
    ridge = _RIDGE * np.eye(_DEGREE + 1)
    found = _CHEBYSHEV * wanted @ np.linalg.solve(known.T @ known + ridge, known.T)
    ahead = (at - past[0]) / (past[0] - past[1])
    found[:2] += (1 - _CHEBYSHEV) * np.array([1 + ahead, -ahead])
    return tuple(round(float(c), 6) for c in found)


def refined_rows(name: str, steps: int) -> dict[str, tuple[Config, str | None]]:
    """The rows that ``name`` stands for, by the stems of their files: what their coefficients are
    refined from, and their scheduler (None: that of the evaluation). Empty where it is no row with
    refined coefficients. benchmarks/refine_plans.py makes them.

    name: "calibrated": the presets that leave something out; "fewer-steps-calibrated": uncached
        runs of as many evaluations as these have key steps; or one of them, "fast-calibrated",
        "fewer-steps-6-calibrated".
    steps: of the uncached run, which they are refined for.
    """
    ending = "" if steps == 20 else f"-{steps}"
    found: dict[str, tuple[Config, str | None]] = {}
    for label, preset in _REFINED_PRESETS.items():
        if name in ("calibrated", label):
            rule = PRESETS[preset]
            keys = scaled_key_steps(rule.key_steps or (), rule.num_evaluations, steps)
            row = f"{label}{ending}"
            found[row] = (rule.replace(name=row, num_evaluations=steps, key_steps=keys), None)
    if asked := _REFINED_STEPS.fullmatch(name):
        for count in _PRESETS if asked[1] is None else (int(asked[1]),):
            row = f"fewer-steps-{count}-calibrated{ending}"
            rule = Config(name=row, num_evaluations=max(1, round(count * steps / 20)))
            found[row] = (rule, "dpm++2m-grid")
    return found


def grid(
    count: int, steps: int, searched: Mapping[int, tuple[int, ...]] = _GRID_PLACES
) -> tuple[int, ...]:
    """The ``count`` of ``steps`` evaluations that are worth most, close at first. Other counts than
    those that were searched lie between.

    Raises ConfigError where there are not so many.
    """
    if not 1 <= count <= steps:
        raise ConfigError(f"a grid of {steps} steps has no {count} of them")
    places = searched[min(max(count, min(searched)), max(searched))]
    found: list[int] = []
    for j in range(count):
        at = Fraction(j * (len(places) - 1), max(count - 1, 1))
        low = places[int(at)]
        high = places[min(int(at) + 1, len(places) - 1)]
        place = (low + (at - int(at)) * (high - low)) * Fraction(steps - 1, 19)
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
    if _SPECTRUM.fullmatch(name):
        return "Spectrum's rule"
    if name.startswith("fewer-steps-"):
        return "fewer steps, calibrated"
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
    deepcache_class()
    return name


def deepcache_class() -> Any:
    """The package's helper. Raises ConfigError where it is not installed."""
    try:
        from DeepCache import DeepCacheSDHelper
    except ImportError:
        raise ConfigError(
            'the rows of DeepCache need it: pip install "hybrid-grained-cache[peers]"'
        ) from None
    return DeepCacheSDHelper


@contextlib.contextmanager
def deepcache(interval: int, pipe: Any) -> Iterator[Callable[[], int]]:
    """``pipe`` with DeepCache's own cache switched on. Yields what counts the bytes it holds."""
    helper = deepcache_class()(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=0)
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


def interval_of(name: str) -> int:
    """Of "deepcache-3": 3."""
    return int(name.rpartition("-")[2])


def package_macs(name: str, steps: int, shapes: ModelShapes, full: Macs) -> Macs | None:
    """MACs of one picture under guidance with a package's cache; None where they are not counted.

    full: of one evaluation without a cache. The package's own code is run on the meta device; the
    ControlNet is computed at every evaluation.
    """
    if shapes.unet.config.addition_embed_type is not None:
        return None
    from hgc.report.macs import Macs

    saved = _saved(interval_of(name), shapes)
    skips = steps - len(range(0, steps, interval_of(name)))
    return Macs(full.total * steps - saved.total * skips, full.paper * steps - saved.paper * skips)


@functools.cache
def _saved(interval: int, shapes: ModelShapes) -> Macs:
    """What an evaluation that the package shortens costs less than a full one."""
    import torch

    from hgc.report.macs import Macs, flop_counter, macs_of

    unet = shapes.unet
    pipe = SimpleNamespace(unet=unet, scheduler=SimpleNamespace(timesteps=torch.arange(2)))
    side = unet.config.sample_size
    sample = torch.empty(2, unet.config.in_channels, side, side, device="meta")
    text = torch.empty(2, 77, unet.config.cross_attention_dim, device="meta")
    counted = []
    with torch.no_grad(), deepcache(interval, pipe):
        for step in range(2):
            with flop_counter() as counter:
                unet.forward(sample, torch.tensor(step), encoder_hidden_states=text)
            counted.append(macs_of(counter))
    # unwrapping leaves an attribute where there was a method
    unet.__dict__.pop("forward", None)
    key, short = counted
    return Macs(key.total - short.total, key.paper - short.paper)
