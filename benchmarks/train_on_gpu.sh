#!/usr/bin/env bash
# Train the second model, and the shipped VAE's decoder further, on one GPU within some seconds.
#
#     benchmarks/train_on_gpu.sh OUT [SECONDS] [OPTIONS of train_testbed.py for both]
#
# OUT gets other_model.tar (the folder benchmarks/other_model), vae.tar (the folder vae) and the
# logs. Both run at once; what fails as CUDA graphs is run again without, and what was exported
# before a failure is kept. PYTHON, WORK (scratch) and DEVICE may be set.
set -u
out=$1
seconds=${2:-200}
shift $(($# < 2 ? $# : 2))
end=$(($(date +%s) + seconds))
python=${PYTHON:-python}
device=${DEVICE:-cuda}
work=${WORK:-$(mktemp -d)}
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$out" "$work/decoder"

# Trains until $1 seconds before the end, which leaves time to export, and is stopped 3 before it.
train() {
    local margin=$1 graphs status
    shift
    for graphs in --graphs ""; do
        [ "$device" = cuda ] || [ -z "$graphs" ] || continue
        [ $((end - $(date +%s))) -gt $((margin + 5)) ] || break
        echo "$(date +%T) begins $graphs"
        timeout $((end - $(date +%s) - 3)) "$python" "$here/train_testbed.py" \
            --recipe other --device "$device" $graphs --until $((end - margin)) "$@"
        status=$?
        echo "$(date +%T) ended with status $status"
        [ $status = 0 ] && return
    done
    return 1
}

{
    # The diffusion part renders the scenes for both.
    until compgen -G "$work/scenes_*.npz" || [ "$(date +%s)" -ge $((end - 20)) ]; do sleep 0.2; done
    ln -sf "$work"/scenes_*.npz "$work/decoder/"
    train 12 --stages decoder --decoder-steps 1000000 --decoder-minutes 1.5 --decoder-batch 32 \
        --work "$work/decoder" --out "$work/shipped" "$@"
} >"$out/decoder.log" 2>&1 &
train 14 --stages diffusion --steps 1000000 --save-minutes 0.75 \
    --work "$work" --out "$work/other_model" "$@" >"$out/diffusion.log" 2>&1
wait

status=0
tar -C "$work" -cf "$out/other_model.tar" other_model || status=1
tar -C "$work/shipped" -cf "$out/vae.tar" vae || status=1
tail -n 3 "$out/diffusion.log" "$out/decoder.log"
ls -l "$out"
exit $status
