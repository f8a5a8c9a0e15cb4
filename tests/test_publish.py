from __future__ import annotations

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result
from records import SHA, latency, record, save

from edgeres.cli import cli
from edgeres.data import Manifest
from edgeres.errors import InputError
from edgeres.files import write_json
from edgeres.layouts import open_images
from edgeres.publish import read, write, write_text


def edgeres(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments])


def bare(precision: str = "int8") -> dict[str, object]:
    return record(precision, latency=None)


def test_results_come_from_files_and_folders(tmp_path: Path) -> None:
    save(tmp_path / "a", bare())
    write_json(tmp_path / "list.json", [bare(), bare("fp16")])
    found = read([tmp_path / "a", tmp_path / "a" / "result.json", tmp_path / "list.json"])
    assert [r["precision"] for r, _ in found] == ["int8", "int8", "int8", "fp16"]
    assert {engine is None for _, engine in found} == {True}


def test_an_engine_record_counts_if_the_result_is_of_that_engine(tmp_path: Path) -> None:
    path = save(tmp_path / "a", bare())
    for sha256, belongs in ((SHA["int8"], True), ("0" * 64, False)):
        write_json(tmp_path / "a" / "engine.json", {"sha256": sha256, "classes": 10})
        ((_, engine),) = read([path])
        assert (engine is not None) is belongs


def test_a_benchmark_is_the_latency_of_results_without_one(tmp_path: Path) -> None:
    own = {**latency(seed=3), "batch": 8}
    paths = [save(tmp_path / "a", bare()), save(tmp_path / "b", record("fp16", latency=own))]
    write_json(tmp_path / "bench.json", latency())
    first, second = (r for r, _ in read([tmp_path / "bench.json", *paths]))
    assert first["latency"]["runners"].keys() == {"FP32", "FP16", "INT8"}
    assert second["latency"]["batch"] == 8


def test_a_benchmark_of_none_of_the_results_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "bench.json", latency(("FP32", "FP16")))
    with pytest.raises(InputError, match="is of none of the results") as error:
        read([save(tmp_path / "a", bare()), tmp_path / "bench.json"])
    assert "FP32, FP16" in error.value.evidence


def test_what_is_no_result_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "bench.json", latency())
    with pytest.raises(InputError, match="no result to show"):
        read([tmp_path / "bench.json"])
    for name, content in (("a.json", "{}"), ("b.json", "[]"), ("c.json", "nonsense"), ("d.json", '"text"')):
        (tmp_path / name).write_text(content, encoding="utf-8")
        with pytest.raises(InputError):
            read([tmp_path / name])
    with pytest.raises(InputError, match=r"result\.json"):
        read([tmp_path])


def test_a_damaged_benchmark_or_engine_record_is_refused_with_the_field(tmp_path: Path) -> None:
    path = save(tmp_path / "a", bare())
    write_json(tmp_path / "bench.json", {"format": latency()["format"]})
    with pytest.raises(InputError, match=r"benchmark .*bench\.json is damaged") as error:
        read([path, tmp_path / "bench.json"])
    assert "runners" in error.value.evidence
    write_json(tmp_path / "a" / "engine.json", {"sha256": SHA["int8"], "fusion": "x"})
    with pytest.raises(InputError, match=r"engine record .*engine\.json is damaged") as error:
        read([path])
    assert "fusion" in error.value.evidence
    (tmp_path / "deep.json").write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(InputError, match=r"cannot read .*deep\.json"):
        read([tmp_path / "deep.json"])


def test_only_what_is_asked_for_is_written_and_images_are_opened_for_a_page_alone(tmp_path: Path) -> None:
    found = [(bare(), None)]
    write(found, for_ci=tmp_path / "j.xml", images=lambda: pytest.fail("opened"))
    write(found)
    assert [p.name for p in tmp_path.iterdir()] == ["j.xml"]
    opened = []
    write(found, html=tmp_path / "new" / "p.html", images=lambda: opened.append(1))
    assert opened == [1]
    assert (tmp_path / "new" / "p.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_name_that_is_no_text_can_be_written(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "caf\udce9 é")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "caf? é"


def test_the_command_shows_and_writes(tmp_path: Path) -> None:
    path = save(tmp_path / "a", record())
    done = edgeres("report", "show", path, "--html", "p.html", "--markdown", "p.md", "--junit", "p.xml")
    assert done.exit_code == 0, done.output
    assert "INT8 PASS: " in done.stdout
    assert max(map(len, done.stdout.splitlines()[:5])) <= 80
    assert "86.20 %" in Path("p.html").read_text(encoding="utf-8")
    assert "**PASS**" in Path("p.md").read_text(encoding="utf-8")
    assert ElementTree.parse("p.xml").getroot().get("tests") == "1"


def test_the_command_gives_json_and_shows_a_missed_budget_without_failing(tmp_path: Path) -> None:
    path = save(tmp_path / "a", record(verdict="FAIL"))
    done = edgeres("report", "show", path, "--json")
    assert done.exit_code == 0
    assert [r["verdict"] for r in json.loads(done.stdout)] == ["FAIL"]


def test_the_page_has_pictures_from_the_workspace(tmp_path: Path, workspace: Path, val_folder: Path) -> None:
    r, images = record(flips=3), open_images(val_folder).subset(20, seed=7)
    r["images_of"], r["provenance"]["digests"]["images"] = 20, Manifest.of(images).digest()
    for f, path in zip(r["flipped"], images.paths, strict=False):
        f["path"] = path
    path = save(tmp_path / "a", r)
    recipe = (workspace / "edgeres.toml").read_text(encoding="utf-8")
    (workspace / "edgeres.toml").write_text(f"seed = 7\n{recipe}", encoding="utf-8")
    assert edgeres("report", "show", path, "--html", "p.html").exit_code == 0
    assert Path("p.html").read_text(encoding="utf-8").count("data:image/jpeg;base64,") == 3
    (workspace / "edgeres.toml").write_text('seed = 7\n[validation]\nimages = "not/here"\n', encoding="utf-8")
    assert edgeres("report", "show", path, "--html", "q.html").exit_code == 0
    assert Path("q.html").read_text(encoding="utf-8").count("the image is not here") == 3
    assert edgeres("report", "show", path, "--html", "r.html", "--data", val_folder).exit_code == 0
    assert Path("r.html").read_text(encoding="utf-8").count("data:image/jpeg;base64,") == 3
    shutil.copytree(val_folder, "fake")
    (Path("fake") / images.paths[0]).write_bytes((val_folder / images.paths[1]).read_bytes())
    done = edgeres("report", "show", path, "--html", "f.html", "--data", "fake")
    assert done.exit_code == 0
    assert "/fake are not the 20 of the result: SHA-256 of files and labels " in done.stderr
    assert "data:image/jpeg" not in Path("f.html").read_text(encoding="utf-8")
    wrong = edgeres("report", "show", path, "--html", "s.html", "--data", "not/here")
    assert wrong.exit_code == 1
    assert "no images at " in wrong.stderr


def test_results_on_more_and_fewer_images_all_have_their_pictures(
    tmp_path: Path, workspace: Path, val_folder: Path
) -> None:
    (workspace / "edgeres.toml").write_text(f'seed = 7\n[validation]\nimages = "{val_folder}"\n', encoding="utf-8")
    paths = []
    for count in (20, 5):
        r, images = record(flips=3), open_images(val_folder).subset(count, seed=7)
        r["images_of"], r["provenance"]["digests"]["images"] = count, Manifest.of(images).digest()
        for f, path in zip(r["flipped"], images.paths, strict=False):
            f["path"] = path
        paths.append(save(tmp_path / str(count), r))
    assert edgeres("report", "show", *paths, "--html", "p.html").exit_code == 0
    assert Path("p.html").read_text(encoding="utf-8").count("data:image/jpeg;base64,") == 6


def test_the_command_says_what_is_no_result(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}", encoding="utf-8")
    failed = edgeres("report", "show", "x.json")
    assert failed.exit_code == 1
    assert "x.json is not a result" in failed.stderr
