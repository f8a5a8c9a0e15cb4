"""Commands about results and image sets, which `edgeres.cli` takes up."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import click

from edgeres.command import Commands, command_of, job
from edgeres.options import PATH
from edgeres.recipe import find_workspace

commands = click.Group()
command = functools.partial(command_of, commands)


def show_results(show: Any, results: list[dict[str, Any]], as_list: bool = True) -> None:
    """Print ``results``; exit status 1 unless every budget is shown to be met."""
    from edgeres import report

    show(results if as_list else results[0], *report.shown(results))
    if not report.met(results):
        click.get_current_context().exit(1)


@commands.group(cls=Commands)
def report() -> None:
    """Look at results, and join those of shards."""


@command_of(report, "output")
@click.argument("results", nargs=-1, required=True, type=PATH)
def merge(show: Any, results: tuple[Path, ...], output: Path | None) -> None:
    """Results of all shards -> the result of one run.

    RESULTS are what `edgeres validate --shard` wrote, each with its outcomes beside it. Without -o, to result.json.
    Exit status 1 if their budget is not shown to be met.
    """
    from edgeres import merge as shards

    show_results(show, [shards.merge(results, output or Path("result.json"), find_workspace(Path.cwd()))], False)


@command_of(report, "data", "labels")
@click.argument("results", nargs=-1, required=True, type=PATH)
@click.option("--html", type=PATH, help="Write one HTML page that needs nothing beside it.")
@click.option("--markdown", type=PATH, help="Write Markdown, for a pull request.")
@click.option("--junit", type=PATH, help="Write JUnit XML: a test case for each budget.")
def show(show: Any, results: tuple[Path, ...], html: Path | None, markdown: Path | None, junit: Path | None) -> None:
    """Results side by side, here and as files.

    RESULTS are result.json files, engine folders, and what `edgeres benchmark -o` wrote: the latency of those. The page
    has pictures of images whose answer changed where they are found: those of --data, or of the workspace.
    """
    from edgeres import publish
    from edgeres.report import shown

    found = publish.read(results)
    records = [record for record, _ in found]
    publish.write(found, html, markdown, junit, lambda: _images(job().recipe, found))
    show(records, *shown(records))


def _images(recipe: Any, found: list[tuple[dict[str, Any], dict[str, Any] | None]]) -> Any:
    """Draws the images that a page may show; None where those of the workspace are not on this machine."""
    from edgeres.layouts import open_images

    section, asked = recipe.validation, click.get_current_context().meta.get("flags", {}).get("validation", {})
    if section.images is None or ("images" not in asked and not Path(section.images).exists()):
        return None
    classes = next((engine.get("classes") for _, engine in found if engine), None)
    return functools.partial(open_images(section.images, section.labels, classes).subset, seed=recipe.seed)


@command()
@click.argument("a", type=PATH)
@click.argument("b", type=PATH)
def diff(show: Any, a: Path, b: Path) -> None:
    """What changed from A to B.

    A and B are results, engine folders or engine.json files. Exit status 1 if B is worse beyond noise in top-1 or p50,
    and where it cannot be told: on other images, or of another network.
    """
    from edgeres.diff import diff as compare

    value, shown = compare(a, b)
    show(value, shown)
    if value["worse"] or value["incomparable"]:
        click.get_current_context().exit(1)


@command("output")
@click.argument("result", type=PATH)
def card(show: Any, result: Path, output: Path | None) -> None:
    """Model card of a result, in Markdown.

    RESULT is a result.json or an engine folder. Without -o, to card.md.
    """
    from edgeres.card import write_card

    path = output or Path("card.md")
    write_card(result, path)
    show({"card": str(path)}, str(path))


@commands.group(cls=Commands)
def data() -> None:
    """Look at image sets."""


@command_of(data, "labels")
@click.argument("source", metavar="SOURCE")
@click.option("--against", metavar="PATH", help="A set that must not share an image with this one, by content.")
def check(show: Any, source: str, against: str | None) -> None:
    """What a set holds, and what is wrong with it.

    Reads every image, and checks a pack's pixels against its digest. Exit status 1 for unreadable images, labels out of
    range, or images shared with --against.
    """
    from edgeres import datacheck
    from edgeres.layouts import open_images

    recipe = job().recipe
    images = open_images(source, recipe.validation.labels)
    report = datacheck.check(images, open_images(against) if against else None, recipe.model.classes)
    show(report, datacheck.table(report))
    if report["unreadable"] or report["overlap"] or report["labels_out_of_range"]:
        click.get_current_context().exit(1)
