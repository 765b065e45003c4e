#!/bin/sh
# What scripts/gpu_suite.py needs on a GPU machine without a network, into a folder: the compiled
# libraries, and the wheels that are missing there.
#
#     PYTHON=python3.12 scripts/gpu_carry.sh FOLDER [ARCHITECTURES]
#
# PYTHON must be of that machine's version, with its torch, and cmake, ninja, pybind11 and setuptools.
# ARCHITECTURES: of its GPU, 90 (H100, H200) by default.
set -eu
folder=$1
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
built=$(mktemp -d)
trap 'rm -rf "$built"' EXIT
mkdir -p "$folder/wheels" "$folder/hgc_kernels"
HGC_CUDA_ARCHITECTURES=${2:-90} HGC_REQUIRE_EXT=1 \
    "$python" -m pip install -q --no-build-isolation --no-deps --target "$built" "$root"
cp -r "$built"/hgc_kernels/lib "$built"/hgc_kernels/_native* "$folder/hgc_kernels/"
"$python" -m pip download -q --no-deps --only-binary=:all: -d "$folder/wheels" \
    diffusers==0.42.1 DeepCache==0.1.1
du -sh "$folder"
"$python" "$root/scripts/gpu_suite.py" --dry-run | head -n 1
