"""Commands about devices, which `edgeres.cli` takes up."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import click

from edgeres.cli_results import show_results
from edgeres.command import command_of, job
from edgeres.options import PATH

commands = click.Group()
command = functools.partial(command_of, commands)
NETWORK = ("depth", "variant", "weights", "model", "force")
QUANTIZE = ("precision", "target", "tensorrt", "io", "method", "weight-scales", "calibration", "equalize", "build")
JUDGE = ("data", "labels", "max-drop", "min-relative", "accepted", "seed", "skip-bad")


def _images(_ctx: click.Context, _param: click.Parameter, value: str) -> int | None:
    """A number of images, from 1; None for "all"."""
    if value == "all":
        return None
    if value.isdecimal() and int(value):
        return int(value)
    raise click.BadParameter(f"{value!r} is no number of images: give 256, say, or all")


@command(*NETWORK, *QUANTIZE, *JUDGE, "output", resumes=True)
@click.argument("recipe", type=PATH, required=False)
@click.option("--limit", metavar="N|all", default="256", callback=_images, help="Images to send along; 256.")
@click.option("--sign", metavar="KEY", type=PATH, help="Sign with this SSH key (Ed25519), private or in an agent.")
def bundle(show: Any, limit: int | None, sign: Path | None, output: Path | None, **options: Any) -> None:
    """What a device needs to test its engine by itself, in one file.

    Typed ONNX (made on the way if missing), images, FP32's answers on them, RECIPE (else the workspace's) and budget:
    `edgeres selftest` there needs nothing else. The same inputs give the same bytes.
    """
    from edgeres import bundle as bundles

    value = bundles.make(job(**options), limit, sign, output)
    show(value, value["bundle"])


@command("output", resumes=True)
@click.argument("file", type=PATH)
@click.option("--target", help="Refuse a bundle for another target.")
@click.option("--signed-by", metavar="PUB", type=PATH, help="Refuse a bundle not signed by this SSH key, a .pub file.")
@click.option("--work", metavar="DIR", type=PATH, help="Where to unpack and build; a folder in the cache.")
@click.option("--seconds", type=float, help="That the engine works for its latency, at least; 3.")
def selftest(
    show: Any,
    file: Path,
    target: str | None,
    signed_by: Path | None,
    work: Path | None,
    seconds: float | None,
    output: Path | None,
) -> None:
    """Build the engine of a bundle here, replay its images, judge.

    FILE is what `edgeres bundle` wrote. Nothing but the executor is needed: no PyTorch, no onnx, no image library. A
    test that was cut short goes on. -o keeps the result, with the outcomes beside it. Exit status 1 if the budget is
    not shown to be met.
    """
    from edgeres import selftest as device

    show_results(show, [device.run(file, target, signed_by, work, seconds, output)], as_list=False)


@command("output")
@click.argument("hosts", nargs=-1)
@click.argument("file", type=PATH)
@click.option("--hosts", "listed", metavar="FILE", type=PATH, help="A file with more hosts, one on each line.")
@click.option("--python", metavar="PATH", help="Interpreter or environment there that has edgeres; else one is made.")
@click.option("--wheels", metavar="DIR", type=PATH, help="More wheels, for devices that reach no package index.")
@click.option("--keep", is_flag=True, help="Leave there what the next deploy can use: environment, bundle, engine.")
@click.option("--seconds", type=float, help="That each engine works for its latency, at least; 3.")
@click.option("--ssh-option", "options", metavar="K=V", multiple=True, help="An option of ssh, as its -o. Repeatable.")
@click.option("--ssh-config", "config", metavar="FILE", type=PATH, help="Configuration of ssh, as its -F.")
def deploy(
    show: Any, hosts: tuple[str, ...], file: Path, listed: Path | None, output: Path | None, **ways: Any
) -> None:
    """Self-test a bundle on devices, over ssh.

    HOSTS are [user@]host, as ssh takes them; FILE is what `edgeres bundle` wrote. Devices need Python 3.10 and nothing
    of edgeres: what is missing is copied, and removed at the end. Results go to -o DIR/HOST; engines/out/deploy unless
    given. Exit status 1 unless every device meets the budget.
    """
    from edgeres import deploy as deployment
    from edgeres.deploy_table import table
    from edgeres.recipe import find_workspace

    folder = output or find_workspace(Path.cwd()) / "engines" / "out" / "deploy"
    everywhere = [*hosts, *(deployment.read_hosts(listed) if listed else ())]
    records = deployment.deploy(everywhere, file, folder, deployment.Ways(**ways))
    show(records, table(records))
    if not deployment.met(records):
        click.get_current_context().exit(1)
