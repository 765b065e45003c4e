from hgc_kernels.ops.gather_blocks import ops as ops
from hgc_kernels.ops.gather_blocks.api import gather_blocks as gather_blocks
