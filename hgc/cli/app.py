"""The commands and their options. What they do stands in a module each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hgc.cli.console import reports_errors

app = typer.Typer(
    help="Hybrid-grained cache for diffusers ControlNet pipelines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_Conditions = Annotated[
    str, typer.Option(help="'all', or names with commas between: segmentation,canny,softedge,depth")
]
_ControlNet = Annotated[
    list[Path] | None,
    typer.Option("--controlnet", help="Folder of a ControlNet; may be given several times"),
]


def _version(wanted: bool) -> None:
    if wanted:
        import hgc

        typer.echo(f"hgc {hgc.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version"),
    ] = False,
) -> None:
    pass


@app.command()
@reports_errors
def plan(
    model: Annotated[
        str, typer.Option(help="sd15, sdxl, testbed, or a pipeline's or UNet's folder")
    ] = "sd15",
    config: Annotated[
        str | None,
        typer.Option("--config", "-c", help="A preset or a JSON file; none: compare all presets"),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Evaluations; default: what the plan is meant for")
    ] = None,
    size: Annotated[str | None, typer.Option(help="Pixels: H or HxW; default: the model's")] = None,
    guidance: Annotated[bool, typer.Option(help="Classifier-free guidance")] = True,
    draw_all: Annotated[
        bool, typer.Option("--all", help="Draw every preset's plan below the comparison")
    ] = False,
    controlnet: _ControlNet = None,
) -> None:
    """What is computed and what is reused, and the MACs of it. Needs no weights."""
    from hgc.cli.plan import run

    run(model, controlnet or [], config, steps, size, guidance, draw_all)


@app.command()
@reports_errors
def info() -> None:
    """Versions, and the backend of each op with the reason for it."""
    from hgc.cli.info import run

    run()


@app.command()
@reports_errors
def demo(
    out: Annotated[Path, typer.Option(help="The picture to write")] = Path("hgc-demo.png"),
    conditions: _Conditions = "all",
    scenes: Annotated[int, typer.Option(min=1, help="Scenes a condition")] = 4,
    presets: Annotated[
        str, typer.Option(help="Presets or JSON files, with commas between")
    ] = "exact,paper,balanced,fast,turbo",
    seed: Annotated[int, typer.Option(min=0, help="Other noise")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the uncached run")] = 20,
    show: Annotated[int, typer.Option(min=1, help="Scenes of a condition in the picture")] = 1,
    html: Annotated[
        Path | None,
        typer.Option(help="Also write a page to this file: slider, figures, what each step did"),
    ] = None,
) -> None:
    """The shipped model with and without the cache: a table, and the pictures side by side."""
    from hgc.cli.demo import run

    run(out, conditions, scenes, presets, seed, steps, show, html)


@app.command()
@reports_errors
def page(
    model: Annotated[str, typer.Option(help="testbed, or a pipeline's folder")] = "testbed",
    controlnet: _ControlNet = None,
    host: Annotated[
        str, typer.Option(help="Address to serve at; default: this machine only")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Default: the first free one from 7860 on")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
) -> None:
    """A page to draw on and to compare with and without the cache. Needs the extra `page`."""
    from hgc.cli.page import run

    run(model, controlnet or [], host, port, device)


@app.command("eval")
@reports_errors
def evaluate(
    conditions: _Conditions = "all",
    scenes: Annotated[
        int | None,
        typer.Option(min=1, help="Scenes a condition; default: 64 of the testbed, all of --data"),
    ] = None,
    rows: Annotated[
        str,
        typer.Option(
            help="With commas between: presets, calibrated, peers, fewer-steps, a preset, "
            "skip-x0, fewer-steps-calibrated, spectrum-6, ays, deepcache-3, "
            "deepcache-pypi-3, 6-steps, a plan.json; with @dpm++2m another scheduler"
        ),
    ] = "presets,fewer-steps",
    steps: Annotated[int, typer.Option(min=1, help="Steps of the uncached run")] = 20,
    out: Annotated[Path, typer.Option(help="Folder of the record and the tables")] = Path(
        "hgc-eval"
    ),
    first_scene: Annotated[
        int, typer.Option("--first-scene", "--start", min=0, help="First of the scenes")
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Other noise")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Pictures a pipeline call")] = 8,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    quick: Annotated[
        bool, typer.Option("--quick", help="At most 8 scenes a condition: a first look")
    ] = False,
    scheduler: Annotated[
        str | None, typer.Option(help="unipc, dpm++2m, ddim, deis, euler, or one with -trailing")
    ] = None,
    rival_schedulers: Annotated[
        str,
        typer.Option(help="Of the runs with fewer steps; tables show the nearest of them"),
    ] = "unipc,dpm++2m,dpm++2m-trailing",
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale; default: 3.5, or 7.5 with --model")
    ] = None,
    testbed: Annotated[
        Path | None,
        typer.Option(help="Another model on the testbed's scenes, as benchmarks/other_model"),
    ] = None,
    model: Annotated[str, typer.Option(help="testbed, or a pipeline's folder")] = "testbed",
    controlnet: Annotated[Path | None, typer.Option(help="Folder of a ControlNet")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of pictures with a metadata.jsonl")
    ] = None,
    judge: Annotated[
        Path | None,
        typer.Option(help="Folder of a segmentation or depth model of transformers"),
    ] = None,
    clip: Annotated[
        Path | None, typer.Option(help="Folder of a CLIPModel, for the agreement with the prompt")
    ] = None,
    size: Annotated[str | None, typer.Option(help="Pixels: H or HxW; default: the model's")] = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="Pictures of each line of --data; default: 4")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, fp16 or bf16; default: fp16 on cuda")
    ] = None,
    jod: Annotated[
        bool, typer.Option("--jod", help="Also JOD of ColorVideoVDP: needs the extra `jod`")
    ] = False,
) -> None:
    """Fidelity and distance over many scenes. Goes on where it was interrupted.

    By default the shipped testbed; with --testbed another model of its scenes; with --model and
    --data a checkpoint and a folder of pictures.
    """
    from hgc.cli.evaluate import Local, run

    local = Local(controlnet, data, judge, clip, size, images, dtype)
    run(
        conditions, scenes, rows, steps, out, first_scene, seed, batch, device, quick, scheduler,
        rival_schedulers, guidance, testbed, model, local, jod,
    )  # fmt: skip


@app.command()
@reports_errors
def bench(
    model: Annotated[
        str, typer.Option(help="sd15 or sdxl (random weights), testbed, or a pipeline's folder")
    ] = "sd15",
    controlnet: _ControlNet = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    size: Annotated[str | None, typer.Option(help="Pixels: H or HxW; default: the model's")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the uncached run")] = 20,
    presets: Annotated[
        str, typer.Option(help="Presets or JSON files, with commas between")
    ] = "paper,fast",
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved rounds")] = 5,
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16")] = "fp32",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; default: torch's own")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write every sample to this file")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images a call")] = 1,
    modes: Annotated[
        str,
        typer.Option(
            help="eager, fused, compiled; on CUDA captured, fused-captured, graphs; with commas"
        ),
    ] = "eager",
    fewer_steps: Annotated[
        bool, typer.Option("--fewer-steps", help="Also fewer uncached steps at equal MACs")
    ] = False,
    peers: Annotated[
        str, typer.Option(help="deepcache-2, deepcache-3, deepcache-5: needs the extra `peers`")
    ] = "",
    markdown: Annotated[Path | None, typer.Option(help="Write the table to this file")] = None,
    chart: Annotated[Path | None, typer.Option(help="Write a bar chart to this file")] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="unipc, dpm++2m, ddim, deis, euler, or one with -trailing")
    ] = None,
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="Both networks in channels_last")
    ] = False,
) -> None:
    """Time a pipeline with and without hgc, interleaved, and compare with what its MACs promise."""
    from hgc.cli.bench import run

    run(
        model, controlnet or [], device, size, steps, presets, repeats, dtype, threads, json_file,
        batch, modes, fewer_steps, peers, markdown, chart, scheduler, channels_last,
    )  # fmt: skip


@app.command()
@reports_errors
def calibrate(
    out: Annotated[Path, typer.Option(help="The plan to write, a JSON file")] = Path(
        "hgc-plan.json"
    ),
    model: Annotated[str, typer.Option(help="testbed, or a pipeline's folder")] = "testbed",
    controlnet: _ControlNet = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of condition images, each with its prompt in NAME.txt"),
    ] = None,
    condition: Annotated[
        str | None, typer.Option(help="Of the testbed; default: segmentation")
    ] = None,
    max_macs: Annotated[
        float | None, typer.Option(help="Budget: share of the uncached run's MACs, 0 to 1")
    ] = None,
    max_distance: Annotated[
        float | None, typer.Option(help="Or: largest relative L2 of the latents, mean")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Or: a preset, whose MACs are the budget")
    ] = None,
    steps: Annotated[int, typer.Option(min=3, help="Steps of the uncached run")] = 20,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale; default: the pipeline's")
    ] = None,
    inputs: Annotated[int, typer.Option(min=1, help="Inputs to measure on")] = 8,
    trials: Annotated[int, typer.Option(min=4, help="Plans to try")] = 60,
    rounds: Annotated[int, typer.Option(min=0, help="Rounds that refine the coefficients")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the search and of the noise")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
) -> None:
    """Find the plan that comes nearest to the uncached pictures within a budget."""
    from hgc.cli.calibrate import run

    run(
        out, model, controlnet or [], data, condition, max_macs, max_distance, preset, steps,
        guidance, inputs, trials, rounds, seed, device,
    )  # fmt: skip


@app.command()
@reports_errors
def generate(
    model: Annotated[str, typer.Option(help="testbed, or a pipeline's folder")] = "testbed",
    controlnet: Annotated[
        Path | None, typer.Option(help="Folder of a ControlNet; default: the pipeline's own")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Folder with a metadata.jsonl, .jsonl, .parquet or webdataset's .tar files, a "
            "folder or a pattern of them; default: scenes of the testbed"
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the pictures")] = Path("hgc-pictures"),
    config: Annotated[
        str, typer.Option("--config", "-c", help="A preset or a JSON file")
    ] = "balanced",
    images: Annotated[int, typer.Option(min=1, help="Pictures of each item")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Other noise")] = 0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps; default: what the plan is meant for")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale; default: 7.5, or 3.5 for the testbed")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures a pipeline call")] = 8,
    size: Annotated[str | None, typer.Option(help="Pixels: H or HxW; default: the model's")] = None,
    resize: Annotated[
        str | None,
        typer.Option(help="nearest or bicubic: resize other conditions; default: they fail"),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, fp16 or bf16; default: fp16 on cuda")
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, or cuda:0,cuda:1 for one worker each")
    ] = "cpu",
    picture_format: Annotated[
        str, typer.Option("--format", help="webdataset, parquet (extra `parquet`) or folder")
    ] = "webdataset",
    shard: Annotated[int, typer.Option(min=1, help="Items of each file")] = 64,
    keep_conditions: Annotated[
        bool, typer.Option("--keep-conditions", help="Write each picture's condition beside it")
    ] = False,
    root: Annotated[
        Path | None, typer.Option(help="Folder that conditions' paths lie under; default: data's")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Items at most")] = None,
    condition: Annotated[str, typer.Option(help="Of the testbed")] = "segmentation",
    engine: Annotated[
        str, typer.Option(help="local: this process; ray: a cluster (extra `ray`)")
    ] = "local",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Actors of Ray; default: one a GPU")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster that runs; default: one is started")
    ] = None,
    check: Annotated[
        float, typer.Option(help="Share of the batches made without hgc too, 0 to 1")
    ] = 0.0,
    max_distance: Annotated[
        float | None, typer.Option(help="Stop where --check finds a larger mean distance")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at the first item that fails")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Where --out holds another run, start beside it")
    ] = False,
) -> None:
    """Make a data set: pictures of a table of conditions and texts. Goes on where it was killed."""
    from hgc.cli.generate import run

    run(
        data, out, size, device,
        model=model, controlnet=controlnet, config=config, images=images, seed=seed, steps=steps,
        guidance=guidance, batch=batch, resize=resize, dtype=dtype, format=picture_format,
        shard=shard, keep_conditions=keep_conditions, root=root, limit=limit, condition=condition,
        engine=engine, workers=workers, address=address, check=check, max_distance=max_distance,
        strict=strict, force=force,
    )  # fmt: skip
