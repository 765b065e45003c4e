from hgc_kernels.ops.apply_map_project import ops as ops
from hgc_kernels.ops.apply_map_project.api import apply_map_project as apply_map_project
