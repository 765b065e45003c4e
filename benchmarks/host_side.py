"""The executor's own time: an evaluation's, less that of the modules it calls.

    python benchmarks/host_side.py                   # the testbed
    python benchmarks/host_side.py --write           # and docs/measured.md
    python benchmarks/host_side.py --profile         # where the own time goes

Own time is everything that is not inside a `torch.nn.Module`: deciding, comparing arguments,
reading and writing the cache, and the pure functions' own tensor work between modules. Evaluation
and modules are timed in one call, so their ratio is paired; the clock is the thread's CPU time,
which on one thread is the time that passes on an idle machine. The goal: at most 3% of a full
evaluation, at most 10% of a shallow one. Exits with 1 where one is missed.
"""

from __future__ import annotations

import argparse
import cProfile
import platform
import pstats
import statistics
import sys
import time
from pathlib import Path

import torch

import hgc
from hgc import testbed

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from measured import commit, table, write_section

GOALS = {"full": 0.03, "shallow": 0.10}
CONFIGS = ("paper", "balanced", "exact")


class Timer:
    """Times evaluations, and within them the outermost modules the executor calls.

    The clock is read as the first and the last thing around a call, so that little of the timing is
    counted as the executor's own.
    """

    def __init__(self, networks):
        self.networks = frozenset(map(id, networks))
        self.rows = []  # (seconds of an evaluation, of the modules in it, of the thread's CPU)
        self._call = torch.nn.Module.__call__

    def __enter__(self):
        call, networks, clock, cpu = self._call, self.networks, time.perf_counter, time.thread_time
        depth = 0
        self.evaluation, self.modules, self.cpu = [], [], []
        evaluation, modules, used = self.evaluation, self.modules, self.cpu

        def timed(module, *args, **kwargs):
            nonlocal depth
            if depth == 2:
                return call(module, *args, **kwargs)
            start = clock()
            if depth == 1:
                depth = 2
                try:
                    return call(module, *args, **kwargs)
                finally:
                    depth = 1
                    modules.append(start)
                    modules.append(clock())
            if id(module) not in networks:
                return call(module, *args, **kwargs)
            used.append(cpu())
            depth = 1
            start = clock()
            try:
                return call(module, *args, **kwargs)
            finally:
                end = clock()
                depth = 0
                used.append(cpu())
                evaluation.append(start)
                evaluation.append(end)

        torch.nn.Module.__call__ = timed
        return self

    def __exit__(self, *exc):
        torch.nn.Module.__call__ = self._call

    def end(self):
        """The evaluation under way is over."""
        self.rows.append([_between(found) for found in (self.evaluation, self.modules, self.cpu)])
        for found in (self.evaluation, self.modules, self.cpu):
            found.clear()


def _between(times):
    """The sum of the intervals in ``times``: start, end, start, end, ..."""
    return sum(times[1::2]) - sum(times[::2])


def measure(pipe, config, steps, repeats, arguments, profiler=None):
    """The own share of every evaluation, by what it computes; the first of a run apart."""
    shares = {"full": [], "shallow": [], "first": []}
    seconds = {"full": [], "shallow": [], "first": []}
    nets = [pipe.controlnet]
    with hgc.install(pipe.unet, nets, config=config) as installed:
        for repeat in range(repeats + 1):
            with Timer([pipe.unet, *nets]) as timer:

                def end(pipe, i, t, kwargs):
                    timer.end()
                    return {}

                if profiler is not None and repeat:
                    profiler.enable()
                pipe(
                    **arguments, num_inference_steps=steps, output_type="latent",
                    generator=torch.Generator().manual_seed(repeat), callback_on_step_end=end,
                )  # fmt: skip
                if profiler is not None:
                    profiler.disable()
            if not repeat:
                continue  # warming up
            for row, (evaluation, modules, cpu) in zip(
                installed._runs.last.report, timer.rows, strict=True
            ):
                if evaluation > 1.02 * cpu:
                    continue  # another process had the core meanwhile
                kind = "first" if row.index == 0 else "full" if row.plan.is_key else "shallow"
                shares[kind].append((evaluation - modules) / evaluation)
                seconds[kind].append(evaluation - modules)
    return shares, seconds


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--configs", default=",".join(CONFIGS))
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)  # so that the thread's clock sees all work
    pipe = testbed.load_pipeline("segmentation")
    pipe.set_progress_bar_config(disable=True)
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    arguments = {
        "prompt": "a red house under a tall tree",
        "image": torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)),
        "guidance_scale": 1.5, "height": size, "width": size,
    }  # fmt: skip
    profiler = cProfile.Profile() if options.profile else None
    rows, missed = [], False
    for config in options.configs.split(","):
        shares, seconds = measure(pipe, config, options.steps, options.repeats, arguments, profiler)
        for kind in ("first", "full", "shallow"):
            if not shares[kind]:
                continue
            ordered = sorted(shares[kind])
            p50 = statistics.median(ordered)
            p20, p80 = (ordered[int(q * (len(ordered) - 1))] for q in (0.2, 0.8))
            goal = GOALS.get(kind)
            missed |= goal is not None and p50 > goal
            rows.append(
                [
                    f"`{config}`", kind, len(ordered),
                    f"{statistics.median(seconds[kind]) * 1e3:.2f}",
                    f"{p50:.1%} ({p20:.1%} to {p80:.1%})",
                    "" if goal is None else f"{goal:.0%}",
                ]
            )  # fmt: skip
    text = table(
        ["plan", "evaluation", "count", "own ms, p50", "own share, p50 (p20 to p80)", "goal"], rows
    )
    print(text)
    if profiler is not None:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(r"hgc/", 25)
    if options.write:
        note = (
            f"The testbed at {size} x {size}, one image under guidance, fp32, "
            f"{platform.machine()}, "
            f"one thread, its CPU time, torch {torch.__version__}, commit {commit()}, "
            f"{options.repeats} runs of {options.steps} steps. Own time: an evaluation's, less "
            "that of the modules called in it. The first evaluation of a run also tells the run, "
            "wraps the processors and makes the plan."
        )
        write_section(
            "host-side",
            "python benchmarks/host_side.py --write",
            f"## The executor's own time\n\n{note}\n\n{text}",
        )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
