from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from edgeres.errors import EdgeresError, InputError, UsageError
from edgeres.recipe import (
    Budget,
    ModelSection,
    Preprocess,
    Recipe,
    find_workspace,
    from_dict,
    load_recipe,
    merge,
    parse_setting,
    read_record,
    with_defaults,
)
from edgeres.trt import Options


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_without_any_file(tmp_path: Path) -> None:
    recipe = load_recipe(tmp_path)
    assert recipe == Recipe()
    assert (recipe.model.variant, recipe.model.weights, recipe.model.opset) == ("v1.5", "imagenet", 17)
    assert (recipe.engine.precision, recipe.engine.target) == ("int8", "cpu")
    assert recipe.preprocess == Preprocess(224, 256, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "RGB")


def test_later_layers_win_key_by_key(tmp_path: Path) -> None:
    write(
        tmp_path / "edgeres.toml", 'seed = 1\n[model]\nvariant = "v1"\nopset = 13\nbatch = 2\n[budget]\nmax_drop = 1\n'
    )
    recipe = write(tmp_path / "a.toml", 'seed = 2\n[model]\nopset = 19\n[engine]\nprecision = "fp16"\n')
    found = load_recipe(tmp_path, recipe, {"model": {"batch": 8}, "engine": {"precision": "fp32"}})
    assert found.seed == 2
    assert found.model == ModelSection(variant="v1", opset=19, batch=8)
    assert found.engine.precision == "fp32"
    assert found.budget.max_drop == 1.0


def test_a_recipe_may_complete_the_workspace(tmp_path: Path) -> None:
    write(tmp_path / "edgeres.toml", "[preprocess]\ncrop = 32\n")
    recipe = write(tmp_path / "a.toml", "[preprocess]\nresize = 40\n")  # too small for the default crop alone
    assert load_recipe(tmp_path, recipe).preprocess == Preprocess(crop=32, resize=40)


def test_a_recipe_at_odds_with_the_workspace_is_the_one_named(tmp_path: Path) -> None:
    write(tmp_path / "edgeres.toml", "[preprocess]\nresize = 256\n")
    recipe = write(tmp_path / "a.toml", "[preprocess]\ncrop = 288\n")
    with pytest.raises(UsageError, match="256 is smaller than the input size 288") as error:
        load_recipe(tmp_path, recipe)
    assert "a.toml" in error.value.cause


def test_resize_follows_a_crop_from_a_later_layer(tmp_path: Path) -> None:
    write(tmp_path / "edgeres.toml", "[preprocess]\ncrop = 224\n")
    assert load_recipe(tmp_path, flags={"preprocess": {"crop": 112}}).preprocess.resize == 128


def test_paths_start_at_the_workspace_not_at_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "val").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    absolute = tmp_path / "elsewhere" / "names.txt"
    recipe = write(
        tmp_path / "recipes" / "a.toml",
        f'[model]\nweights = "my/a.pth"\n[calibration]\nimages = "~/train"\n'
        f'[validation]\nimages = "val"\nlabels = "{absolute}"\n',
    )
    found = load_recipe(tmp_path, recipe)
    assert found.model.weights == str(tmp_path / "my" / "a.pth")
    assert found.calibration.images == str(tmp_path / "home" / "train")
    assert found.validation.images == str(tmp_path / "val")
    assert found.validation.labels == str(absolute)


def test_a_published_name_stays_a_name_unless_a_file_has_it(tmp_path: Path) -> None:
    write(tmp_path / "edgeres.toml", '[model]\nweights = "imagenet"\n')
    assert load_recipe(tmp_path).model.weights == "imagenet"
    (tmp_path / "imagenet").write_bytes(b"")
    assert load_recipe(tmp_path).model.weights == str(tmp_path / "imagenet")


def test_a_bare_file_name_is_a_path(tmp_path: Path) -> None:
    write(tmp_path / "edgeres.toml", '[model]\nweights = "a.pth"\n')
    assert load_recipe(tmp_path).model.weights == str(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("text", "cause", "hint"),
    [
        ("sede = 1", "unknown key 'sede'", "did you mean 'seed'?"),
        ("[modle]\nopset = 17", "unknown key 'modle'", "did you mean 'model'?"),
        ('[model]\nvariante = "v1"', "unknown key 'variante'", "did you mean 'variant'?"),
        ("[model]\nzzz = 1", "unknown key 'zzz'", "variant, weights, classes, opset, batch"),
        ("model = 3", "'model'", "write [model] above its keys"),
    ],
)
def test_unknown_keys_are_refused_with_file_and_suggestion(tmp_path: Path, text: str, cause: str, hint: str) -> None:
    path = write(tmp_path / "mine.toml", text)
    with pytest.raises(UsageError) as error:
        load_recipe(tmp_path, path)
    assert cause in error.value.cause
    assert str(path) in error.value.cause
    assert hint in error.value.hint


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ('seed = "1"', "'seed'.* must be int, not '1'"),
        ("seed = true", "'seed'.* must be int, not True"),
        ("seed = 1.0", "'seed'.* must be int, not 1.0"),
        ("name = 5", "'name'.* must be str, not 5"),
        ("[model]\nopset = '17'", "'opset'.* must be int"),
        ("[model]\nbatch = false", "'batch'.* must be int"),
        ("[model]\nvariant = 1.5", "'variant'.* must be str"),
        ("[budget]\nmax_drop = '1'", "'max_drop'.* must be float"),
        ("[budget]\nmax_drop = true", "'max_drop'.* must be float"),
        ("[preprocess]\nmean = 0.5", "'mean'.* must be tuple"),
        ("[preprocess]\nmean = [0.5, 'x', 0.5]", "'mean'.* must be float, not 'x'"),
        ("[calibration]\nimages = ['a', 'b']", "'images'.* must be str"),
    ],
)
def test_wrong_types_are_refused_with_file(tmp_path: Path, text: str, cause: str) -> None:
    path = write(tmp_path / "mine.toml", text)
    with pytest.raises(UsageError, match=cause) as error:
        load_recipe(tmp_path, path)
    assert str(path) in error.value.cause


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ('[model]\nvariant = "v2"', "unknown variant 'v2'"),
        ("[model]\nopset = 12", "opset 12"),
        ("[model]\nopset = 23", "opset 23"),
        ("[model]\nclasses = 0", "classes is 0"),
        ("[model]\nbatch = -1", "batch is -1"),
        ("[calibration]\nlimit = 0", "limit is 0"),
        ('[calibration]\nmethod = "entropi"', "unknown method"),
        ('[engine]\nprecision = "int4"', "unknown precision"),
        ("[validation]\nlimit = 0", "limit is 0"),
        ("[budget]\nmax_drop = -0.1", "max_drop is -0.1"),
        ("[budget]\nmax_drop = nan", "max_drop is nan"),
        ("[budget]\nmax_drop = 101", "max_drop is 101"),
        ("[budget]\nmin_relative = 100.5", "min_relative is 100.5"),
        ("[preprocess]\ncrop = 0", "crop .*is 0"),
        ("[preprocess]\nresize = 200", "resize 200 is smaller than the input size 224"),
        ('[preprocess]\ninterpolation = "nearby"', "unknown preprocess.interpolation"),
        ('[preprocess]\nchannel_order = "rgb"', "unknown preprocess.channel_order"),
        ("[preprocess]\nmean = [0.5, 0.5]", "three finite numbers"),
        ("[preprocess]\nstd = [1, 1, 0]", "no std of 0"),
        ("[preprocess]\nstd = [1, 1, nan]", "three finite numbers"),
        ("[preprocess]\nmean = [0, 0, inf]", "three finite numbers"),
        ('name = "a/b"', "'a/b' is no file name"),
        ('name = ""', "'' is no file name"),
    ],
)
def test_bad_values_are_refused_with_file(tmp_path: Path, text: str, cause: str) -> None:
    path = write(tmp_path / "edgeres.toml", text)
    with pytest.raises(UsageError, match=cause) as error:
        load_recipe(tmp_path)
    assert str(path) in error.value.cause


def test_a_near_miss_is_suggested_for_a_value(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        load_recipe(tmp_path, write(tmp_path / "a.toml", '[calibration]\nmethod = "entropi"'))
    choices = (
        "minmax, entropy, percentile-99.9, percentile-99.99, percentile, mse, auto, tensorrt-entropy, tensorrt-minmax"
    )
    assert error.value.hint == f"did you mean 'entropy'? choose from: {choices}"


def test_a_bad_flag_is_refused_too(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^model\.batch is 0\n"):
        load_recipe(tmp_path, flags={"model": {"batch": 0}})


@pytest.mark.parametrize("content", [b"seed = ", b"[model\n", b"seed = 1\nseed = 2\n", b'name = "\xff"\n'])
def test_what_is_not_toml_is_refused_with_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="is not valid TOML") as error:
        load_recipe(tmp_path, path)
    assert str(path) in error.value.cause
    assert error.value.evidence


def test_a_recipe_that_is_not_there_is_an_error_and_a_workspace_file_is_not(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read recipe .*absent\.toml") as error:
        load_recipe(tmp_path, tmp_path / "absent.toml")
    assert error.value.hint


def test_an_error_in_the_workspace_names_the_workspace(tmp_path: Path) -> None:
    write(tmp_path / "edgeres.toml", "[model]\nopset = 1")
    recipe = write(tmp_path / "a.toml", "[model]\nopset = 17")
    with pytest.raises(UsageError, match=r"edgeres\.toml"):
        load_recipe(tmp_path, recipe)


def test_every_error_says_what_to_do_or_what_was_seen(tmp_path: Path) -> None:
    for text in ("[model]\nopset = 1", "x = 1", "[preprocess]\nresize = 1", "seed = "):
        with pytest.raises(EdgeresError) as error:
            load_recipe(tmp_path, write(tmp_path / "a.toml", text))
        assert error.value.hint or error.value.evidence


@pytest.mark.parametrize(("crop", "resize"), [(224, 256), (288, 329), (64, 73), (32, 37), (1, 1)])
def test_resize_defaults_to_the_imagenet_ratio(crop: int, resize: int) -> None:
    assert Preprocess(crop=crop).resize == resize


@pytest.mark.parametrize(
    ("said", "crop", "resize"),
    [({}, 224, 232), ({"crop": 224}, 224, 232), ({"crop": 288}, 288, 329), ({"crop": 224, "resize": 240}, 224, 240)],
)
def test_a_published_resize_goes_with_its_own_crop(
    tmp_path: Path, said: dict[str, int], crop: int, resize: int
) -> None:
    recipe = load_recipe(tmp_path, flags={"preprocess": said})
    assert with_defaults(recipe, Preprocess(resize=232)) == Preprocess(crop=crop, resize=resize)


def test_resize_may_equal_the_crop() -> None:
    assert Preprocess(crop=64, resize=64).size == 64


def test_preprocess_reads_its_own_record_back() -> None:
    preprocess = Preprocess(64, 70, "bicubic", (0.5, 0.4, 0.3), (0.2, 0.2, 0.1), "BGR")
    assert Preprocess(**preprocess.to_json()) == preprocess


CHANGES: list[dict[str, Any]] = [
    {"crop": 223},
    {"resize": 232},
    {"interpolation": "bicubic"},
    {"mean": (0.5, 0.5, 0.5)},
    {"std": (0.5, 0.5, 0.5)},
    {"channel_order": "BGR"},
]


@pytest.mark.parametrize("change", CHANGES)
def test_preprocess_digest_changes_with_each_field(change: dict[str, Any]) -> None:
    changed = dataclasses.replace(Preprocess(), **change)
    assert changed.digest() != Preprocess().digest() == Preprocess(224, 256).digest()


def test_integers_are_read_where_floats_are_meant() -> None:
    assert from_dict(Budget, {"max_drop": 1}).max_drop == 1.0
    mean = from_dict(Preprocess, {"mean": [0, 0, 0]}).mean
    assert mean == (0.0, 0.0, 0.0)
    assert all(type(m) is float for m in mean)


def test_recipes_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().seed = 1  # type: ignore[misc]


@dataclasses.dataclass(frozen=True)
class Needs:
    size: int
    note: str = ""


def test_a_missing_key_is_named() -> None:
    assert read_record(Needs, "size = 3", "x.toml") == Needs(3)
    with pytest.raises(UsageError, match=r"missing key 'size' in x\.toml"):
        read_record(Needs, 'note = "a"', "x.toml")
    with pytest.raises(UsageError, match=r"x\.toml is not valid TOML"):
        read_record(Needs, "size =", "x.toml")


def test_merge_leaves_its_arguments_alone() -> None:
    low, high = {"a": {"x": 1, "y": 2}, "b": 1}, {"a": {"y": 3}, "c": 4}
    assert merge(low, high) == {"a": {"x": 1, "y": 3}, "b": 1, "c": 4}
    assert low == {"a": {"x": 1, "y": 2}, "b": 1}
    assert high == {"a": {"y": 3}, "c": 4}


def test_a_home_that_nobody_has_is_refused(tmp_path: Path) -> None:
    recipe = write(tmp_path / "a.toml", '[calibration]\nimages = "~nobody-of-that-name/images"\n')
    with pytest.raises(UsageError, match="where ~nobody-of-that-name/images is cannot be known") as error:
        load_recipe(tmp_path, recipe)
    assert error.value.hint == "write the path out"


def test_the_nearest_workspace_above_is_found(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b" / "c"
    deep.mkdir(parents=True)
    (tmp_path / "edgeres.toml").touch()
    assert find_workspace(deep) == tmp_path.resolve()
    (tmp_path / "a" / "b" / "edgeres.toml").touch()
    assert find_workspace(deep) == (tmp_path / "a" / "b").resolve()
    assert find_workspace(tmp_path / "a") == tmp_path.resolve()


def test_without_a_workspace_the_start_is_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "edgeres.toml").mkdir()  # a folder of that name is none
    assert find_workspace(tmp_path) == tmp_path.resolve()
    assert find_workspace(Path("sub")) == tmp_path.resolve() / "sub"


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("tf32=true", "tf32", True),
        ("tf32=false", "tf32", False),
        ("level=4", "level", 4),
        ("workspace=512", "workspace", 512.0),
        ("workspace=0.5", "workspace", 0.5),
        ("profile=1,2,4", "profile", (1, 2, 4)),
        ("capabilities=8.6", "capabilities", ("8.6",)),
        ("capabilities=8.6,12.0", "capabilities", ("8.6", "12.0")),
        ("hardware=ampere-plus", "hardware", "ampere-plus"),
    ],
)
def test_a_setting_is_read_as_its_type(text: str, key: str, value: object) -> None:
    assert parse_setting(Options, text) == (key, value)
    assert type(parse_setting(Options, text)[1]) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("level=high", "'level' must be int, not 'high'"),
        ("tf32=1", "'tf32' must be bool, not '1'"),
        ("profile=1,b", "'profile' must be int, not 'b'"),
        ("level", "'level' is no KEY=VALUE"),
        ("timing_cache=x", "is no KEY=VALUE"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        parse_setting(Options, text)


def test_how_a_plan_is_built_is_kept_as_it_was_said(tmp_path: Path) -> None:
    (tmp_path / "edgeres.toml").write_text("[build]\nlevel = 2\nprofile = [1, 2, 4]\n", encoding="utf-8")
    recipe = load_recipe(tmp_path, flags={"build": {"level": 3}})
    assert recipe.build == {"level": 3, "profile": [1, 2, 4]}
