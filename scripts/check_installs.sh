#!/bin/sh
# What `pip install .` does in fresh environments: with everything there, and with a part missing.
#
#     scripts/check_installs.sh                    # every case, a few minutes
#     scripts/check_installs.sh no-nvcc no-torch   # some
#
#   constraints  constraints.txt resolves with the torch that PyPI serves; metadata only
#   constraints-page  the same of constraints-page.txt, which the extra `page` has of its own
#   full         torch there: the CPU and the CUDA library and the introspection module
#   no-torch     `pip install .` and nothing else, in an empty environment: the same (6 GB for a while)
#   no-nvcc      no CUDA compiler: all but the CUDA library
#   no-compiler  no C++ compiler: nothing compiled, the ops run their references, the import says so
#   no-ext       HGC_NO_EXT=1: as without a compiler
#   require      HGC_REQUIRE_EXT=1 and no C++ compiler: an error
#   old-python   a Python that is too old (OLD_PYTHON names it; left out without it): an error
#
# PYTHON chooses the interpreter. The environments are made in a temporary folder and removed.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset HGC_REQUIRE_EXT HGC_NO_EXT HGC_CUDA HGC_TORCH_INCLUDE CXX CUDACXX || true

# A folder with links to every program on PATH but those whose names begin with one of the given
# ones.
path_without() {
    folder=$work/path-$1
    mkdir -p "$folder"
    old_ifs=$IFS
    IFS=:
    for part in $PATH; do
        for program in "$part"/*; do
            name=${program##*/}
            for prefix in "$@"; do
                case $name in "$prefix"*) continue 2 ;; esac
            done
            [ -e "$folder/$name" ] || ln -s "$program" "$folder/$name" 2>/dev/null || true
        done
    done
    IFS=$old_ifs
    echo "$folder"
}

# environment CASE: the Python environment of a case, made when first asked for.
environment() {
    if [ "$1" = no-torch ]; then
        [ -d "$work/no-torch" ] || "$python" -m venv "$work/no-torch" >&2
        echo "$work/no-torch"
        return
    fi
    if [ ! -d "$work/torch" ]; then
        "$python" -m venv "$work/torch" >&2
        "$work/torch/bin/pip" install --quiet -c "$root/constraints.txt" torch >&2
    fi
    echo "$work/torch"
}

# A copy: the build leaves its folders in the source tree.
install() {
    rm -rf "$work/source"
    mkdir "$work/source"
    (cd "$root" && tar cf - --exclude ./.git --exclude ./build --exclude ./outputs \
        --exclude ./hgc_kernels/lib --exclude './hgc_kernels/_native*' .) | tar xf - -C "$work/source"
    folder=$(environment "$1")
    options="-c $root/constraints.txt"
    [ "$1" != no-torch ] || options=
    shift
    "$folder/bin/pip" uninstall --quiet --yes hybrid-grained-cache
    began=$(date +%s)
    # shellcheck disable=SC2086
    env "$@" "$folder/bin/pip" install --quiet $options "$work/source" || return 1
    echo "installed in $(($(date +%s) - began)) s"
}

# expect CASE LIBRARIES LEFT_OUT [REASON]: words each, compared with what the install says of itself,
# in `hgc info` and, where the CPU library is left out, at the first import.
expect() {
    folder=$(environment "$1")
    (cd "$work" && "$folder/bin/hgc" info && "$folder/bin/python" - "$2" "$3" "${4-}" <<'PYTHON'
import sys
import warnings
import torch
with warnings.catch_warnings(record=True) as said:
    import hgc_kernels as hk
built, left_out = (set(words.split()) for words in sys.argv[1:3])
said = [str(warning.message) for warning in said if "hgc_kernels" in str(warning.message)]
assert len(said) == ("cpu" in left_out), said
assert all(f"libhgc_cpu.so was left out of this install ({sys.argv[3]}" in one for one in said), said
info = hk.build_info()
assert set(info["left_out"]) == left_out, info["left_out"]
assert set(info["native"]) == built, info["native"]
x = torch.randn(1, 4, 8, 8)
assert torch.equal(hk.gather_blocks(x, x, x), torch.cat([x, x + x], 1))
chosen = hk.backends()["gather_blocks"]["cpu"]
assert chosen[0] == ("native" if "cpu" in built else "reference"), chosen
PYTHON
    )
    echo "$1: as it should be"
}

run() {
    echo "== $1"
    case $1 in
        constraints | constraints-page)
            extra=test
            [ "$1" = constraints ] || extra=page
            "$python" -m venv "$work/resolver"
            "$work/resolver/bin/pip" install --quiet --upgrade pip
            # "===" passes by a local build of that torch, whose requirements are others.
            torch=$(sed -n 's/^torch==/torch===/p' "$root/$1.txt")
            (cd "$root" && "$work/resolver/bin/pip" install --quiet --use-feature=fast-deps --dry-run \
                -c "$1.txt" "$torch" ".[$extra]")
            echo "$1: as they should be"
            ;;
        full | no-torch)
            install "$1"
            expect "$1" "cpu cuda introspection" ""
            ;;
        no-nvcc)
            install no-nvcc PATH="$(path_without nvcc)" CUDA_HOME=/nonexistent CUDA_PATH=
            expect no-nvcc "cpu introspection" "cuda"
            ;;
        no-compiler)
            install no-compiler PATH="$(path_without c++ g++ clang++)"
            expect no-compiler "" "cpu cuda introspection" "no C++ compiler was found"
            ;;
        no-ext)
            install no-ext HGC_NO_EXT=1
            expect no-ext "" "cpu cuda introspection" "HGC_NO_EXT=1 was set"
            ;;
        old-python)
            [ -n "${OLD_PYTHON-}" ] || { echo "old-python: OLD_PYTHON names none"; return; }
            "$OLD_PYTHON" -m venv "$work/old"
            if "$work/old/bin/pip" install "$root" > "$work/log" 2>&1; then
                echo "old-python: installed" >&2
                exit 1
            fi
            grep "hgc needs Python >= 3.11, and this is Python" "$work/log"
            ;;
        require)
            if install require HGC_REQUIRE_EXT=1 PATH="$(path_without c++ g++ clang++)" \
                > "$work/log" 2>&1; then
                echo "require: installed without a compiler" >&2
                exit 1
            fi
            grep "the cpu part was demanded, but no C++ compiler was found" "$work/log"
            echo "require: as it should be"
            ;;
        *) echo "$1: no such case" >&2 && exit 2 ;;
    esac
}

[ $# -gt 0 ] || set -- constraints constraints-page full no-torch no-nvcc no-compiler no-ext require old-python
for case in "$@"; do run "$case"; done
