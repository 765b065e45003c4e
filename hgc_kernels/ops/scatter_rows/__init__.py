from hgc_kernels.ops.scatter_rows import ops as ops
from hgc_kernels.ops.scatter_rows.api import scatter_rows as scatter_rows
