from hgc_kernels.ops.apply_map import ops as ops
from hgc_kernels.ops.apply_map.api import apply_map as apply_map
