"""Compile every kernel for real GPUs on a machine without one, and check what the compilers made of
it.

    python scripts/aot_table.py              # everything
    python scripts/aot_table.py --quick      # a subset, for CI

Triton kernels are compiled exactly as the launchers would launch them: the launchers run on meta
tensors and their launches are recorded. Exits with 1 where a kernel spills or wants more shared
memory than a block has, an attention kernel leaves the matrix units unused in a 16-bit dtype or
reads or writes single values of it, a norm does not read 16 bytes at a time, a CUDA kernel uses
local memory, or one of its 16-byte paths lacks 128-bit loads or stores.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled

import torch
import triton
from measured import table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import hgc_kernels as hk
from hgc_kernels.ops.apply_map import launch as apply_map_launch
from hgc_kernels.ops.attend_and_store import launch as attend_launch
from hgc_kernels.ops.group_norm import launch as group_norm_launch

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
ARCHITECTURES = (80, 90, 100, 120)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
POINTER = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
}
LIBRARY = Path(hk.__file__).parent / "lib" / "libhgc_cuda.so"
# What a block may have; sm_80's kernels also serve sm_86 and sm_89, which have less than sm_80.
SHARED_BYTES = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
# What one instruction of a thread moves: `ld.global.v4.b32`, `st.global.b16`; bytes of a cp.async.
GLOBAL = re.compile(r"\b(ld|st)\.global(?:\.\w+(?:::\w+)*)*?(?:\.v(\d))?\.[busf](\d+)\b")
COPIED = re.compile(r"\bcp\.async\.c\w\.shared\.global\b[^;]*?, (0x[0-9a-f]+|\d+)")
MATRIX_INSTRUCTIONS = re.compile(r"\b(?:HGMMA|HMMA|QGMMA|OMMA|UTC\w*MMA)\b")


@dataclass(frozen=True)
class Case:
    """One compilation: a kernel as one launch specialises it."""

    kernel: str
    module: str
    label: str
    dtype: str
    signature: tuple
    constants: tuple
    divisible: tuple
    options: tuple
    arch: int = 0


class Recorder:
    """Stands in for a kernel and keeps what it would be launched with."""

    def __init__(self, kernel, module):
        self.kernel, self.module, self.launches = kernel, module, []

    def __getitem__(self, grid):
        def launch(*args, num_warps, num_stages, **constants):
            self.launches.append(
                (args, constants, {"num_warps": num_warps, "num_stages": num_stages})
            )

        return launch

    def cases(self, label, dtype):
        for args, constants, options in self.launches:
            signature, fixed, divisible = {}, dict(constants), []
            for position, (name, value) in enumerate(
                zip(self.kernel.arg_names, args, strict=False)
            ):
                if isinstance(value, torch.Tensor):
                    signature[name] = POINTER[value.dtype]
                    # allocations are aligned, and so are heads of even sizes
                    divisible.append(position)
                elif isinstance(value, float):
                    signature[name] = "fp32"
                elif value == 1:
                    signature[name], fixed[name] = "constexpr", 1
                else:
                    signature[name] = "i32"
                    if value % 16 == 0:
                        divisible.append(position)
            signature.update(dict.fromkeys(constants, "constexpr"))
            yield Case(
                self.kernel.__name__, self.module.__name__, label, dtype, tuple(signature.items()),
                tuple(fixed.items()), tuple(divisible), tuple(options.items()),
            )  # fmt: skip


RECORDED = (
    (attend_launch, "attend_and_store_kernel"),
    (apply_map_launch, "apply_map_kernel"),
    (group_norm_launch, "group_moments_kernel"),
    (group_norm_launch, "group_norm_kernel"),
)
OF_ATTENTION = ("attend_and_store_kernel", "apply_map_kernel")


def record(label, dtype, call):
    recorders = [Recorder(getattr(module, name), module) for module, name in RECORDED]
    with ExitStack() as stack:
        for (module, name), recorder in zip(RECORDED, recorders, strict=True):
            stack.enter_context(mock.patch.object(module, name, recorder))
        call()
    return [case for recorder in recorders for case in recorder.cases(label, dtype)]


def heads(batch, tokens, count, size, dtype):
    """[B, S, H, D] as diffusers makes it: a projection [B, S, H * D] viewed as heads."""
    return torch.empty(batch, tokens, count * size, dtype=dtype, device="meta").view(
        batch, tokens, count, size
    )


def triton_cases(quick, arch):
    """Every compilation once: many labels come down to one and the same."""
    unique = {}
    with ExitStack() as stack:
        for module in (attend_launch, apply_map_launch):
            stack.enter_context(mock.patch.object(module, "architecture", lambda x: arch))
        for case in (*attention_cases(quick), *norm_cases(quick)):
            unique.setdefault(replace(case, label=""), replace(case, arch=arch))
    return list(unique.values())


def norm_cases(quick):
    """(channels, height and width): the first, a joined and the widest input of SD1.5's resnets."""
    found = []
    for dtype_name, dtype in DTYPES.items():
        for channels, side in ((320, 64), (960, 64), (2560, 8))[: 1 if quick else None]:
            for name, memory_format in (
                ("channels_last", torch.channels_last), ("NCHW", torch.contiguous_format)
            ):  # fmt: skip
                x = torch.empty(
                    2, channels, side, side, dtype=dtype, device="meta", memory_format=memory_format
                )
                weight, shift = x.new_empty(channels), x.new_empty(2, channels)
                for added in (shift, None)[: 1 if quick else None]:
                    label = f"C={channels} {name}" + ("" if added is None else ", shift")
                    call = partial(
                        group_norm_launch.group_norm, x, added, 32, weight, weight, 1e-5, True
                    )
                    found += record(label, dtype_name, call)
    return found


def attention_cases(quick):
    """(queries, keys, heads, head size): SD1.5's and SDXL's cross-attentions, and an image prompt
    of 257 tokens.
    """
    sizes = [(4096, 77, 8, 40), (1024, 77, 8, 80), (256, 77, 8, 160), (4096, 77, 10, 64)]
    formats = list(hk.FORMATS)
    if quick:
        sizes, formats = sizes[:1] + sizes[2:3], ["fp16", "e4m3"]
    found = []
    for dtype_name, dtype in DTYPES.items():
        for s_q, s_kv, count, size in sizes:
            # A format changes the access to the map and nothing around it: all four at one size do.
            kept = formats if size == 40 else [f for f in formats if f in ("fp16", "e4m3")]
            if quick and size != 40:
                kept = [] if dtype_name == "fp32" else ["e4m3"]
            keys = [(s_kv, format) for format in kept]
            if not quick and size in (64, 160):
                keys.append((257, "fp16"))
            for n, format in keys:
                q, v = heads(2, s_q, count, size, dtype), heads(2, n, count, size, dtype)
                map = torch.empty(
                    2, s_q, count, hk.padded(n), dtype=hk.FORMATS[format], device="meta"
                )
                label = f"D={size} S_kv={n} map={format}"
                attend = partial(attend_launch.attend_and_store, q, v, v, 0.1, map)
                found += record(label, dtype_name, attend)
                found += record(label, dtype_name, partial(apply_map_launch.apply_map, map, v))
    return found


def tool(name, *arguments, **options):
    """What one of CUDA's binary utilities prints."""
    command = [BIN / name, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, **options).stdout


def inspect_cubin(cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = tool("nvdisasm", file.name)
    fields = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "registers": fields["REG"],
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)) + fields["LOCAL"],
        "matrix": len(MATRIX_INSTRUCTIONS.findall(sass)),
    }


def widths(ptx):
    """How many loads and stores of global memory there are by their width in bytes."""
    loads, stores = Counter(), Counter()
    for kind, count, bits in GLOBAL.findall(ptx):
        (loads if kind == "ld" else stores)[int(count or 1) * int(bits) // 8] += 1
    loads.update(int(size, 0) for size in COPIED.findall(ptx))
    return {"loads": dict(sorted(loads.items())), "stores": dict(sorted(stores.items()))}


def wide(results, key):
    """The share of the bytes that 16-byte accesses move, and the narrowest access."""
    shares = [16 * found[key].get(16, 0) / moved(found[key]) for found in results]
    return f"{min(shares):.0%}, {min(min(found[key]) for found in results)}"


def moved(found):
    return sum(width * count for width, count in found.items())


def compile_case(case):
    kernel = getattr(importlib.import_module(case.module), case.kernel)
    source = ASTSource(
        fn=kernel,
        signature=dict(case.signature),
        constexprs=dict(case.constants),
        attrs={(position,): [["tt.divisibility", 16]] for position in case.divisible},
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", case.arch, 32), options=dict(case.options)
    )
    return {
        **inspect_cubin(compiled.asm["cubin"]),
        **widths(compiled.asm["ptx"]),
        "shared": compiled.metadata.shared,
    }


def triton_table(architectures, quick, jobs):
    cases = [case for arch in architectures for case in triton_cases(quick, arch)]
    groups = defaultdict(list)
    problems = []
    with ProcessPoolExecutor(jobs) as pool:
        for done, (case, result) in enumerate(
            zip(cases, pool.map(compile_case, cases), strict=True), 1
        ):
            where = f"sm_{case.arch} {case.kernel} {case.dtype} {case.label}"
            print(f"{done}/{len(cases)} {where} {result}", flush=True)
            groups[case.kernel, case.dtype, case.arch].append(result)
            if result["spills"]:
                problems.append(f"{where}: {result['spills']} spills")
            if result["shared"] > SHARED_BYTES[case.arch]:
                problems.append(f"{where}: {result['shared']} bytes of shared memory")
            if case.kernel not in OF_ATTENTION:
                if 16 not in result["loads"]:
                    problems.append(f"{where}: no loads of 16 bytes: {result['loads']}")
                continue
            if case.dtype != "fp32" and not result["matrix"]:
                problems.append(f"{where}: no matrix instructions")
            for key in ("loads", "stores"):
                # one is allowed: apply_map's v_0, which is no more than a value for each thread
                single = sum(count for width, count in result[key].items() if width < 4)
                if case.dtype != "fp32" and single > 1:
                    problems.append(f"{where}: {key} of single values, by width: {result[key]}")
    rows = []
    for (kernel, dtype, arch), results in sorted(groups.items()):
        rows.append(
            [
                f"`{kernel}`", dtype, f"sm_{arch}", len(results),
                span(results, "registers"), span(results, "shared"), span(results, "matrix"),
                wide(results, "loads"), wide(results, "stores"),
                max(result["spills"] for result in results),
            ]
        )  # fmt: skip
    header = ["kernel", "dtype", "target", "variants", "registers", "shared bytes"]
    header += ["matrix instructions", "loads by 16 bytes, narrowest", "stores", "spills"]
    return table(header, rows), problems


def span(results, key):
    values = [result[key] for result in results]
    return str(min(values)) if min(values) == max(values) else f"{min(values)} to {max(values)}"


def cuda_table():
    """Registers, local memory and 128-bit accesses of the kernels in the built CUDA library."""
    rows, problems = [], []
    with tempfile.TemporaryDirectory() as folder:
        tool("cuobjdump", "-xelf", "all", LIBRARY, cwd=folder)
        for cubin in sorted(Path(folder).glob("*.cubin")):
            arch = re.search(r"\.(sm_\w+)\.", cubin.name).group(1)
            usage = tool("cuobjdump", "--dump-resource-usage", cubin)
            sass = tool("nvdisasm", cubin)
            bodies = dict(re.findall(r"^\.text\.(\w+):(.*?)(?=^\.text\.|\Z)", sass, re.M | re.S))
            groups = defaultdict(list)
            for symbol, registers, stack, local in re.findall(
                r"Function (\w+):\s+REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage
            ):
                name = re.search(r"\d(gather_blocks_(?:dense|strided)_kernel)", symbol).group(1)
                body = bodies[symbol]
                wide_path = "Li8E" in symbol or "Li4E" in symbol
                spilled = int(local) + int(stack) + len(re.findall(r"\b(?:LDL|STL)\b", body))
                loads = len(re.findall(r"\bLDG\.E[\w.]*\.128\b", body))
                stores = len(re.findall(r"\bSTG\.E[\w.]*\.128\b", body))
                groups[name, "16 bytes" if wide_path else "element"].append(
                    (int(registers), spilled, loads, stores)
                )
                if spilled:
                    problems.append(f"{arch} {symbol}: {spilled} bytes or accesses of local memory")
                if wide_path and not (loads and stores):
                    problems.append(f"{arch} {symbol}: no 128-bit loads or stores")
            for (name, path), found in sorted(groups.items()):
                registers, spilled, loads, stores = zip(*found, strict=True)
                rows.append(
                    [f"`{name}`", path, arch, len(found), f"{min(registers)} to {max(registers)}",
                     f"{min(loads)} to {max(loads)}", f"{min(stores)} to {max(stores)}",
                     max(spilled)]
                )  # fmt: skip
    header = ["kernel", "path", "target", "variants", "registers", "LDG.128", "STG.128"]
    return table([*header, "local memory"], rows), problems


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a subset, for CI")
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=ARCHITECTURES, help="compute capabilities, as 80 90"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--no-cuda", action="store_true", help="leave the CUDA library out")
    options = parser.parse_args()
    architectures = options.arch or ((80, 90) if options.quick else ARCHITECTURES)
    text, problems = triton_table(architectures, options.quick, options.jobs)
    sections = [("Triton kernels, compiled ahead of time", text)]
    if not options.no_cuda:
        if LIBRARY.exists():
            text, more = cuda_table()
            sections.append(("CUDA kernels, from the built library", text))
            problems += more
        else:
            problems.append(f"{LIBRARY.name} was not built: its kernels could not be checked")
    for title, text in sections:
        print(f"\n{title}\n\n{text}")
    for problem in problems:
        print(f"PROBLEM {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
