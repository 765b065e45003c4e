"""Launch configurations that were measured: `launch/<device>.json`, one file a device.

    {"device": "NVIDIA H200", "about": {"torch": "2.13.0", ...},
     "configs": {"apply_map": {"float16, map float16, over 32 queries, 64 keys, head 64":
                               {"block_m": 128, "num_warps": 8}}}}

What tells one call from another, its bucket, is what the heuristic of the op looks at. A field that
is not named, a bucket that is not there and a device without a file are left to the heuristic.
`benchmarks/ops/tune.py` writes these files.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

FOLDER = Path(__file__).parent / "launch"

_BLOCKS = (16, 32, 64, 128, 256)
_WARPS = {"num_warps": (1, 2, 4, 8, 16), "num_stages": (1, 2, 3, 4, 5, 6)}
_TILES = {"block_m": _BLOCKS, "block_n": _BLOCKS, **_WARPS}

# The fields of each op that a file may set, and their values.
FIELDS: dict[str, dict[str, tuple[int, ...]]] = {
    "apply_map": _TILES,
    "attend_and_store": _TILES,
    "apply_map_project": {
        **_TILES, "block_k": _BLOCKS, "fold_block_n": _BLOCKS, "fold_block_c": _BLOCKS,
    },
}  # fmt: skip

Configs = dict[str, dict[str, dict[str, int]]]  # op -> bucket -> field -> value


class LaunchTableError(ValueError):
    """A file of launch configurations is malformed; the message names the file and the field."""


def slug(device_name: str) -> str:
    """The name of a device as it stands in a file's name: "NVIDIA H200" is nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


def path_of(device_name: str) -> Path:
    """Where the configurations of a device are, or would be."""
    return FOLDER / f"{slug(device_name)}.json"


def name_of(bucket: Sequence[Any]) -> str:
    """A bucket as a file names it: dtypes without "torch.", parts with commas between."""
    return ", ".join(str(part).replace("torch.", "") for part in bucket)


def _object(path: Path, field: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise LaunchTableError(f"{path}: {field}: expected an object, got {value!r}")
    return value


def read(path: Path) -> Configs:
    """The configurations in a file. Raises LaunchTableError where it is malformed."""
    try:
        data = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise LaunchTableError(f"{path}: not JSON: {error}") from None
    data = _object(path, "the file", data)
    if not isinstance(data.get("device"), str):
        raise LaunchTableError(f"{path}: device: expected a name, got {data.get('device')!r}")
    configs: Configs = _object(path, "configs", data.get("configs"))
    for op, buckets in configs.items():
        known = FIELDS.get(op)
        if known is None:
            raise LaunchTableError(
                f"{path}: configs: expected ops among {', '.join(FIELDS)}, got {op!r}"
            )
        for bucket, fields in _object(path, f"configs.{op}", buckets).items():
            place = f"configs.{op}[{bucket!r}]"
            for name, value in _object(path, place, fields).items():
                if name not in known:
                    raise LaunchTableError(
                        f"{path}: {place}: expected fields among {', '.join(known)}, got {name!r}"
                    )
                if type(value) is not int or value not in known[name]:
                    raise LaunchTableError(
                        f"{path}: {place}.{name}: expected one of "
                        f"{', '.join(map(str, known[name]))}, got {value!r}"
                    )
    return configs


def device_name(device: torch.device) -> str | None:
    """The name under which configurations of a device are looked up; None: there are none."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


@functools.cache
def _configs_of(device: torch.device) -> Configs:
    """Read once a device and process."""
    name = device_name(device)
    path = None if name is None else path_of(name)
    return {} if path is None or not path.exists() else read(path)


T = TypeVar("T")


def measured(op: str, device: torch.device, bucket: Sequence[Any], config: T) -> T:
    """`config`, the heuristic's, with the fields that were measured for `bucket` on `device`.

    Raises LaunchTableError where the device's file is malformed.
    """
    buckets = _configs_of(device).get(op)
    if not buckets:
        return config
    fields = buckets.get(name_of(bucket))
    return dataclasses.replace(config, **fields) if fields else config  # type: ignore[type-var]
