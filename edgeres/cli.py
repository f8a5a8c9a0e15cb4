"""The command line: parse, call one library function, print. Results on stdout, progress on stderr."""

from __future__ import annotations

import errno
import functools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console

import edgeres
from edgeres import progress
from edgeres.errors import EdgeresError, UsageError
from edgeres.options import OPTIONS, PATH
from edgeres.recipe import AUTO, find_workspace, load_recipe

F = TypeVar("F", bound=Callable[..., Any])


CANNOT_WRITE = {errno.EACCES, errno.EDQUOT, errno.ENOSPC, errno.EPERM, errno.EROFS}


class Failure(click.ClickException):
    """An `EdgeresError` on its way out: cause, evidence, next step; no traceback."""

    def __init__(self, error: EdgeresError) -> None:
        super().__init__(error.cause)
        self.error = error
        self.exit_code = error.exit_code  # type: ignore[misc]

    def show(self, file: Any = None) -> None:
        click.secho(f"Error: {self.error.cause}", fg="red", err=True)
        for line in self.error.evidence.splitlines():
            click.echo(f"  {line}", err=True)
        if self.error.hint:
            click.echo(f"Next: {self.error.hint}", err=True)


class Commands(click.Group):
    """The one place where edgeres' errors become exit statuses; a bug keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except EdgeresError as error:
            raise Failure(error) from error
        except OSError as error:
            if error.errno not in CANNOT_WRITE:
                raise
            cause = f"cannot write {error.filename or 'a file'}"
            hint = "make room there, or write elsewhere with -o or from another workspace"
            raise Failure(EdgeresError(cause, evidence=error.strerror or "", hint=hint)) from error

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of the flow, not of the alphabet


def command(*names: str, parent: click.Group | None = None) -> Callable[[F], Any]:
    """A command with the named `OPTIONS`, --json and --quiet, called with ``show(value, *renderables)``."""

    def decorate(function: F) -> Any:
        @functools.wraps(function)
        def wrapper(as_json: bool, quiet: bool, **kwargs: Any) -> Any:
            def show(value: Any, *renderables: Any) -> None:
                from edgeres.files import to_json

                if as_json:
                    click.echo(to_json(value, indent=1))
                else:
                    # a pipe has no width of its own: never cut a table to guess one
                    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
                    for item in renderables:
                        console.print(item)

            with progress.to(None if quiet else Console(stderr=True)):
                return function(show=show, **kwargs)

        # the outermost decorator is the first line of --help
        decorated: Any = click.option("--quiet", is_flag=True, help="No progress on stderr.")(wrapper)
        decorated = click.option("--json", "as_json", is_flag=True, help="Result as JSON on stdout.")(decorated)
        for name in reversed(names):
            decorated = OPTIONS[name](decorated)
        return (parent or cli).command(decorated.__name__.rstrip("_").replace("_", "-"))(decorated)

    return decorate


def job(recipe: Path | None = None, model: Path | None = None, skip_bad: bool = False, force: bool = False) -> Any:
    """Workspace, recipe and flags -> `pipeline.Job`."""
    from edgeres.job import Job

    root = find_workspace(recipe.parent if recipe else Path.cwd())
    asked = load_recipe(root, recipe, click.get_current_context().meta.get("flags"))
    if asked.engine.target == AUTO:
        from edgeres import doctor

        target = doctor.detect(doctor.gather())
        progress.say(f"target auto is {target} here")
        asked = replace(asked, engine=replace(asked.engine, target=target))
    return Job(asked, root, model, skip_bad, force)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(edgeres.__version__, prog_name="edgeres")
def cli() -> None:
    """ResNet-50 from PyTorch to a quantized engine, with proof of what that cost and what it won.

    Options not given come from edgeres.toml in this folder or one above it.
    """


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


@command("like", "input-size", "resize", "labels", "limit", "seed", "model", "skip-bad", "output")
@click.argument("source", type=PATH)
def pack(show: Any, source: Path, like: str | None, model: Path | None, skip_bad: bool, output: Path | None) -> None:
    """Images -> one file of preprocessed pixels.

    A pack is read at memory speed and needs no image library. It holds images for one preprocessing: that of --like,
    of --model, or of the workspace.
    """
    from edgeres.baseline import preprocess_like
    from edgeres.layouts import open_images
    from edgeres.pack import write_pack

    recipe = job().recipe
    preprocess = preprocess_like(recipe, like or (str(model) if model else None), default=True)
    if source.suffix == ".pack":
        raise UsageError(f"{source} is a pack already", hint="give the images it was made from")
    images = open_images(source, recipe.validation.labels)
    # the limit of the workspace is for judging, not for packing: only a flag counts
    limit = click.get_current_context().meta.get("flags", {}).get("validation", {}).get("limit")
    path = output or Path(f"{source.name}.pack")
    packed = write_pack(images.subset(limit, recipe.seed), preprocess, path, skip_bad=skip_bad)
    progress.say(f"{path}: {len(packed):,} of {len(images):,} images")
    show({"pack": str(path), "images": len(packed), "preprocess": preprocess.to_json()}, str(path))


@command(*NETWORK, *MEASURE, "output")
def calibrate(show: Any, output: Path | None, **options: Any) -> None:
    """FP32 ONNX + images -> range table."""
    from edgeres.ranges import calibrate_model

    path = calibrate_model(job(**options), output)
    show({"table": str(path)}, str(path))


@command(*NETWORK, *QUANTIZE, "output")
def quantize(show: Any, output: Path | None, **options: Any) -> None:
    """FP32 ONNX + range table -> typed ONNX for a target."""
    from edgeres import graph
    from edgeres.trtexec import trtexec
    from edgeres.typed import quantize_model, target_of

    work = job(**options)
    path = quantize_model(work, output)
    value = {"onnx": str(path), **graph.metadata(graph.load(path))}
    if (target := target_of(work)).executor == "tensorrt":
        value["trtexec"] = trtexec(path, value["precision"], target, value["preprocess"]["crop"], value["batch"])
        progress.say(f"where edgeres itself does not run: {value['trtexec']}")
    show(value, str(path))


@command(*NETWORK, *QUANTIZE, "build", "output")
def build_engine(show: Any, output: Path | None, **options: Any) -> None:
    """Build an engine, and whatever it needs that is missing."""
    from edgeres import pipeline

    engine = pipeline.ensure_engine(job(**options), output)
    show({"engine": str(engine.path), **engine.record}, str(engine.path))


@command("depth", "variant", "precision", "target", "model", "data", "labels", "limit", "max-drop", "seed", "skip-bad")
@click.argument("engines", nargs=-1, type=PATH)
def validate(show: Any, engines: tuple[Path, ...], **options: Any) -> None:
    """Engines against the FP32 baseline: accuracy, latency.

    Without ENGINES, the workspace's engine for --precision and --target. Exit status 1 if --max-drop or the recipe's
    budget is not shown to be met.
    """
    from edgeres import pipeline
    from edgeres.build import Engine

    work = job(**options)
    loaded = [Engine.load(path) for path in engines or (work.folder,)]
    _show_results(show, pipeline.validate_engines(work, loaded), as_list=len(loaded) > 1)


@command("weights", "calibration", "data", "limit", "max-drop", "seed", "skip-bad", "force", "output")
@click.argument("recipe", type=PATH)
def run(show: Any, recipe: Path, output: Path | None, **options: Any) -> None:
    """Weights to verdict, from one recipe.

    -o keeps the list of results as JSON. Exit status 1 if the recipe's budget is not shown to be met.
    """
    from edgeres import pipeline
    from edgeres.files import write_json

    work = job(recipe=recipe, **options)
    results = pipeline.run(work, (work.recipe.engine.precision,))
    if output:
        write_json(output, results)
    _show_results(show, results)


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
    if plot and path and output:
        inspection.plot(path, plot, output)
        show({"plot": str(output)}, str(output))
    elif path is None:
        recipe = job().recipe
        show(*inspection.network(recipe.model, recipe.preprocess.crop))
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


@command("variant", "seed")
def demo(show: Any) -> None:
    """The whole flow, offline, on handwritten digits.

    Trains a real ResNet-50 on the digits that come with scikit-learn (once, about a minute on two cores), then
    exports, calibrates, quantizes, builds and validates it like any other checkpoint.
    """
    from edgeres import demo as example

    flags = click.get_current_context().meta.get("flags", {})
    _show_results(show, example.run(flags.get("model", {}).get("variant", "v1.5"), flags.get("seed", 0)))


@cli.group(cls=Commands)
def data() -> None:
    """Look at image sets."""


@command("labels", parent=data)
@click.argument("source", type=PATH)
@click.option("--against", type=PATH, help="A set that must not share an image with this one, by content.")
def check(show: Any, source: Path, against: Path | None) -> None:
    """What a set holds, and what is wrong with it.

    Reads every image, and checks a pack's pixels against its digest. Exit status 1 for unreadable images, labels out of
    range, or images shared with --against.
    """
    from edgeres import datacheck
    from edgeres.layouts import open_images

    images = open_images(source, job().recipe.validation.labels)
    report = datacheck.check(images, open_images(against) if against else None)
    show(report, datacheck.table(report))
    if report["unreadable"] or report["overlap"] or report["labels_out_of_range"]:
        click.get_current_context().exit(1)


def _show_results(show: Any, results: list[dict[str, Any]], as_list: bool = True) -> None:
    from edgeres import report

    show(results if as_list else results[0], report.table(results), *report.verdicts(results))
    if not report.met(results):
        click.get_current_context().exit(1)


def main() -> None:
    """Entry point of the console script."""
    cli()


if __name__ == "__main__":
    main()
