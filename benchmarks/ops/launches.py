"""What evaluations launch, move and compute, counted on the meta device: no GPU, no weights.

    python benchmarks/ops/launches.py                 # SD1.5 512 and SDXL 1024, fp16, one image
    python benchmarks/ops/launches.py --models sd15 --format channels_last --ops

Ops are calls of aten that do work: no views, no allocations. Kernels are those ops by the rule of
`kernels`, which is read off PyTorch's CUDA sources, and the copies that a convolution makes of an
input whose memory format is not its own (`of_convolution`). What cuDNN launches inside to change
formats is not seen. Bytes are those of `moved_bytes`: every operand and result of an op once. FLOPs
are those of hgc's MAC counter. `--ops` prints calls by name too.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import torch
from diffusers import UniPCMultistepScheduler
from torch._prims_common import suggest_memory_format
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import sdpa_flop_count

from hgc.evaluation.models import load_shapes
from hgc.execute.engine import Engine
from hgc.planning.config import Config
from hgc.report.macs import flop_counter

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from measured import table

SIZES = {"sd15": 64, "sdxl": 128}
# Of 20 evaluations: the second key evaluation, by when all that is made once a run is there, and
# the second evaluation between later keys.
PAPER, BALANCED = Config.preset("paper"), Config.preset("balanced")
KEY, LATER = PAPER.key_steps[1], PAPER.key_steps[1] + 2
FREE = {"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "_local_scalar_dense"}


_NORMS = {"native_group_norm": 3, "group_norm": 2}


def kernels(name: str, args: tuple) -> int:
    """Kernels of one aten op on CUDA: a group norm is moments, their combination with weights, and
    a pass; hgc's is moments and a pass. A bias is added to a convolution's result by a launch of
    its own.
    """
    if name in _NORMS:
        return _NORMS[name]
    return 2 if name == "convolution" and args[2] is not None else 1


def moved_bytes(args: object, result: object) -> int:
    """Every tensor that an op reads or writes, once."""
    tensors = {id(x): x for x in tree_leaves((args, result)) if isinstance(x, torch.Tensor)}
    return sum(x.numel() * x.element_size() for x in tensors.values())


def is_view(func: torch._ops.OpOverload) -> bool:
    """Whether the op hands out memory of its argument, which it does not write."""
    returned = [value.alias_info for value in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in returned)


def of_convolution(args: tuple, result: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The input where it is copied into the memory format of the convolution, and the result in
    that format: channels_last where the input or the weight is (cudnn_conv_suggest_memory_format).
    On the meta device it is NCHW.
    """
    formats = {suggest_memory_format(x) for x in args[:2]}
    wanted = torch.channels_last if torch.channels_last in formats else torch.contiguous_format
    copied = None if args[0].is_contiguous(memory_format=wanted) else args[0]
    return copied, result.contiguous(memory_format=wanted)


class Counted(TorchDispatchMode):
    """Counts ops, their kernels and bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.kernels = self.bytes = self.flops = 0

    def add(self, name: str, args: tuple, result: object) -> None:
        self.ops[name] += 1
        self.kernels += kernels(name, args)
        self.bytes += moved_bytes(args, result)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        used = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        # the schedule's numbers are on the host
        if not is_view(func) and name not in FREE and any(x.is_meta for x in used):
            if name == "convolution":
                copied, result = of_convolution(args, result)
                if copied is not None:
                    self.kernels += 1
                    self.bytes += 2 * moved_bytes(copied, None)  # read and written
            self.add(name, (*args, *(kwargs or {}).values()), result)
        return result


class Fused(TorchFunctionMode):
    """Attention as the one kernel that a GPU runs; on the meta device torch takes it apart."""

    def __init__(self, counted: Counted) -> None:
        super().__init__()
        self.counted = counted

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args[:3]
        batch, heads, length, _ = query.shape
        out = value.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        self.counted.add("scaled_dot_product_attention", (query, key, value), out)
        self.counted.flops += sdpa_flop_count(query.shape, key.shape, value.shape)
        return out


class Pipeline:
    """A UNet and its ControlNet in fp16 on the meta device, and what a pipeline hands to them."""

    def __init__(self, model: str, memory_format: torch.memory_format) -> None:
        shapes = load_shapes(model)
        self.unet, self.net = (
            torch.nn.Module.to(x, dtype=torch.float16, memory_format=memory_format)
            for x in (shapes.unet, *shapes.controlnets)
        )
        side, width = SIZES[model], self.unet.config.cross_attention_dim
        make = {"device": "meta", "dtype": torch.float16}
        self.text = torch.empty(2, 77, width, **make)
        self.sample = torch.empty(2, 4, side, side, **make)
        self.cond = torch.empty(2, 3, 8 * side, 8 * side, **make)
        self.scheduler = UniPCMultistepScheduler()
        self.added = None
        if model == "sdxl":
            self.added = {
                "text_embeds": torch.empty(2, 1280, **make),
                "time_ids": torch.empty(2, 6, **make),
            }

    def evaluate(self, timestep: torch.Tensor) -> None:
        down, mid = self.net(
            self.sample, timestep, encoder_hidden_states=self.text, controlnet_cond=self.cond,
            added_cond_kwargs=self.added, return_dict=False,
        )  # fmt: skip
        self.unet(
            self.sample, timestep, encoder_hidden_states=self.text, added_cond_kwargs=self.added,
            down_block_additional_residuals=down, mid_block_additional_residual=mid,
            return_dict=False,
        )  # fmt: skip

    def count(self, config: Config | None, wanted: int, fused: bool) -> Counted:
        """What evaluation `wanted` of a run does; without a configuration, without hgc."""
        engine = None
        if config is not None:
            engine = Engine(
                self.unet, (self.net,), config, scheduler=lambda: self.scheduler, assume_pair=True
            )
            engine.attach(engine)
            engine.functions.fused = fused
        self.scheduler.set_timesteps(20)
        schedule = self.scheduler.timesteps
        try:
            with torch.no_grad():
                for timestep in schedule[:wanted] if engine is not None else ():
                    self.evaluate(timestep)
                counted, flops = Counted(), flop_counter()
                with flops, counted, Fused(counted):
                    self.evaluate(schedule[wanted])
        finally:
            if engine is not None:
                engine.detach()
        counted.flops += flops.get_total_flops()
        return counted


FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
CASES = (
    ("full, without hgc", None, 0, False),
    ("full, a key evaluation of `balanced`", BALANCED, KEY, False),
    ("the same, fused", BALANCED, KEY, True),
    ("full, a key evaluation of `paper`", PAPER, KEY, False),
    ("the same, fused", PAPER, KEY, True),
    ("shallow, of `paper`", PAPER, LATER, False),
    ("the same, fused", PAPER, LATER, True),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=SIZES, default=[*SIZES])
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=[*FORMATS])
    parser.add_argument("--ops", action="store_true", help="calls by name, too")
    options = parser.parse_args()
    rows = []
    for model in options.models:
        for memory_format in options.format:
            pipeline = Pipeline(model, FORMATS[memory_format])
            for name, config, wanted, fused in CASES:
                found = pipeline.count(config, wanted, fused)
                if options.ops:
                    print(f"{model}, {name}: {dict(found.ops.most_common())}", flush=True)
                rows.append(
                    [model, memory_format, name, found.ops.total(), found.kernels,
                     round(found.bytes / 1e6), round(found.flops / 1e9)]
                )  # fmt: skip
    header = ["model", "format", "evaluation", "ops", "kernels", "MB", "GFLOP"]
    print(table(header, rows))


if __name__ == "__main__":
    main()
