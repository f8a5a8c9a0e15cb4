"""The command line: parse, call one library function, print. Results on stdout, progress on stderr."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import click

import edgeres
from edgeres import cli_device, cli_results, progress
from edgeres.cli_results import show_results
from edgeres.command import Commands, command_of, job
from edgeres.errors import UsageError
from edgeres.options import PATH


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(edgeres.__version__, prog_name="edgeres")
def cli() -> None:
    """ResNet-50 from PyTorch to a quantized engine, with proof of what that cost and what it won.

    Options not given come from edgeres.toml in this folder or one above it.
    """


command = functools.partial(command_of, cli)
NETWORK = ("depth", "variant", "weights")
EXPORT = ("input-size", "resize", "opset", "batch", "calibration", "seed", "skip-bad")
MEASURE = ("model", "calibration", "equalize", "calibration-limit", "seed", "skip-bad", "force")
QUANTIZE = ("precision", "target", "tensorrt", "io", "method", "weight-scales", *MEASURE)


@command(*NETWORK, "classes", *EXPORT, "force", "output")
def export(show: Any, output: Path | None, **options: Any) -> None:
    """PyTorch weights -> FP32 ONNX, parity and variant checked."""
    from edgeres import baseline

    _show_model(show, baseline.export(job(**options), output))


@command("like", *EXPORT, "output")
@click.argument("path", type=PATH)
def import_(show: Any, path: Path, like: str | None, output: Path | None, skip_bad: bool) -> None:
    """Somebody's ONNX file -> the FP32 ONNX that export writes.

    No ONNX file says how images are prepared: name it with --like, or in the workspace under [preprocess].
    """
    from edgeres import baseline

    work = job(skip_bad=skip_bad)
    preprocess = baseline.preprocess_like(work.recipe, like)
    output = output or work.root / "engines" / "out" / f"{path.stem}.onnx"
    _show_model(show, baseline.import_model(work, path, preprocess, output))


def _show_model(show: Any, path: Path) -> None:
    from edgeres import graph

    show({"model": str(path), **graph.metadata(graph.load(path))}, str(path))


@command("like", "input-size", "resize", "labels", "limit", "seed", "model", "skip-bad", "output", resumes=True)
@click.argument("source", metavar="SOURCE")
def pack(show: Any, source: str, like: str | None, model: Path | None, skip_bad: bool, output: Path | None) -> None:
    """Images -> one file of preprocessed pixels.

    A pack is read at memory speed and needs no image library. It holds images for one preprocessing: that of --like,
    of --model, or of the workspace.
    """
    from edgeres.baseline import preprocess_like
    from edgeres.layouts import open_images
    from edgeres.pack import write_pack
    from edgeres.remote import place

    recipe = job().recipe
    preprocess = preprocess_like(recipe, like or (str(model) if model else None), default=True)
    at = place(source)
    if at.suffix == ".pack":
        raise UsageError(f"{at} is a pack already", hint="give the images it was made from")
    images = open_images(at, recipe.validation.labels)
    # the limit of the workspace is for judging, not for packing: only a flag counts
    limit = click.get_current_context().meta.get("flags", {}).get("validation", {}).get("limit")
    path = output or Path(f"{at.resolve().name if at == Path() else at.name}.pack")
    packed = write_pack(images.subset(limit, recipe.seed), preprocess, path, skip_bad=skip_bad)
    progress.say(f"{path}: {len(packed):,} of {len(images):,} images")
    show({"pack": str(path), "images": len(packed), "preprocess": preprocess.to_json()}, str(path))


@command(*NETWORK, *MEASURE, "output", resumes=True)
def calibrate(show: Any, output: Path | None, **options: Any) -> None:
    """FP32 ONNX + images -> range table."""
    from edgeres.ranges import calibrate_model

    path = calibrate_model(job(**options), output)
    show({"table": str(path)}, str(path))


@command(*NETWORK, *QUANTIZE, "build", "output", resumes=True)
def quantize(show: Any, output: Path | None, **options: Any) -> None:
    """FP32 ONNX + range table -> typed ONNX for a target."""
    from edgeres import graph
    from edgeres.recipe import ON_DEVICE
    from edgeres.trtexec import trtexec
    from edgeres.typed import quantize_model, target_of

    work = job(**options)
    path = quantize_model(work, output)
    value = {"onnx": str(path), **graph.metadata(graph.load(path))}
    # for a graph that TensorRT calibrates by itself trtexec has no images: it would take noise
    if (target := target_of(work)).executor == "tensorrt" and work.recipe.calibration.method not in ON_DEVICE:
        value["trtexec"] = trtexec(path, value["precision"], target, value["preprocess"]["crop"], value["batch"])
        progress.say(f"where edgeres itself does not run: {value['trtexec']}")
        if target.implicit and value["precision"] == "int8":  # NVIDIA/TensorRT: issue 1378, RndInt8Calibrator
            progress.say(f"with TensorRT {target.tensorrt} alone: another skips the cache, and trtexec takes noise")
    show(value, str(path))


@command(*NETWORK, *QUANTIZE, "build", "output", resumes=True)
def build_engine(show: Any, output: Path | None, **options: Any) -> None:
    """Build an engine, and whatever it needs that is missing."""
    from edgeres import pipeline

    engine = pipeline.ensure_engine(job(**options), output)
    show({"engine": str(engine.path), **engine.record}, str(engine.path))


JUDGE = ("data", "limit", "max-drop", "min-relative", "accepted", "seed", "skip-bad")


@command("depth", "variant", "precision", "target", "model", "labels", *JUDGE, "shard", "ray", "ray-cpus", resumes=True)
@click.argument("engines", nargs=-1, type=PATH)
def validate(
    show: Any, engines: tuple[Path, ...], shard: str | None, ray: str | None, ray_cpus: int | None, **options: Any
) -> None:
    """Engines against the FP32 baseline: accuracy, latency.

    Without ENGINES, the workspace's engine for --precision and --target. A run that was cut short goes on; one with
    --ray begins anew, and measures no latency. Exit status 1 if --max-drop or the recipe's budget is not shown to be
    met.
    """
    from edgeres import pipeline
    from edgeres.build import Engine
    from edgeres.fleet import Fleet
    from edgeres.validate import Shard

    if ray == "":
        raise UsageError("--ray names no cluster", hint="give auto, or host:port; an unset variable may be behind this")
    if ray_cpus and not ray:
        raise UsageError("--ray-cpus is for a Ray cluster", hint="name it with --ray")
    if ray and shard:
        raise UsageError("--shard and --ray do not go together", hint="Ray cuts the set into parts itself")
    work = job(**options)
    part = Shard.parse(shard) if shard else None
    loaded = [Engine.load(path) for path in engines or (work.folder,)]
    show_results(
        show,
        pipeline.validate_engines(work, loaded, part, Fleet(ray, ray_cpus) if ray else None),
        as_list=len(loaded) > 1,
    )


def _batches(_ctx: click.Context, _param: click.Parameter, value: str | None) -> tuple[int, ...]:
    """Batch sizes from a list such as 1,8,32."""
    try:
        return tuple(int(number) for number in value.split(",")) if value else ()
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not a list of numbers such as 1,8,32") from error


@command("depth", "variant", "precision", "target", "model", "data", "labels", "limit", "seed", "output")
@click.argument("engines", nargs=-1, type=PATH)
@click.option("--batch", "batches", metavar="LIST", callback=_batches, help="Batch sizes such as 1,8,32; 1.")
@click.option("--streams", type=int, help="Calls under way at the same time; 1.")
@click.option(
    "--preset",
    type=click.Choice(("edgeres", "trtexec-10", "trtexec-11")),
    help="Measure as edgeres, or what trtexec reports of the same engine.",
)
@click.option("--seconds", type=float, help="That each runner works, at least; 3, of a scenario 600.")
@click.option(
    "--scenario",
    type=click.Choice(("single-stream", "multi-stream", "offline")),
    help="MLPerf-style run under LoadGen; with --data also accuracy.",
)
def benchmark(
    show: Any,
    engines: tuple[Path, ...],
    batches: tuple[int, ...],
    streams: int | None,
    preset: str | None,
    seconds: float | None,
    scenario: str | None,
    output: Path | None,
    **options: Any,
) -> None:
    """Engines against FP32 beside them: latency, throughput, energy.

    Without ENGINES, the workspace's engine for --precision and --target. All take turns on random pixels, and what
    makes the numbers doubtful is said. -o keeps the record as JSON.
    """
    from edgeres import lineup, loadgen
    from edgeres.benchmark import Plan
    from edgeres.build import Engine
    from edgeres.files import require_writable, write_json
    from edgeres.latency import table

    work = job(**options)
    if output:
        require_writable(output)
    loaded = [Engine.load(path) for path in engines or (work.folder,)]
    said = click.get_current_context().meta.get("flags", {}).get("validation", {})
    if scenario and (batches or streams or preset):
        raise UsageError("a scenario has its own batches and streams", hint="leave out --batch, --streams, --preset")
    if said and not (scenario and "images" in said):
        hint = "`edgeres validate` judges on images too"
        raise UsageError("--data, and what goes with it, is for the accuracy of a --scenario", hint=hint)
    value: Any
    if scenario:
        value = loadgen.run(work, loaded, scenario, seconds, real=bool(said))
        shown = loadgen.table(value)
    else:
        plan = Plan(batches, 1 if streams is None else streams, preset or "edgeres", seconds)
        value = lineup.run(work, loaded, plan)
        shown = table(value)
    if output:
        write_json(output, value)
    show(value, shown)


@command("weights", "calibration", *JUDGE, "force", "output", resumes=True)
@click.argument("recipe", type=PATH)
def run(show: Any, recipe: Path, output: Path | None, **options: Any) -> None:
    """Weights to verdict, from one recipe.

    -o keeps the list of results as JSON, with the outcomes beside it, for --accepted. Exit status 1 if the recipe's
    budget is not shown to be met.
    """
    import shutil

    from edgeres import pipeline
    from edgeres.files import refuse_replacing, require_writable, write_json
    from edgeres.outcomes import beside

    work = job(recipe=recipe, **options)
    if output:
        pipeline.refuse_overwriting(work, [output])
        refuse_replacing(beside(output), beside(work.folder / "result.json"))
        require_writable(output)
    results = pipeline.run(work, (work.recipe.engine.precision,))
    if output:
        write_json(output, results)
        shutil.copyfile(beside(work.folder / "result.json"), beside(output))
    show_results(show, results)


@command("depth", "variant", "classes", "input-size", "output")
@click.argument("path", type=PATH, required=False)
@click.option("--plot", metavar="TENSOR", help="Draw a range table's histogram of this tensor to -o FILE.png or .svg.")
@click.option("--profile", metavar="FILE", type=PATH, help="Times of layers that trtexec --exportProfile wrote.")
def inspect(show: Any, path: Path | None, plot: str | None, profile: Path | None, output: Path | None) -> None:
    """The network, or what is inside an artifact.

    Without PATH, the stage table: output sizes, parameters, multiply-adds. PATH is an ONNX file, a range table, an
    engine folder, or layers that trtexec --exportLayerInfo wrote.
    """
    from edgeres import inspect as inspection

    if (plot is None) != (output is None) or (plot and path is None):
        raise UsageError("a plot needs a range table, --plot TENSOR and -o FILE")
    if profile and path is None:
        raise UsageError("a profile needs the engine or the layers that it belongs to")
    if path is None:
        recipe = job().recipe
        show(*inspection.network(recipe.model, recipe.preprocess.crop))
    elif plot and output:
        inspection.plot(path, plot, output)
        show({"plot": str(output)}, str(output))
    else:
        show(*inspection.artifact(path, profile))


@command()
def targets(show: Any) -> None:
    """Every target: who executes, on what.

    `edgeres doctor` says which of them this machine builds and runs.
    """
    from edgeres import inspect as inspection

    show(*inspection.targets())


@command()
@click.option("--matrix", is_flag=True, help="Also what every JetPack brings.")
def doctor(show: Any, matrix: bool) -> None:
    """What this machine can build and run, what is in the way, and what to do."""
    from edgeres.doctor import report

    show(*report(matrix))


@command("variant", "seed", resumes=True)
def demo(show: Any) -> None:
    """The whole flow, offline, on handwritten digits.

    Trains a real ResNet-50 on the digits that come with scikit-learn (once, about a minute on two cores), then
    exports, calibrates, quantizes, builds and validates it like any other checkpoint.
    """
    from edgeres import demo as example

    flags = click.get_current_context().meta.get("flags", {})
    show_results(show, example.run(flags.get("model", {}).get("variant", "v1.5"), flags.get("seed", 0)))


for group in (cli_results.commands, cli_device.commands):
    for each in group.commands.values():
        cli.add_command(each)


def main() -> None:
    """Entry point of the console script."""
    cli()


if __name__ == "__main__":
    main()
