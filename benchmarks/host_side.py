"""The executor's own time: microseconds of an evaluation that no module spends.

    python benchmarks/host_side.py            # prints the table
    python benchmarks/host_side.py --write    # and writes it to docs/measured.md

A UNet and a ControlNet with the layers of SD1.5, at tiny widths, are called as a pipeline calls
them: one image under guidance, on one thread of the CPU. An evaluation is a call of both. Its own
time is what passes between the modules that the two call: deciding, comparing arguments, reading
and writing the cache, and tensor work between modules. Of each gap between two modules the quantile
over all evaluations of a kind is taken, and these are added up: another process that has the core
for a while spoils one gap, not the evaluation. The first evaluation of a run, at which all modules
are looked at too, is left out.

Beside it: the same of diffusers' own forwards, the look at all modules, and a Python loop of a
million additions, so that figures of two machines can be compared.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import diffusers
import torch

import hgc
from hgc.watch.trust import Trust

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from measured import commit, table, write_section

WITHOUT = "without hgc"
CONFIGS = ("paper", "balanced", "exact", WITHOUT)
STEPS, SIZE, TEXT = 20, 8, 16
SD15 = {
    "block_out_channels": (8, 16, 16, 16), "norm_num_groups": 4, "cross_attention_dim": TEXT,
    "attention_head_dim": 2,
}  # fmt: skip
clock = time.perf_counter


@contextlib.contextmanager
def clocked(stamps):
    """Append to ``stamps`` when each module that a model calls begins and ends, not those within.

    hgc looks for strange code at the beginning of a run: this is to be entered after that.
    """
    call, depth = torch.nn.Module.__call__, 0

    def timed(module, *args, **kwargs):
        nonlocal depth
        if depth == 2:
            return call(module, *args, **kwargs)
        depth += 1
        start = clock()
        try:
            return call(module, *args, **kwargs)
        finally:
            end = clock()
            if depth == 2:
                stamps.extend((start, end))
            depth -= 1

    torch.nn.Module.__call__ = timed
    try:
        yield
    finally:
        torch.nn.Module.__call__ = call


def gaps_of_a_run(unet, net, scheduler):
    """Of each evaluation after the first: the seconds before, between and after its modules."""
    scheduler.set_timesteps(STEPS)
    text, condition = torch.randn(2, 77, TEXT), torch.rand(2, 3, 8 * SIZE, 8 * SIZE)
    sample, found = torch.randn(1, 4, SIZE, SIZE).repeat(2, 1, 1, 1), []
    with contextlib.ExitStack() as stack, torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            if i == 1:
                stamps = []
                stack.enter_context(clocked(stamps))
            start = clock()
            down, mid = net(sample, t, text, condition, return_dict=False)
            unet(
                sample, t, text, down_block_additional_residuals=down,
                mid_block_additional_residual=mid, return_dict=False,
            )  # fmt: skip
            end = clock()
            if i:
                ends, starts = [start, *stamps[1::2]], [*stamps[::2], end]
                found.append([b - a for a, b in zip(ends, starts, strict=True)])
                stamps.clear()
    return found


def measure(unet, net, config, repeats):
    """Gaps of evaluations by what they compute: everything, some layers or nothing."""
    scheduler, found = diffusers.DDIMScheduler(clip_sample=False), collections.defaultdict(list)
    plain = config == WITHOUT
    installed = None if plain else hgc.install(unet, net, config=config, scheduler=scheduler)
    with contextlib.nullcontext() if plain else installed:
        for repeat in range(repeats + 1):
            gaps = gaps_of_a_run(unet, net, scheduler)
            if not repeat:
                continue  # warming up
            depths = ["full"] * STEPS if plain else [r.depth for r in installed.report().rows]
            for depth, each in zip(depths[1:], gaps, strict=True):
                found[{"full": "full", 0: "skip"}.get(depth, "shallow")].append(each)
    return found


def own_seconds(evaluations):
    """The 20%, 50% and 80% quantile of their own time; and how many of them these are of."""
    usual = statistics.mode(map(len, evaluations))  # as many modules as most of them call
    gaps = [each for each in evaluations if len(each) == usual]
    quantiles = (statistics.quantiles(gap, n=10) for gap in zip(*gaps, strict=True))
    p20, p50, p80 = map(sum, zip(*((q[1], q[4], q[7]) for q in quantiles), strict=True))
    return p20, p50, p80, len(gaps)


def seconds_of(function, repeats):
    """The median time of a call that takes milliseconds: that which the thread had the core."""
    took = []
    for _ in range(repeats):
        start = time.thread_time()
        function()
        took.append(time.thread_time() - start)
    return statistics.median(took)


def add():
    total = 0
    for each in range(1_000_000):
        total += each


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=10, help="runs of each configuration")
    parser.add_argument("--write", action="store_true", help="write docs/measured.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(**SD15).eval()
    net = diffusers.ControlNetModel(**SD15).eval()
    walk = seconds_of(Trust((unet, net)).stranger, 20)
    loop = seconds_of(add, 10)
    rows = []
    for config in CONFIGS:
        for kind, evaluations in measure(unet, net, config, options.repeats).items():
            p20, p50, p80, count = own_seconds(evaluations)
            own = f"{p50 * 1e6:.0f} ({p20 * 1e6:.0f} to {p80 * 1e6:.0f})"
            name = config if config == WITHOUT else f"`{config}`"
            rows.append([name, kind, count, own, f"{p50 / loop:.2%}"])
    text = table(
        ["plan", "evaluation", "count", "own microseconds, p50 (p20 to p80)", "of the loop"], rows
    )
    text += (
        f"\n\nThe loop of a million additions takes {loop * 1e3:.1f} ms, the look at all modules "
        f"{walk * 1e3:.2f} ms a run (2 at most are wanted)."
    )
    print(text)
    if options.write:
        note = (
            "A UNet and a ControlNet with SD1.5's layers at tiny widths, one image under guidance, "
            f"fp32, {platform.machine()}, one thread, Python {platform.python_version()}, torch "
            f"{torch.__version__}, commit {commit()}, {options.repeats} runs of {STEPS} steps, the "
            f"first evaluation of each left out; load {os.getloadavg()[0]:.1f} on "
            f"{os.cpu_count()} cores. Own time: what passes between the modules that the two "
            "models call; the timing is in it with about 0.3 microseconds a module."
        )
        command = "python benchmarks/host_side.py --write"
        write_section("host-side", command, f"{note}\n\n{text}")


if __name__ == "__main__":
    main()
