"""``hgc calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hgc.cli.console import CliError, as_usage, console, needs, progress, quiet_libraries, writable
from hgc.cli.results import chosen_conditions

__all__ = ["run"]

# Scenes that neither training nor a table uses.
_FIRST_SCENE = 10_000
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def run(
    out: Path,
    model: str,
    controlnet: list[Path],
    data: Path | None,
    condition: str | None,
    max_macs: float | None,
    max_distance: float | None,
    preset: str | None,
    steps: int,
    guidance: float | None,
    count: int,
    trials: int,
    rounds: int,
    seed: int,
    device: str,
) -> None:
    """Search a plan and write it to ``out``."""
    if [max_macs, max_distance, preset].count(None) != 2:
        raise CliError("give --max-macs, --max-distance or --preset, one of the three")
    if model == "testbed" and (controlnet or data is not None):
        raise CliError("--controlnet and --data go with --model, the folder of a pipeline")
    if model != "testbed" and condition is not None:
        raise CliError("--condition is one of the testbed's; it does not go with --model")
    needs("calibrate", "transformers", "PIL")
    quiet_libraries()
    writable(out)

    import hgc

    pipe, inputs = (
        _testbed(condition or "segmentation", count, guidance)
        if model == "testbed"
        else _local(Path(model), controlnet, data, count, guidance)
    )
    if device != "cpu":
        from hgc.cli.evaluate import check_device

        check_device(device)
        pipe.to(device)
    with progress() as bar, as_usage(ValueError, TypeError):
        config = hgc.calibrate(
            pipe, inputs, max_macs=max_macs, max_distance=max_distance, preset=preset, steps=steps,
            trials=trials, rounds=rounds, seed=seed, name=out.stem, on_progress=bar,
        )  # fmt: skip
    with as_usage(OSError):
        config.to_json(out)
    found = config.calibration
    assert found is not None
    printer = console()
    printer.print(
        f"{found.steps} steps, key steps {' '.join(map(str, config.key_steps or ()))}, depth "
        f"{config.depth}: {found.macs_share:.1%} of the MACs of {found.uncached_steps} steps, "
        f"distance {found.distance:.4f} (worst {found.distance_worst:.4f}); {found.fewer_steps} "
        f"uncached steps: {found.fewer_steps_distance:.4f}",
        soft_wrap=True,
    )
    printer.print(f"wrote {out.resolve()}", soft_wrap=True)


def _testbed(condition: str, count: int, guidance: float | None) -> tuple[Any, list[Any]]:
    from hgc import testbed

    name, *more = chosen_conditions(condition)
    if more:
        raise CliError(f"--condition must be one condition; got {condition!r}")
    with as_usage(FileNotFoundError):
        pipe = testbed.load_pipeline(name)
    scale = testbed.GUIDANCE_SCALE if guidance is None else guidance
    scenes = testbed.held_out(count, _FIRST_SCENE)
    return pipe, [
        {
            "prompt": scene.caption,
            "image": testbed.condition_image(scene, name),
            "guidance_scale": scale,
        }
        for scene in scenes
    ]


def _local(
    folder: Path, nets: list[Path], data: Path | None, count: int, guidance: float | None
) -> tuple[Any, list[Any]]:
    """A pipeline from a folder, and the pictures of ``data`` with the prompts beside them."""
    from hgc.evaluation.folder import rgb
    from hgc.evaluation.models import load_folder

    if not (folder / "model_index.json").exists():
        raise CliError(f"--model {folder}: holds no model_index.json, so no diffusers pipeline")
    if data is None:
        raise CliError("--data: a folder of condition images, each with its prompt in a .txt file")
    found = sorted(p for p in data.glob("*") if p.suffix.lower() in _PICTURES)[:count]
    if not found:
        raise CliError(f"--data {data}: holds no {', '.join(_PICTURES)} file")
    missing = [p for p in found if not p.with_suffix(".txt").exists()]
    if missing:
        raise CliError(f"--data {data}: {missing[0].name} has no prompt; expected "
                       f"{missing[0].with_suffix('.txt').name} beside it")  # fmt: skip

    pipe = load_folder(folder, nets)
    more = {} if guidance is None else {"guidance_scale": guidance}
    single = len(nets) < 2
    inputs = []
    for path in found:
        prompt = path.with_suffix(".txt")
        with as_usage(ValueError):
            picture = rgb(path)
        try:
            text = prompt.read_text(encoding="utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise CliError(f"cannot read the prompt {prompt}: {error}") from None
        inputs.append(
            {
                "prompt": text,
                "image": picture if single else [picture] * len(nets),
                **more,
            }
        )
    return pipe, inputs
