#!/bin/sh
# The random calls of tests/kernels against a CPU library built with AddressSanitizer and
# UndefinedBehaviorSanitizer.
#
#     scripts/sanitize.sh            # 2,000 calls an op
#     scripts/sanitize.sh 200
#
# Linux and gcc; PYTHON and CXX choose others.
set -eu
calls=${1:-2000}
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
cxx=${CXX:-g++}
build=$root/build/sanitized
include=$("$python" -c "import sys; sys.path.insert(0, '$root/scripts'); import find_tools; print(find_tools.torch_include())")
cmake -S "$root" -B "$build" -G Ninja -DCMAKE_CXX_COMPILER="$cxx" -DCMAKE_BUILD_TYPE=Debug -DHGC_TARGET=cpu \
    -DHGC_SANITIZE=ON -DHGC_TORCH_INCLUDE="$include" -DHGC_LIBRARY_FOLDER="$build/lib" > "$build.log"
cmake --build "$build" >> "$build.log" || { tail -20 "$build.log"; exit 1; }
# The sanitizers must be in the process before anything allocates. Leaks are Python's own: it frees
# little at exit. torch's allocations come through posix_memalign, which the sanitizer watches too.
for isa in ${HGC_CPU_ISA:-avx512_bf16 avx512 avx2 baseline}; do
    echo "vector set: $isa"
    HGC_CPU_ISA=$isa HGC_LIBRARY_FOLDER=$build/lib HGC_RANDOM_CALLS=$calls \
        LD_PRELOAD="$("$cxx" -print-file-name=libasan.so) $("$cxx" -print-file-name=libubsan.so)" \
        ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
        "$python" -m pytest -q -p no:cacheprovider "$root/tests/kernels/test_random_calls.py" \
        -k "gather_blocks or apply_map"
done
