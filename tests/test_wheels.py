from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import edgeres
from edgeres import wheels
from edgeres.errors import InputError, UsageError
from edgeres.wheels import Python, Wheels, fits, platforms, repack

JETSON = Python((3, 10), "aarch64", (2, 35))
HERE = Python((sys.version_info[0], sys.version_info[1]), "x86_64", (2, 28))


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("py3-none-any", True),
        ("py2.py3-none-any", True),
        ("py2-none-any", False),
        ("py311-none-any", False),
        ("py39-none-any", True),
        ("cp310-cp310-manylinux_2_17_aarch64.manylinux2014_aarch64", True),
        ("cp310-cp310-manylinux_2_35_aarch64", True),
        ("cp310-cp310-manylinux_2_36_aarch64", False),
        ("cp310-cp310-manylinux2014_x86_64", False),
        ("cp39-cp39-manylinux2014_aarch64", False),
        ("cp311-cp311-manylinux2014_aarch64", False),
        ("cp310-cp310d-manylinux2014_aarch64", False),
        ("cp39-abi3-manylinux2014_aarch64", True),
        ("cp311-abi3-manylinux2014_aarch64", False),
        ("cp310-none-manylinux2014_aarch64", True),
        ("py3-none-manylinux1_aarch64", True),
        ("pp310-pypy310_pp73-manylinux2014_aarch64", False),
        ("cp310-cp310-linux_aarch64", False),
        ("cp310-cp310-musllinux_1_1_aarch64", False),
        ("cp310-cp310-macosx_11_0_arm64", False),
    ],
)
def test_a_wheel_fits_where_it_is_sure_to(tag: str, expected: bool) -> None:
    assert fits(tag, JETSON) is expected


@pytest.mark.parametrize("glibc", [(2, 36), (2, 35), (2, 31), (2, 28), (2, 17), (0, 0)])
def test_pip_is_told_every_platform_that_wheels_for_a_device_are_named_after(glibc: tuple[int, int]) -> None:
    device = Python((3, 10), "aarch64", glibc)
    told = platforms(device)
    assert told[-2:] == ["manylinux_2_28_aarch64", "manylinux2014_aarch64"]  # also where glibc is not known
    assert all(fits(f"cp310-cp310-{name}", device) for name in told if glibc >= (2, 28))
    assert ("manylinux_2_35_aarch64" in told, "manylinux_2_31_aarch64" in told) == (glibc >= (2, 35), glibc >= (2, 31))


def test_what_was_compiled_on_a_device_fits_those_like_it() -> None:
    assert fits("cp310-cp310-linux_aarch64", JETSON, alike=True)
    assert not fits("cp310-cp310-linux_x86_64", JETSON, alike=True)
    assert not fits("cp311-cp311-linux_aarch64", JETSON, alike=True)


def test_a_device_without_glibc_takes_what_is_not_compiled() -> None:
    musl = Python((3, 12), "aarch64", (0, 0))
    assert not fits("cp312-cp312-manylinux1_aarch64", musl)
    assert fits("py3-none-any", musl)


def test_pip_installs_the_packed_edgeres_and_it_works(tmp_path: Path) -> None:
    """An editable installation, as developers have, gives the same wheel as a plain one would."""
    wheel = repack(metadata.distribution("edgeres"), tmp_path)
    assert wheel.name == f"edgeres-{edgeres.__version__}-py3-none-any.whl"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([*pip, "--target", str(tmp_path / "there"), str(wheel)], check=True)
    code = "import edgeres, sys; from edgeres.targets import names; print(edgeres.__file__, *names())"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(tmp_path / "there")}, capture_output=True, text=True
    )
    assert done.stdout.startswith(f"{tmp_path}/there/edgeres/__init__.py ")
    assert "jetson-agx-orin" in done.stdout
    assert (tmp_path / "there" / "edgeres" / "device.sh").exists()
    assert (tmp_path / "there" / "bin" / "edgeres").exists()  # the console script, written anew
    with zipfile.ZipFile(wheel) as archive:
        assert not any(name.endswith(("direct_url.json", ".pth", ".pyc")) for name in archive.namelist())


def test_the_same_installation_gives_the_same_bytes(tmp_path: Path) -> None:
    distribution = metadata.distribution("markdown-it-py")
    one, two = repack(distribution, tmp_path / "1"), repack(distribution, tmp_path / "2")
    assert one.name == f"markdown_it_py-{distribution.version}-py3-none-any.whl"
    assert one.read_bytes() == two.read_bytes()
    before = one.stat().st_mtime_ns
    assert repack(distribution, tmp_path / "1").stat().st_mtime_ns == before
    with zipfile.ZipFile(one) as archive:
        names = archive.namelist()
        assert archive.testzip() is None
        assert not any("__pycache__" in name or name.endswith(("INSTALLER", "direct_url.json")) for name in names)
        assert not any(name.startswith(("..", "/")) for name in names)
        record = archive.read(f"markdown_it_py-{distribution.version}.dist-info/RECORD").decode()
    assert len(record.splitlines()) == len(names)


def install(site: Path, requires: str = "") -> metadata.Distribution:
    """A package as an installer leaves it: a module, a script that is no entry point, and a data file."""
    info = site / "lib" / "some_thing-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "bin").mkdir()
    (site / "bin" / "run-it").write_text("#!/home/me/env/bin/python3\nprint(1)\n")
    (site / "bin" / "entry").write_text("#!/home/me/env/bin/python3\n")
    (site / "share").mkdir()
    (site / "share" / "page.1").write_text("page")
    (site / "lib" / "some_thing.py").write_text("x = 1\n")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: some.thing\nVersion: 1.0\n{requires}")
    (info / "WHEEL").write_text("Wheel-Version: 1.0\nTag: py3-none-any\n")
    (info / "entry_points.txt").write_text("[console_scripts]\nentry = some_thing:x\n")
    files = ["some_thing.py", "../bin/run-it", "../bin/entry", "../share/page.1"]
    files += [f"{info.name}/{name}" for name in ("METADATA", "WHEEL", "entry_points.txt", "RECORD")]
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    return metadata.PathDistribution(info)


def test_scripts_and_data_outside_of_site_packages_are_in_the_wheel(tmp_path: Path) -> None:
    wheel = repack(install(tmp_path), tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        assert sorted(archive.namelist()) == [
            "some_thing-1.0.data/data/share/page.1",
            "some_thing-1.0.data/scripts/run-it",
            "some_thing-1.0.dist-info/METADATA",
            "some_thing-1.0.dist-info/RECORD",
            "some_thing-1.0.dist-info/WHEEL",
            "some_thing-1.0.dist-info/entry_points.txt",
            "some_thing.py",
        ]
        assert archive.read("some_thing-1.0.data/scripts/run-it") == b"#!python\nprint(1)\n"


def test_a_damaged_installation_is_refused_with_what_to_do(tmp_path: Path) -> None:
    distribution = install(tmp_path)
    (tmp_path / "lib" / "some_thing.py").unlink()
    with pytest.raises(InputError, match=r"some\.thing 1\.0") as caught:
        repack(distribution, tmp_path)
    assert "some_thing.py is missing" in caught.value.evidence
    assert "--force-reinstall some.thing" in caught.value.hint
    assert list(tmp_path.glob("*.whl")) == []
    info = tmp_path / "lib" / "some_thing-1.0.dist-info"
    (info / "RECORD").unlink()
    with pytest.raises(InputError) as caught:
        repack(distribution, tmp_path)
    assert "RECORD" in caught.value.evidence
    (info / "direct_url.json").write_text(json.dumps({"dir_info": {"editable": True}}))
    with pytest.raises(InputError) as caught:
        wheels.stamp(distribution)
    assert "editable" in caught.value.evidence
    (info / "WHEEL").unlink()
    with pytest.raises(InputError, match="as a wheel"):
        wheels.tags(distribution)


def test_a_stamp_changes_with_what_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distribution = install(tmp_path)
    before = wheels.stamp(distribution)
    record = tmp_path / "lib" / "some_thing-1.0.dist-info" / "RECORD"
    record.write_text(record.read_text() + "more.py,,\n")
    assert wheels.stamp(distribution) != before
    # an editable one is what its folder holds
    package = tmp_path / "src" / "thing"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "x.pyc").write_text("")
    (package / ".hidden").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path / "src"))
    info = tmp_path / "lib" / "some_thing-1.0.dist-info"
    (info / "direct_url.json").write_text(json.dumps({"dir_info": {"editable": True}}))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n")
    editable = metadata.PathDistribution(info)
    assert [name for name, _ in wheels._editable(editable)] == ["thing/__init__.py"]
    before = wheels.stamp(editable)
    (package / "__init__.py").write_text("x = 1\n")
    assert wheels.stamp(editable) != before


def test_all_that_edgeres_needs_is_found_once_and_nothing_of_its_extras() -> None:
    names = [wheels.name_of(distribution.name) for distribution in wheels.installed(["edgeres", "onnxruntime"])]
    assert {"edgeres", "click", "rich", "markdown-it-py", "mdurl", "pygments", "numpy", "onnxruntime"} <= set(names)
    assert not {"torch", "onnx", "pillow", "colorama"} & set(names)
    assert len(names) == len(set(names))
    assert wheels.installed(["no-such-package"]) == []


def test_a_device_of_another_kind_gets_what_fits_and_is_told_what_it_lacks(tmp_path: Path) -> None:
    found = Wheels(tmp_path, ["onnxruntime"])
    with tarfile.open(found.tar(JETSON)) as tar:
        names = tar.getnames()
    assert {name.split("-")[0].lower() for name in names} >= {"edgeres", "click", "rich", "markdown_it_py", "pygments"}
    assert all(fits(wheels.tag_of(Path(name)), JETSON) for name in names)
    lacking = found.lacking(JETSON)
    assert {"numpy", "onnxruntime"} <= lacking
    assert ("tomli" in lacking) is not any(name.startswith("tomli-") for name in names)  # Python 3.10 needs it
    assert not {"edgeres", "rich"} & lacking
    assert found.digest(JETSON) != found.digest(HERE)


def test_wheels_of_the_user_come_first_where_they_fit(tmp_path: Path) -> None:
    more = tmp_path / "more"
    more.mkdir()
    with pytest.raises(UsageError, match="holds no wheels"):
        Wheels(tmp_path, [], more)
    name = "rich-99.0-cp310-abi3-manylinux2014_aarch64.whl"
    (more / name).write_bytes(b"a wheel")
    (more / "edgeres-99.0-py3-none-any.whl").write_bytes(b"of another version")
    (more / "pycuda-1.0-cp310-cp310-linux_aarch64.whl").write_bytes(b"made on such a device")
    found = Wheels(tmp_path, [], more)
    with tarfile.open(found.tar(JETSON)) as tar:
        names = tar.getnames()
        assert [n for n in names if n.startswith(("edgeres-", "pycuda-", "rich-"))] == [
            f"edgeres-{edgeres.__version__}-py3-none-any.whl",
            "pycuda-1.0-cp310-cp310-linux_aarch64.whl",
            name,
        ]
        member = tar.extractfile(name)
        assert member
        assert member.read() == b"a wheel"
    assert found.tar(JETSON) == found.tar(JETSON)
    assert name not in {path.name for path in found._chosen(HERE)[0]}
    assert "rich" in {distribution.name for distribution in found._chosen(HERE)[1]}
    before = found.digest(JETSON)
    (more / name).write_bytes(b"another")
    assert found.digest(JETSON) != before
    (more / "rich.whl").write_bytes(b"")
    with pytest.raises(InputError, match="not named like a wheel"):
        Wheels(tmp_path, [], more)
