"""What the documentation says is what the program does. To regenerate: python tests/test_docs.py"""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from edgeres.cli import cli
from edgeres.recipe import Recipe, from_dict, tomllib
from edgeres.trt import Options

ROOT = Path(__file__).parents[1]
PAGES = sorted(p for p in ROOT.rglob("*.md") if not any(part.startswith(".") for part in p.relative_to(ROOT).parts))


def commands_page() -> str:
    """docs/commands.md: every --help as it is printed, 80 columns wide."""

    def pages(group: click.Group, words: tuple[str, ...]) -> list[str]:
        out = []
        for name, command in group.commands.items():
            out.append(f"## {' '.join((*words, name))}\n\n{shown(*words, name)}")
            if isinstance(command, click.Group):
                out += pages(command, (*words, name))
        return out

    def shown(*words: str) -> str:
        result = CliRunner().invoke(cli, [*words, "--help"], prog_name="edgeres", terminal_width=80)
        assert result.exit_code == 0
        return f"```\n{result.output.rstrip()}\n```\n"

    return "\n".join(["# Commands\n", shown(), *pages(cli, ())])


def test_commands_page_is_what_help_prints() -> None:
    assert (ROOT / "docs" / "commands.md").read_text(encoding="utf-8") == commands_page()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_shown_exist_with_their_options(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    shown = re.findall(r"^edgeres (?!\[|.*\.\.\.)(.*)$", text, re.MULTILINE) + re.findall(r"`edgeres ([^`]+)`", text)
    for line in shown:
        name, *arguments = shlex.split(line, comments=True)
        if name.startswith("-"):
            continue
        command = cli.commands[name]
        if isinstance(command, click.Group) and arguments:
            command = command.commands[arguments[0]]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {a for a in arguments if a.startswith("-")} <= known, line


def test_the_recipe_page_shows_every_key_and_no_other() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    values = tomllib.loads(block)
    recipe = from_dict(Recipe, values)
    for section, shown in values.items():
        if isinstance(shown, dict) and section != "build":
            assert set(shown) == set(vars(getattr(recipe, section))), section


def test_make_targets_in_the_readme_exist() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    named = re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert named
    assert set(named) <= set(targets)


def test_the_page_on_tensorrt_has_every_option_of_a_build() -> None:
    text = (ROOT / "docs" / "tensorrt.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"\| key \| unless said.*?\n\n", text, re.DOTALL)
    shown = {name for row in table.strip().splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert shown == {f.name for f in dataclasses.fields(Options) if not f.metadata.get("internal")}


if __name__ == "__main__":
    (ROOT / "docs" / "commands.md").write_text(commands_page(), encoding="utf-8")
