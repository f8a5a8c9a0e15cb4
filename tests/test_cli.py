from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import tiny_resnet

from edgeres import calibrate, graph
from edgeres.cli import cli
from edgeres.model import resnet50

Run = Callable[..., Result]


@pytest.fixture
def edgeres() -> Run:
    """Run a command line in the current folder."""
    return lambda *arguments: CliRunner().invoke(cli, [str(a) for a in arguments])


def failed(result: Result, status: int, *words: str) -> None:
    """One clear message: status, no traceback, each of ``words``, and a next step."""
    assert result.exit_code == status, result.output + result.stderr
    assert isinstance(result.exception, SystemExit), "a bug, not a message"
    assert result.stderr.startswith(("Error: ", "Usage: "))
    for word in words:
        assert word in result.stderr
    leftover = [p for p in Path().rglob("*") if p.name.endswith(".tmp")]
    assert leftover == []


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full ResNet-50 of 4 classes with random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "four.pth"
    torch.save(resnet50("v1.5", 4).state_dict(), path)
    return path


def test_the_three_commands_need_no_option_in_a_workspace(workspace: Path, checkpoint: Path, edgeres: Run) -> None:
    toml = workspace / "edgeres.toml"
    toml.write_text(
        toml.read_text() + f'[model]\nweights = "{checkpoint}"\n[preprocess]\ncrop = 32\n', encoding="utf-8"
    )
    exported = edgeres("export", "--variant", "v1.5")
    assert exported.exit_code == 0, exported.stderr
    assert exported.stdout.strip().endswith("engines/out/resnet50-v1.5.onnx")
    record = graph.metadata(graph.load(Path(exported.stdout.strip())))
    assert (record["variant"], record["classes"], record["preprocess"]["resize"]) == ("v1.5", 4, 37)
    assert record["parity"]["images"]["images"] == 32
    assert min(p["db"] for p in record["parity"].values()) > 100

    built = edgeres("build-engine", "--precision", "int8")
    assert built.exit_code == 0, built.stderr
    assert "calibrate calibration/resnet50-v1.5.json (missing)" in built.stderr
    assert "export" not in built.stderr

    judged = edgeres("validate", "--json")
    assert judged.exit_code == 0, judged.stderr
    result = json.loads(judged.stdout)
    assert (result["images"], result["precision"], result["verdict"]) == (24, "int8", None)


def test_flags_win_over_the_workspace_file(workspace: Path, tiny_path: Path, edgeres: Run) -> None:
    with (workspace / "edgeres.toml").open("a", encoding="utf-8") as f:
        f.write('[engine]\nprecision = "fp16"\n')
    by_file = edgeres("build-engine", "--model", tiny_path, "--json")
    assert json.loads(by_file.stdout)["precision"] == "fp16"
    by_flag = edgeres("build-engine", "--model", tiny_path, "--precision", "fp32", "--json")
    assert json.loads(by_flag.stdout)["precision"] == "fp32"


def test_a_second_build_does_nothing_and_a_new_method_builds_again(
    workspace: Path, tiny_path: Path, edgeres: Run
) -> None:
    arguments = ("build-engine", "--model", tiny_path, "--precision", "int8")
    assert "built" in edgeres(*arguments).stderr
    again = edgeres(*arguments).stderr
    assert "built" not in again
    assert "up to date" in again
    other = edgeres(*arguments, "--method", "entropy").stderr
    assert "built" in other
    assert "calibrate" not in other


def test_budget_sets_the_exit_status(workspace: Path, tiny_path: Path, edgeres: Run) -> None:
    for precision in ("fp32", "int8"):
        edgeres("build-engine", "--model", tiny_path, "--precision", precision)
    validate = ("validate", "--model", tiny_path, "--json", "--precision")
    passed, open_ = edgeres(*validate, "int8", "--max-drop", 50), edgeres(*validate, "int8", "--max-drop", 0)
    assert (passed.exit_code, json.loads(passed.stdout)["verdict"]) == (0, "PASS")
    # the same answers on 24 images do not show that nothing is ever lost; the same logits to the last bit do
    assert (open_.exit_code, json.loads(open_.stdout)["verdict"]) == (1, "NOT ENOUGH IMAGES")
    assert edgeres(*validate, "fp32", "--max-drop", 0, "--min-relative", 100).exit_code == 0
    assert edgeres(*validate, "int8", "--max-drop", 50, "--min-relative", 99.9).exit_code == 1


def test_an_accepted_result_is_a_budget(workspace: Path, tiny_path: Path, edgeres: Run) -> None:
    edgeres("build-engine", "--model", tiny_path, "--precision", "int8")
    validate = ("validate", "--model", tiny_path, "--precision", "int8", "--json")
    assert edgeres(*validate).exit_code == 0
    folder = Path("engines/out/tiny-int8-cpu")
    for name in ("result.json", "outcomes.npz"):
        (folder / name).rename(name)
    again = edgeres(*validate, "--accepted", "result.json")
    assert again.exit_code == 0, again.stderr
    result = json.loads(again.stdout)
    assert result["budget"]["accepted"]["path"] == "result.json"
    assert "(image by image)" in result["reasons"][0]
    failed(edgeres(*validate, "--accepted", "nowhere.json"), 1, "cannot read result", "nowhere.json", "Next: ")


def test_shards_are_merged(workspace: Path, tiny_path: Path, edgeres: Run) -> None:
    for i in range(40):
        path = workspace / "many" / f"class{i % 4}" / f"{i}.pgm"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"P5 8 8 255\n" + bytes([i * 5, 255 - i] * 32))
    edgeres("build-engine", "--model", tiny_path, "--precision", "fp16")
    validate = ("validate", "--model", tiny_path, "--precision", "fp16", "--data", "many", "--max-drop", 50)
    for i in (1, 2):
        part = edgeres(*validate, "--shard", f"{i}/2")
        assert part.exit_code == 0, part.stderr
    parts = [f"engines/out/tiny-fp16-cpu/result-{i}of2.json" for i in (1, 2)]
    merged = edgeres("report", "merge", *parts, "--json")
    assert merged.exit_code == 0, merged.stderr
    assert json.loads(merged.stdout) == json.loads(Path("result.json").read_text())
    assert (json.loads(merged.stdout)["images"], json.loads(merged.stdout)["verdict"]) == (40, "PASS")
    assert edgeres("report", "merge", *parts, "-o", "kept/mine.json").exit_code == 0
    assert Path("kept/mine.outcomes.npz").read_bytes() == Path("outcomes.npz").read_bytes()
    failed(edgeres("report", "merge", parts[0]), 1, "1 of 2 shards are missing", "2/2")
    failed(edgeres(*validate, "--shard", "3/2"), 2, "'3/2' is no shard")


def test_images_without_labels_are_validated(workspace: Path, tiny_path: Path, edgeres: Run, val_folder: Path) -> None:
    Path("list.txt").write_text("".join(f"{path}\n" for path in sorted(val_folder.rglob("*.png"))), encoding="utf-8")
    edgeres("build-engine", "--model", tiny_path, "--precision", "fp16")
    validate = ("validate", "--model", tiny_path, "--precision", "fp16", "--data", "list.txt")
    result = edgeres(*validate, "--json")
    assert result.exit_code == 0, result.stderr
    assert "accuracy is not\n" in result.stderr
    assert (json.loads(result.stdout)["labels"], json.loads(result.stdout)["drop"]) == (False, None)
    assert edgeres(*validate).exit_code == 0
    budget = edgeres(*validate, "--max-drop", 1, "--json")
    assert (budget.exit_code, json.loads(budget.stdout)["verdict"]) == (1, "NO LABELS")
    assert "the budget cannot be met" in budget.stderr


def test_several_engines_are_judged_side_by_side(workspace: Path, tiny_path: Path, edgeres: Run) -> None:
    engines = []
    for precision in ("fp16", "int8"):
        built = edgeres("build-engine", "--model", tiny_path, "--precision", precision)
        engines.append(Path(built.stdout.strip()).parent)
    result = edgeres("validate", *engines, "--model", tiny_path, "--json")
    assert [r["precision"] for r in json.loads(result.stdout)] == ["fp16", "int8"]


def test_quiet_says_nothing_on_stderr(workspace: Path, tiny_path: Path, edgeres: Run) -> None:
    result = edgeres("build-engine", "--model", tiny_path, "--precision", "int8", "--quiet")
    assert (result.exit_code, result.stderr) == (0, "")


def test_table_fits_eighty_columns(workspace: Path, tiny_path: Path, edgeres: Run) -> None:
    edgeres("build-engine", "--model", tiny_path, "--precision", "int8")
    shown = edgeres("validate", "--model", tiny_path, "--precision", "int8").stdout
    assert "INT8" in shown
    assert max(map(len, shown.rstrip().splitlines()[:4])) <= 80


@pytest.mark.parametrize(("variant", "macs"), [("v1", "3.86 G"), ("v1.5", "4.09 G")])
def test_inspect_shows_the_network(edgeres: Run, variant: str, macs: str) -> None:
    shown = edgeres("inspect", "--variant", variant).stdout
    assert "25.56 M" in shown
    assert macs in shown
    assert "multiply-add" in shown


def test_inspect_shows_artifacts(workspace: Path, tiny_path: Path, edgeres: Run) -> None:
    edgeres("build-engine", "--model", tiny_path, "--precision", "int8")
    for path in (tiny_path, Path("calibration/tiny.json"), Path("engines/out/tiny-int8-cpu")):
        assert edgeres("inspect", path).exit_code == 0
        assert json.loads(edgeres("inspect", path, "--json").stdout)


def test_run_keeps_the_results(workspace: Path, checkpoint: Path, edgeres: Run) -> None:
    recipe = workspace / "engines" / "mine.toml"
    recipe.parent.mkdir()
    recipe.write_text(
        f'name = "mine"\n[model]\nvariant = "v1"\nweights = "{checkpoint}"\n[preprocess]\ncrop = 32\nresize = 32\n'
        '[calibration]\nlimit = 8\nmethod = "minmax"\n[budget]\nmax_drop = 100.0\n',
        encoding="utf-8",
    )
    result = edgeres("run", recipe, "--limit", 12, "-o", "kept.json", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == json.loads(Path("kept.json").read_text())
    (kept,) = json.loads(result.stdout)
    assert (kept["images"], kept["model"], kept["verdict"]) == (12, "resnet50 v1", "PASS")
    assert kept["provenance"]["quantization"]["method"] == "minmax"
    again = edgeres("run", recipe, "--limit", 12, "--accepted", "kept.json", "--json")
    assert again.exit_code == 0, again.stderr
    assert "(image by image)" in json.loads(again.stdout)[0]["reasons"][-1]


def test_interface_equalization_and_method_are_flags(workspace: Path, tiny_path: Path, edgeres: Run) -> None:
    flags = ("--io", "uint8", "--method", "auto", "--no-equalize")
    built = edgeres("build-engine", "--model", tiny_path, *flags, "--json")
    assert built.exit_code == 0, built.stderr
    record = json.loads(built.stdout)
    assert (record["io"], record["quantization"]["method"]) == ("uint8", "auto")
    assert record["chosen"]["method"] != "auto"
    assert calibrate.RangeTable.load(Path("calibration/tiny.json")).exponents == {}


# --- bad input: one clear message each, and nothing half-written ---


def test_wrong_variant(edgeres: Run) -> None:
    failed(edgeres("export", "--variant", "v2"), 2, "v2", "v1.5")


def test_missing_checkpoint(edgeres: Run) -> None:
    failed(edgeres("export", "--weights", "nowhere.pth"), 1, "nowhere.pth", "Next: ")


def test_checkpoint_of_another_network(edgeres: Run, tmp_path: Path) -> None:
    torch.save(tiny_resnet().state_dict(), tmp_path / "other.pth")
    failed(edgeres("export", "--weights", "other.pth"), 1, "other.pth is not a ResNet-50 checkpoint", "layer1.2")
    assert not Path("engines").exists()


def test_int8_without_calibration_images(edgeres: Run, tiny_path: Path) -> None:
    failed(edgeres("build-engine", "--model", tiny_path), 2, "calibration images", "--calibration")
    assert not Path("engines").exists()


def test_image_folder_without_images(edgeres: Run, tiny_path: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    failed(
        edgeres("calibrate", "--model", tiny_path, "--calibration", "empty"), 1, "no images in", "one folder per class"
    )


def test_missing_image_folder(edgeres: Run, tiny_path: Path) -> None:
    failed(edgeres("calibrate", "--model", tiny_path, "--calibration", "nowhere"), 1, "nowhere")


def test_corrupt_onnx(edgeres: Run, tiny_path: Path, train_folder: Path) -> None:
    Path("cut.onnx").write_bytes(tiny_path.read_bytes()[:5000])
    failed(
        edgeres("calibrate", "--model", "cut.onnx", "--calibration", train_folder), 1, "cut.onnx is not a valid ONNX"
    )
    assert not Path("calibration").exists()


def test_foreign_onnx(workspace: Path, edgeres: Run, tiny_path: Path) -> None:
    model = graph.load(tiny_path)
    model.graph.input[0].name = "data"
    for node in model.graph.node:
        node.input[:] = ["data" if n == "input" else n for n in node.input]
    graph.save(model, Path("foreign.onnx"))
    failed(edgeres("build-engine", "--model", "foreign.onnx"), 1, "foreign.onnx", "'data'")


def test_table_of_another_model(workspace: Path, edgeres: Run, tiny_path: Path) -> None:
    edgeres("calibrate", "--model", tiny_path)
    table = calibrate.RangeTable.load(Path("calibration/tiny.json"))
    table.made_from["model"] = "f" * 64
    table.save(Path("other.json"))
    result = edgeres("build-engine", "--model", tiny_path, "--calibration", "other.json")
    failed(result, 1, "not of the same model", "ffffffffffff", "edgeres calibrate")
    assert not Path("engines").exists()


def test_table_given_by_hand(workspace: Path, edgeres: Run, tiny_path: Path) -> None:
    edgeres("calibrate", "--model", tiny_path, "-o", "kept/mine.json")
    result = edgeres("build-engine", "--model", tiny_path, "--calibration", "kept/mine.json")
    assert result.exit_code == 0, result.stderr
    assert not Path("calibration").exists()


@pytest.mark.parametrize("name", ["edgeres.toml", "recipe.toml"])
def test_unknown_key(edgeres: Run, name: str) -> None:
    Path(name).write_text('[model]\nvariannt = "v1"\n', encoding="utf-8")
    Path("recipe.toml").touch()
    failed(edgeres("run", "recipe.toml"), 2, "variannt", name, "did you mean 'variant'")


def test_missing_recipe(edgeres: Run) -> None:
    failed(edgeres("run", "nowhere.toml"), 1, "nowhere.toml")


def test_unknown_target(workspace: Path, edgeres: Run, tiny_path: Path) -> None:
    failed(edgeres("build-engine", "--model", tiny_path, "--target", "cpuu"), 2, "cpuu", "did you mean 'cpu'")


def test_validating_what_was_not_built(workspace: Path, edgeres: Run, tiny_path: Path) -> None:
    failed(edgeres("validate", "--model", tiny_path), 1, "no engine at", "edgeres build-engine")


def test_edited_engine(workspace: Path, edgeres: Run, tiny_path: Path) -> None:
    built = edgeres("build-engine", "--model", tiny_path, "--precision", "fp32")
    with Path(built.stdout.strip()).open("ab") as f:
        f.write(b"x")
    failed(edgeres("validate", "--model", tiny_path, "--precision", "fp32"), 1, "not the file that was built")


def test_engine_of_another_model(workspace: Path, edgeres: Run, tiny_path: Path) -> None:
    edgeres("build-engine", "--model", tiny_path, "--precision", "fp32")
    model = graph.load(tiny_path)
    model.graph.initializer[0].raw_data = bytes(len(model.graph.initializer[0].raw_data))
    graph.save(model, Path("tiny.onnx"))
    result = edgeres("validate", "engines/out/tiny-fp32-cpu", "--model", "tiny.onnx")
    failed(result, 1, "was built from another model", "--model")


def test_calibrating_on_validation_images(workspace: Path, edgeres: Run, tiny_path: Path, val_folder: Path) -> None:
    arguments = ("--model", tiny_path, "--precision", "int8")
    edgeres("build-engine", *arguments, "--calibration", val_folder)
    failed(edgeres("validate", *arguments), 1, "24 validation images are calibration images too", "training split")


def test_unreadable_images(workspace: Path, edgeres: Run, tiny_path: Path, train_folder: Path) -> None:
    mixed = workspace / "mixed" / "class0"
    mixed.mkdir(parents=True)
    for source in sorted((train_folder / "class0").iterdir()):
        (mixed / source.name).write_bytes(source.read_bytes())
    (mixed / "7.jpg").write_bytes((mixed / "7.jpg").read_bytes()[:200])
    (mixed / "8.png").write_bytes(b"")
    arguments = ("calibrate", "--model", tiny_path, "--calibration", "mixed")
    failed(edgeres(*arguments), 1, "2 unreadable images", "class0/7.jpg", "class0/8.png", "--skip-bad")
    assert not Path("calibration").exists()
    skipped = edgeres(*arguments, "--skip-bad")
    assert skipped.exit_code == 0
    assert "skipped class0/7.jpg" in skipped.stderr
    assert calibrate.RangeTable.load(Path("calibration/tiny.json")).images == 7


def test_class_count_that_does_not_fit(workspace: Path, edgeres: Run, tiny_path: Path) -> None:
    edgeres("build-engine", "--model", tiny_path, "--precision", "fp32")
    for i in range(2):
        (workspace / "two" / f"c{i}").mkdir(parents=True)
        (workspace / "two" / f"c{i}" / "0.pgm").write_bytes(b"P5 8 8 255\n" + bytes([i]) * 64)
    result = edgeres("validate", "--model", tiny_path, "--precision", "fp32", "--data", "two")
    failed(result, 1, "4 classes", "has 2", "--labels")


def test_a_folder_that_cannot_be_written(
    workspace: Path, edgeres: Run, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", "engines")

    monkeypatch.setattr(Path, "mkdir", read_only)
    failed(
        edgeres("build-engine", "--model", tiny_path, "--quiet"),
        1,
        "cannot write engines",
        "Read-only file system",
        "Next: ",
    )


def test_a_pack_holds_the_whole_set_unless_a_flag_limits_it(workspace: Path, edgeres: Run, val_folder: Path) -> None:
    with (workspace / "edgeres.toml").open("a", encoding="utf-8") as f:
        f.write("limit = 3\n")  # under [validation]
    whole = edgeres("pack", val_folder, "--input-size", 32, "-o", "whole.pack")
    assert "24 of 24 images" in whole.stderr
    some = edgeres("pack", val_folder, "--input-size", 32, "--limit", 5, "-o", "some.pack")
    assert "5 of 24 images" in some.stderr
    failed(edgeres("pack", "some.pack"), 2, "is a pack already")


def test_a_pack_of_this_folder_is_called_as_the_folder_is(
    edgeres: Run, train_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(train_folder, tmp_path / "images")
    monkeypatch.chdir(tmp_path / "images")
    assert edgeres("pack", ".", "--input-size", 32).stdout == "images.pack\n"
    assert Path("images.pack").is_file()


@pytest.mark.parametrize("command", ["calibrate", "quantize", "pack", "benchmark", "run"])
def test_that_nothing_can_be_written_is_known_before_the_work(
    workspace: Path,
    edgeres: Run,
    tiny_path: Path,
    val_folder: Path,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = ("--model", tiny_path, "--precision", "fp32")
    assert edgeres("build-engine", *model).exit_code == 0
    arguments = {"calibrate": model[:2], "quantize": model[:2], "pack": (val_folder,), "benchmark": model}
    for work in ("ranges.make_table", "tune.choose", "pack.read_ahead", "lineup.run", "pipeline.run"):
        monkeypatch.setattr(f"edgeres.{work}", lambda *_, **__: pytest.fail("work was done before"))
    (workspace / "there.json").mkdir()
    result = edgeres(command, *arguments.get(command, ("edgeres.toml",)), "-o", "there.json")
    failed(result, 1, "cannot write there.json", "it is a folder")


def test_that_no_result_can_be_written_is_known_before_the_images_are_looked_at(
    workspace: Path, edgeres: Run, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ("--model", tiny_path, "--precision", "fp32")
    engine = Path(edgeres("build-engine", *model).stdout.strip())
    (engine.parent / "result.json").mkdir()
    monkeypatch.setattr("edgeres.pipeline.images_to_judge", lambda *_: pytest.fail("work was done before"))
    failed(edgeres("validate", *model), 1, "cannot write", "result.json", "it is a folder", "copy its folder")


def test_a_list_of_images_is_not_replaced_by_that_of_a_table(
    workspace: Path, edgeres: Run, tiny_path: Path, train_folder: Path
) -> None:
    images = [f"{train_folder}/class0/{name}\n" for name in ("1.jpg", "2.png", "3.jpg")]
    (workspace / "train.txt").write_text("".join(images))
    arguments = ("calibrate", "--model", tiny_path, "--calibration", "train.txt", "--limit", "2")
    failed(edgeres(*arguments, "-o", "train.json"), 2, "train.txt would take the place of what it is made from")
    assert (workspace / "train.txt").read_text() == "".join(images)
    assert edgeres(*arguments, "-o", "table.json").exit_code == 0


def test_an_export_does_not_take_the_place_of_the_weights(workspace: Path, edgeres: Run) -> None:
    (workspace / "mine.pth").write_bytes(b"weights")
    failed(edgeres("export", "--weights", "mine.pth", "-o", "mine.pth"), 2, "would take the place of what it is")


def test_an_import_does_not_take_the_place_of_its_source(workspace: Path, edgeres: Run, tiny_path: Path) -> None:
    path = workspace / "engines" / "out" / "mine.onnx"
    path.parent.mkdir(parents=True)
    shutil.copy(tiny_path, path)
    failed(edgeres("import", "engines/out/mine.onnx", "--like", tiny_path), 2, "would take the place of what it is")
    assert path.read_bytes() == tiny_path.read_bytes()
    assert edgeres("import", path, "--like", tiny_path, "-o", "other.onnx").exit_code == 0


def test_results_of_a_run_are_not_copied_onto_themselves(workspace: Path, edgeres: Run) -> None:
    output = "engines/out/resnet50-v1.5-int8-cpu/result.json"
    failed(edgeres("run", "edgeres.toml", "-o", output), 2, "would take the place of what it is made from")


def test_a_table_is_known_by_its_name(workspace: Path, edgeres: Run, tiny_path: Path) -> None:
    failed(edgeres("calibrate", "--model", tiny_path, "-o", "t.txt"), 2, "t.txt is no name", "such as t.json")
    assert not Path("t.txt").exists()


def test_what_may_not_be_read_is_said_so(workspace: Path, edgeres: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "there")

    monkeypatch.setattr("edgeres.inspect.targets", denied)
    failed(edgeres("targets"), 1, "cannot read or write there", "see to the rights there")


def test_an_error_under_json_is_json_on_stdout_too(workspace: Path, edgeres: Run) -> None:
    found = edgeres("inspect", "none.onnx", "--json")
    failed(found, 1, "none.onnx")
    error = json.loads(found.stdout)["error"]
    assert found.stderr.startswith(f"Error: {error['cause']}")
    assert set(error) == {"cause", "evidence", "next"}
    assert edgeres("inspect", "none.onnx").stdout == ""
    option = edgeres("build-engine", "--build", "size=1", "--json")
    assert json.loads(option.stdout)["error"]["cause"] == "'size=1' is no KEY=VALUE"


@pytest.mark.parametrize("command", ["targets", "report show", "data check"])
def test_wrong_usage_under_json_is_json_on_stdout_too(workspace: Path, edgeres: Run, command: str) -> None:
    found = edgeres(*command.split(), "--nosuch", "--json")
    assert found.exit_code == 2
    assert "No such option" in found.stderr
    error = json.loads(found.stdout)["error"]
    assert "--nosuch" in error["cause"]
    assert f"{command} --help" in error["next"]
    assert edgeres(*command.split(), "--nosuch").stdout == ""


def test_a_disk_that_cannot_be_written_is_json_too(
    workspace: Path, edgeres: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "there")

    monkeypatch.setattr("edgeres.inspect.targets", full)
    assert json.loads(edgeres("targets", "--json").stdout)["error"]["cause"] == "cannot write there"


@pytest.mark.parametrize(
    ("command", "function", "ways"),
    [
        ("selftest", "edgeres.selftest.run", "with -o, with --work, from another workspace"),
        ("card", "edgeres.card.write_card", "with -o, from another workspace"),
        ("validate", "edgeres.build.Engine.load", "from another workspace"),
        ("report show", "edgeres.publish.read", "with --html, with --markdown, with --junit, from another workspace"),
    ],
)
def test_where_else_to_write_is_what_the_command_has_an_option_for(
    workspace: Path, edgeres: Run, monkeypatch: pytest.MonkeyPatch, command: str, function: str, ways: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "there")

    monkeypatch.setattr(function, full)
    assert edgeres(*command.split(), "a.bundle").stderr.endswith(f"Next: make room there, or write elsewhere: {ways}\n")


@pytest.mark.parametrize(
    ("arguments", "goes_on"),
    [
        (("validate", "engine"), True),
        (("validate", "engine", "--ray", "auto"), False),  # it begins anew
        (("validate", "engine", "--quiet"), False),
        (("benchmark", "engine"), False),
    ],
)
def test_a_command_that_was_stopped_says_whether_it_can_go_on(
    workspace: Path, edgeres: Run, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], goes_on: bool
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("edgeres.build.Engine.load", stopped)
    found = edgeres(*arguments)
    assert ("the same command goes on from there" in found.stderr) is goes_on
    assert (found.exit_code, "Aborted!" in found.stderr) == (1, True)
