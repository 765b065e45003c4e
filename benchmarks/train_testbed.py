"""Train a testbed model, or measure one.

    python benchmarks/train_testbed.py --work DIR                 # train, resuming from DIR
    python benchmarks/train_testbed.py --recipe other --work DIR  # the second model
    python benchmarks/train_testbed.py --evaluate                 # the table of docs/testbed.md

Training takes about two hours on two CPU cores; `--device cuda --graphs` is the same recipe on a
GPU, each step one CUDA graph.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The training code is not installed with the package; it is found beside this file, and after
# an installed hgc, so that what is measured is what is installed.
sys.path.append(str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

OUT = {
    "shipped": ROOT / "hgc" / "testbed" / "model",
    "other": ROOT / "benchmarks" / "other_model",
}


def main(argv: list[str] | None = None) -> int:
    """Parse arguments and run; returns the exit status."""
    from benchmarks.testbed_training.run import RECIPES, STAGES, train

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--evaluate", action="store_true", help="measure instead of training")
    parser.add_argument("--model", type=Path, help="measure this folder, not the shipped one")
    parser.add_argument("--scenes", type=int, default=64, help="held-out scenes to measure on")
    parser.add_argument("--quick", action="store_true", help="segmentation only, and no controls")
    parser.add_argument("--guidance", type=float, help="guidance scale to measure with")
    parser.add_argument("--sheet", type=Path, help="also write a PNG sheet of samples here")
    parser.add_argument("--recipe", choices=RECIPES, default="shipped", help="which model to train")
    parser.add_argument("--work", type=Path, help="checkpoints; default build/testbed[-other]")
    parser.add_argument("--out", type=Path, help="where to export; default: the model's own place")
    parser.add_argument(
        "--stages", nargs="*", choices=STAGES, help="default: those the recipe needs; none: render"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads")
    own = parser.add_argument_group("in place of the recipe's own")
    own.add_argument("--compile", dest="compiled", action="store_true", default=None)
    own.add_argument(
        "--graphs", dest="captured", action="store_true", default=None, help="on a GPU"
    )
    own.add_argument(
        "--until", type=float, metavar="UNIX_TIME", help="end the stage that runs then"
    )
    own.add_argument("--base", type=Path, help="a model's folder whose VAE is used")
    own.add_argument("--start", type=Path, help="a model's folder to train further")
    own.add_argument("--train-scenes", dest="scenes_", type=int, metavar="N")
    own.add_argument("--steps", type=int, help="diffusion steps")
    own.add_argument("--minutes", type=float, help="end the diffusion part after so long")
    own.add_argument("--batch", type=int)
    own.add_argument("--rate", dest="peak", type=float, help="peak learning rate")
    own.add_argument("--vae-steps", type=int)
    own.add_argument("--vae-minutes", type=float)
    own.add_argument("--decoder-steps", type=int)
    own.add_argument("--decoder-minutes", type=float)
    own.add_argument("--decoder-batch", type=int)
    own.add_argument("--judge-steps", type=int)
    own.add_argument("--judge-minutes", type=float)
    own.add_argument("--save-minutes", type=float)
    args = parser.parse_args(argv)

    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    if args.evaluate:
        from benchmarks.testbed_training.evaluate import evaluate

        evaluate(args.model, args.scenes, args.guidance, args.quick, args.sheet)
        return 0
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    given = {**vars(args), "scenes": args.scenes_}
    recipe = RECIPES[args.recipe]
    fields = {field.name for field in dataclasses.fields(recipe)}
    changes = {name: v for name, v in given.items() if name in fields and v is not None}
    recipe = dataclasses.replace(recipe, **changes)
    if recipe.captured and device.type != "cuda":
        parser.error("--graphs: needs --device cuda")
    stages = args.stages
    if stages is None:
        stages = STAGES if recipe.base is None else ("diffusion",)
    folder = "testbed" if args.recipe == "shipped" else f"testbed-{args.recipe}"

    def log(message: str) -> None:
        print(message, flush=True)

    train(
        recipe,
        args.work or ROOT / "build" / folder,
        args.out or OUT[args.recipe],
        stages=tuple(stages),
        device=device,
        log=log,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
