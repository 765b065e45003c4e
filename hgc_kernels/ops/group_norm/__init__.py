from hgc_kernels.ops.group_norm import ops as ops
from hgc_kernels.ops.group_norm.api import group_norm as group_norm
