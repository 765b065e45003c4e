#!/bin/sh
# Releases of torch and of diffusers that hgc supports: the four corners, and two rows between them.
#
#     scripts/check_matrix.sh                  # all rows
#     scripts/check_matrix.sh 2.11.0/0.38.0    # one: torch/diffusers
#     scripts/check_matrix.sh 2.11.0/0.38.0 ops    # of that, one part again
#
# A row installs hgc with its test extra beside those releases and the Triton that this torch requires,
# in an environment of its own, and tests what was installed, not the checkout. Its line in
# docs/compatibility.md ("Releases") is written anew; the others stay. Needs python3.11, 3.12 and 3.13.
# The environments, one for each torch, are made in build/matrix, or in HGC_MATRIX: 1 to 6 GB each; with
# HGC_MATRIX_KEEP=0 each is deleted before the next is made. A row takes some ten minutes on one core.
# Exits with 1 where a part failed.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
work=${HGC_MATRIX:-$root/build/matrix}
mkdir -p "$work"
cd "$root"
export HGC_REQUIRE_EXT=1 HGC_CUDA=0 OMP_NUM_THREADS=1 PIP_DISABLE_PIP_VERSION_CHECK=1
export TORCHINDUCTOR_CACHE_DIR="$work/inductor"  # a killed run leaves truncated libraries in the shared one
failed=0 again=${2:-}

# A part's name, and what its tests are. What fails keeps no later part from being run.
part() {
    name=$1
    shift
    if [ "${again:-$name}" != "$name" ]; then return; fi
    echo "$torch/$diffusers: $name"
    # -P: hgc is what was installed
    "$python" -P -m pytest -q -p no:cacheprovider --junitxml="$row/$name.xml" "$@" \
        >"$row/$name.log" 2>&1 </dev/null || { tail -n 5 "$row/$name.log"; failed=1; }
}

install() {
    "$python" -m pip install "torch==$torch" "triton$triton" &&
        "$python" -m pip install "$root[test]" "torch==$torch" "triton$triton" \
            "diffusers==$diffusers" transformers &&
        "$python" -m pip check
}

while read -r version torch triton diffusers; do
    if [ "${1:-$torch/$diffusers}" != "$torch/$diffusers" ]; then continue; fi
    environment=$work/torch-$torch
    python=$environment/bin/python
    row=$work/$torch-$diffusers
    if [ -z "$again" ]; then rm -rf "$row"; fi
    mkdir -p "$row"
    if [ ! -x "$python" ]; then
        if [ "${HGC_MATRIX_KEEP:-1}" = 0 ]; then rm -rf "$work"/torch-*; fi
        "python$version" -m venv "$environment"
    fi
    echo "$torch/$diffusers: install"
    if install >"$row/install.log" 2>&1 </dev/null; then
        part ops tests/kernels/test_gather_blocks.py tests/kernels/test_apply_map.py \
            tests/kernels/test_dispatch.py::test_opcheck tests/kernels/test_triton.py::test_views \
            tests/kernels/test_library.py -k "not vector_sets"
        part compile tests/test_compile.py
        part exact tests/test_engine.py -k "bitwise or uninstall or lora or tested_with or sdxl"
        part preset tests/test_engine_on_testbed.py -k \
            "bitwise and segmentation or stay_near and paper"
    else
        tail -n 5 "$row/install.log"
        failed=1
    fi
    "$python" scripts/matrix_table.py "$row"
done <<'ROWS'
3.11 2.10.0 ==3.6.0 0.35.2
3.11 2.10.0 ==3.6.0 0.42.1
3.12 2.11.0 ==3.6.0 0.38.0
3.11 2.13.0 ==3.7.1 0.39.0
3.13 2.14.1 ~=3.8.0 0.35.2
3.13 2.14.1 ~=3.8.0 0.42.1
ROWS
exit $failed
