#!/bin/sh
# The GPU tests under compute-sanitizer: reads and writes out of bounds, races, uninitialised reads.
#
#     scripts/check_memory.sh [TOOL...] [SELECTION]
#
# TOOL: memcheck, racecheck; default: both. SELECTION: for pytest's -k; default: the small shapes.
# torch's caching allocator hands out slices of large blocks, between which an overrun is not seen:
# it is switched off.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
small="primes or four_keys or odd or one_pixel or mixed"
tools=""
while [ "${1:-}" = memcheck ] || [ "${1:-}" = racecheck ]; do
    tools="$tools $1"
    shift
done
command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not on the PATH"; exit 127; }
for tool in ${tools:-memcheck racecheck}; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
        "${PYTHON:-python3}" -m pytest -q -m gpu -p no:cacheprovider "$root/tests/kernels/test_gpu.py" \
        -k "not graph and not compiled and (${1:-$small})"
done
