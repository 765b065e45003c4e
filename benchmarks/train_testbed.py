"""Train the testbed's model, or measure the one that is shipped.

    python benchmarks/train_testbed.py --work DIR            # train, resuming from DIR
    python benchmarks/train_testbed.py --evaluate            # the table of docs/testbed.md

Training takes about two hours on two CPU cores; `--device cuda` is the same recipe on a GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The training code is not installed with the package; it is found beside this file, and after
# an installed hgc, so that what is measured is what is installed.
sys.path.append(str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main(argv: list[str] | None = None) -> int:
    """Parse arguments and run; returns the exit status."""
    from benchmarks.testbed_training.run import STAGES, Recipe

    default = Recipe()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--evaluate", action="store_true", help="measure instead of training")
    parser.add_argument("--model", type=Path, help="measure this folder, not the shipped one")
    parser.add_argument("--scenes", type=int, default=64, help="held-out scenes to measure on")
    parser.add_argument("--quick", action="store_true", help="segmentation only, and no controls")
    parser.add_argument("--guidance", type=float, help="guidance scale to measure with")
    parser.add_argument("--sheet", type=Path, help="also write a PNG sheet of samples here")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "testbed", help="checkpoints")
    parser.add_argument("--out", type=Path, default=ROOT / "hgc" / "testbed" / "model")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--compile", action="store_true", help="torch.compile the diffusion part")
    parser.add_argument("--train-scenes", type=int, default=default.scenes)
    parser.add_argument("--steps", type=int, default=default.steps, help="diffusion steps")
    parser.add_argument("--minutes", type=float, help="end the diffusion part after so long")
    parser.add_argument("--vae-steps", type=int, default=default.vae_steps)
    parser.add_argument("--vae-minutes", type=float)
    parser.add_argument("--decoder-steps", type=int, default=default.decoder_steps)
    parser.add_argument("--decoder-minutes", type=float)
    parser.add_argument("--judge-steps", type=int, default=default.judge_steps)
    parser.add_argument("--judge-minutes", type=float)
    parser.add_argument("--batch", type=int, default=default.batch)
    parser.add_argument("--rate", type=float, default=default.peak, help="peak learning rate")
    parser.add_argument("--save-minutes", type=float, default=default.save_minutes)
    args = parser.parse_args(argv)

    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    if args.evaluate:
        from benchmarks.testbed_training.evaluate import evaluate

        evaluate(args.model, args.scenes, args.guidance, args.quick, args.sheet)
        return 0
    from benchmarks.testbed_training.run import train

    recipe = Recipe(
        scenes=args.train_scenes,
        vae_steps=args.vae_steps,
        vae_minutes=args.vae_minutes,
        decoder_steps=args.decoder_steps,
        decoder_minutes=args.decoder_minutes,
        judge_steps=args.judge_steps,
        judge_minutes=args.judge_minutes,
        steps=args.steps,
        minutes=args.minutes,
        batch=args.batch,
        peak=args.rate,
        save_minutes=args.save_minutes,
        compiled=args.compile,
    )

    def log(message: str) -> None:
        print(message, flush=True)

    train(
        recipe,
        args.work,
        args.out,
        stages=tuple(args.stages),
        device=torch.device(args.device),
        log=log,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
