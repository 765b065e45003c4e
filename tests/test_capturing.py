"""Captured evaluations: the bits of the eager ones, by a recorder that runs on the CPU.

    pytest tests/test_capturing.py

It keeps each op with the tensors that the op read and wrote, as a CUDA graph keeps addresses, and
runs them again: a number that was not a tensor stays what it was, and so does a weight that was
replaced. The CUDA graphs themselves are tested in test_engine_gpu.py.
"""

from __future__ import annotations

import contextlib
import threading

import models
import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import hgc
from hgc import Config, StepPlan
from hgc.capturing import CapturedNetworks
from hgc.engine import HgcWarning
from hgc.presets import PRESETS


def storage(x):
    return x.untyped_storage()._cdata


def tensors_in(*values):
    return [x for x in pytree.tree_leaves(values) if isinstance(x, torch.Tensor)]


class Tape(TorchDispatchMode):
    """Keeps ops as they are run, and what each read and wrote."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if op is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = op(*args, **kwargs)
        read = {storage(x) for x in tensors_in(args, kwargs)}
        new = [x for x in tensors_in(out) if storage(x) not in read]
        if op._schema.is_mutable or new:
            self.steps.append((op, args, kwargs, out))
        return out

    def replay(self):
        for op, args, kwargs, out in self.steps:
            again = op(*args, **kwargs)
            if not op._schema.is_mutable:
                for old, new in zip(tensors_in(out), tensors_in(again), strict=True):
                    old.copy_(new)


class OnCpu:
    """Records ops, and overwrites what graphs returned before anything else is replayed."""

    device_type = "cpu"

    def __init__(self):
        self.outputs = []
        self.released = 0

    def begin(self, device):
        for tensor in self.outputs:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 111)
        return True

    def record(self, call):
        with Tape() as tape:
            outputs = [x.clone() for x in call()]
        self.outputs += outputs
        return outputs, tape.replay

    def release(self):
        self.released += 1


class Captured:
    """A pipeline with hgc on it, which can be run with and without being captured."""

    def __init__(self, pipe, config, **options):
        self.pipe = pipe
        self.installed = hgc.install(pipe.unet, pipe.controlnet, config=config)
        self.count = self.installed.config.num_evaluations
        self.recorder = OnCpu()
        self.networks = self.installed._compiled = CapturedNetworks(
            pipe.unet, self.installed.controlnets, say=self.installed._say,
            recorder=self.recorder, **options,
        )  # fmt: skip

    def draw(self, **changes):
        return models.draw(self.pipe, **{"steps": self.count, **changes})

    def eager(self, **changes):
        self.installed._compiled = None
        try:
            return self.draw(**changes)
        finally:
            self.installed._compiled = self.networks

    def counts(self, **changes):
        """What a run's evaluations did."""
        before = self.networks.counts.copy()
        self.draw(**changes)
        return dict(self.networks.counts - before)


@contextlib.contextmanager
def captured(pipe, config, **options):
    made = Captured(pipe, config, **options)
    try:
        yield made
    finally:
        if made.installed._forwards:
            made.installed.uninstall()


SHALLOW = Config(
    name="shallow", num_evaluations=6, key_steps=(0, 3, 5), depth=1, guidance="reuse", forecast=0.7
)


def small_pipeline():
    return models.sd15_pipeline(models.small_unet(), models.small_controlnet())


@pytest.fixture
def shallow():
    with captured(small_pipeline(), SHALLOW) as made:
        yield made


def check(made, *calls):
    """Each call captured has the bits of the same one without; several times over."""
    eager = [made.eager(**call) for call in calls]
    for _ in range(3):
        for call, expected in zip(calls, eager, strict=True):
            assert torch.equal(made.draw(**call), expected)


def test_second_use_is_recorded_and_then_replayed(shallow):
    check(shallow, {"seed": 0}, {"seed": 1})
    counts = shallow.networks.counts
    kinds = shallow.networks.graphs
    assert counts["first use"] == counts["recorded"] == kinds == 4
    assert set(counts) == {"first use", "recorded", "replayed"}
    assert shallow.counts(seed=2) == {"replayed": 6 + 3}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset(sd15, name):
    with captured(sd15, Config.preset(name)) as made:
        steps = {"steps": min(made.count, 12)}
        calls = [
            {"seed": 0},
            {"seed": 1},
            {"seed": 2, **models.change_text(3)},
            {"size": 48},
            {"controlnet_conditioning_scale": 0.4},
            {"controlnet_conditioning_scale": 0.4, "guess_mode": True},
        ]
        check(made, *({**steps, **call} for call in calls))
        assert made.networks.counts["replayed"] > 0
        assert set(made.networks.counts) <= {"first use", "recorded", "replayed"}
