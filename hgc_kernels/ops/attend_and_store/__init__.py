from hgc_kernels.ops.attend_and_store import ops as ops
from hgc_kernels.ops.attend_and_store.api import attend_and_store as attend_and_store
