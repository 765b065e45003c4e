#!/bin/sh
# The libraries built here, unchanged, under another torch: its op tests in an environment of its own.
#
#     scripts/check_other_torch.sh 2.14.1
#
# Nothing is compiled. The environment is kept in build/ and used again.
set -eu
version=${1:?usage: $0 TORCH_VERSION}
root=$(cd "$(dirname "$0")/.." && pwd)
environment=$root/build/torch-$version
for library in "$root"/hgc_kernels/lib/libhgc_cpu.so; do
    test -f "$library" || { echo "$library was not built: pip install -e . first" >&2; exit 1; }
done
if [ ! -x "$environment/bin/python" ]; then
    "${PYTHON:-python3}" -m venv "$environment"
    "$environment/bin/pip" install --quiet "torch==$version" numpy pytest pytest-timeout hypothesis
fi
cd "$root"
# The tests of the pipelines need diffusers, which this environment does without: only tests/kernels
# is run, and without the conftest of the others.
PYTHONPATH=$root HGC_CPU_ISA= "$environment/bin/python" - <<'PYTHON'
import torch

import hgc_kernels

info = hgc_kernels.build_info()
print("torch", torch.__version__, info["libraries"])
assert info["libraries"]["cpu"] == "loaded", info
PYTHON
PYTHONPATH=$root "$environment/bin/python" -m pytest -q --confcutdir="$root/tests/kernels" \
    tests/kernels/test_gather_blocks.py tests/kernels/test_apply_map.py -k "not vector_sets"
