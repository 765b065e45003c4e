"""Tensor ops of the hybrid-grained cache, usable without diffusers. The same ops stand under
`torch.ops.hgc`.
"""

from hgc_kernels import versions  # noqa: F401  first: refuses what is too old for the others
from hgc_kernels.backend import BackendError, backends, get_backend, set_backend, use_backend
from hgc_kernels.library import build_info, say_what_is_missing
from hgc_kernels.map_format import FORMATS, map_bytes, map_probabilities, new_map, padded
from hgc_kernels.ops.apply_map import apply_map
from hgc_kernels.ops.attend_and_store import attend_and_store
from hgc_kernels.ops.gather_blocks import gather_blocks
from hgc_kernels.ops.group_norm import group_norm

__all__ = [
    "FORMATS",
    "BackendError",
    "apply_map",
    "attend_and_store",
    "backends",
    "build_info",
    "gather_blocks",
    "get_backend",
    "group_norm",
    "map_bytes",
    "map_probabilities",
    "new_map",
    "padded",
    "set_backend",
    "use_backend",
]

say_what_is_missing()
