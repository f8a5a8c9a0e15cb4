"""Installed packages as wheel files, for a device that cannot reach a package index.

A wheel is a zip of a package, its metadata and a RECORD with the sum of each file (packaging.python.org, "Binary
distribution format"); an installation keeps all of it, so that it can be packed again. Standard library only.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import re
import tarfile
import threading
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath

from edgeres.errors import InputError, UsageError
from edgeres.files import atomic, digest, sha256_file

MADE_HERE = {"INSTALLER", "REQUESTED", "RECORD", "direct_url.json"}
"""Files of the metadata that an installer writes, and no wheel has."""
OLD_MANYLINUX = {"manylinux1": (2, 5), "manylinux2010": (2, 12), "manylinux2014": (2, 17)}
"""glibc that these platform tags ask for (PEP 600)."""
USUAL_GLIBC = ((2, 39), (2, 35), (2, 34), (2, 31), (2, 28))
"""What newer wheels are built for: OpenVINO's for 64-bit Arm ask for 2.31 and 2.35, where others ask for 2.28."""
EPOCH = (1980, 1, 1, 0, 0, 0)
"""The time of every file in a wheel: the first that zip knows."""


@dataclass(frozen=True)
class Python:
    """An interpreter on Linux: ``version`` such as (3, 10), ``machine`` as uname says, ``glibc`` such as (2, 35)."""

    version: tuple[int, int]
    machine: str
    glibc: tuple[int, int]


def fits(tag: str, python: Python, alike: bool = False) -> bool:
    """Whether ``python`` can use a wheel of this tag, such as "cp310-abi3-manylinux_2_17_x86_64.manylinux2014_x86_64".

    What is sure to fit only: what was compiled for one machine (linux_x86_64) counts if the devices are ``alike`` that
    machine.
    """
    interpreters, abis, platforms = (part.split(".") for part in tag.split("-"))
    return (
        any(_runs(interpreter, abi, python.version) for interpreter in interpreters for abi in abis)
        and any(_on(platform, python, alike) for platform in platforms)
    )  # fmt: skip


def _runs(interpreter: str, abi: str, version: tuple[int, int]) -> bool:
    found = re.fullmatch(r"(py|cp)(\d)(\d*)", interpreter)
    if not found:
        return False
    asked = int(found[2]), int(found[3] or 0)
    older = asked[0] == version[0] and asked <= version
    if found[1] == "py":
        return abi == "none" and older
    return (abi == "abi3" and older) or (asked == version and abi in ("none", interpreter))


def _on(platform: str, python: Python, alike: bool) -> bool:
    if platform == "any" or (alike and platform == f"linux_{python.machine}"):
        return True
    name = platform.removesuffix(f"_{python.machine}")
    found = re.fullmatch(r"manylinux_(\d+)_(\d+)", name)
    needed = (int(found[1]), int(found[2])) if found else OLD_MANYLINUX.get(name)
    return name != platform and needed is not None and needed <= python.glibc


def platforms(python: Python) -> list[str]:
    """What ``pip download --platform`` is told for ``python``, all of it: pip takes such names as they are written."""
    names = [f"manylinux_{a}_{b}" for a, b in USUAL_GLIBC if (a, b) <= max(python.glibc, USUAL_GLIBC[-1])]
    return [f"{name}_{python.machine}" for name in (*names, "manylinux2014")]


def tag_of(wheel: Path) -> str:
    """The tag in the name of a wheel file; `InputError` if it has none."""
    parts = wheel.stem.split("-")
    if wheel.suffix != ".whl" or len(parts) not in (5, 6):
        raise InputError(f"{wheel} is not named like a wheel", hint="keep the names of wheels as pip downloads them")
    return "-".join(parts[-3:])


def name_of(wheel: Path | str) -> str:
    """The normal form of a package's name, also of a wheel file's: "markdown-it-py"."""
    name = wheel.name.split("-")[0] if isinstance(wheel, Path) else wheel
    return re.sub(r"[-_.]+", "-", name).lower()


def installed(names: Sequence[str]) -> list[metadata.Distribution]:
    """What is installed here of ``names`` and of all they need without extras, each once."""
    found: dict[str, metadata.Distribution] = {}
    waiting = list(names)
    while waiting:
        if (name := name_of(waiting.pop(0))) in found:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # for another Python or system than this, or left to the device
            continue
        for needed in found[name].requires or ():
            requirement, _, marker = needed.partition(";")
            if "extra" not in marker:
                waiting.append(re.split(r"[^\w.-]", requirement.strip())[0])
    return list(found.values())


def tags(distribution: metadata.Distribution) -> str:
    """The tag that a wheel of an installed package has in its name."""
    found = re.findall(r"^Tag: *(\w+)-(\w+)-(\w+)\s*$", distribution.read_text("WHEEL") or "", re.MULTILINE)
    if not found:
        raise _damaged(distribution, "its metadata has no WHEEL file")
    return "-".join(".".join(sorted(set(column))) for column in zip(*found, strict=True))


def repack(distribution: metadata.Distribution, folder: Path) -> Path:
    """Write the wheel of an installed package, also of an editable one, to ``folder``; the same one is not made twice.

    Console scripts are left to the installer, which writes them anew. The same files give the same wheel.
    """
    stem = f"{re.sub(r'[-_.]+', '_', distribution.name)}-{distribution.version}"
    path = folder / f"{stem}-{tags(distribution)}.whl"
    if path.exists():
        return path
    info, rows = f"{stem}.dist-info", list[str]()
    with atomic(path) as temporary, zipfile.ZipFile(temporary, "w") as out:
        for name, source in sorted(_files(distribution, stem)):
            data = source.read_bytes()
            if name.startswith(f"{stem}.data/scripts/"):
                data = re.sub(rb"\A#!.*python.*", b"#!python", data)  # the installer puts its own in
            checksum = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            rows.append(f'"{name}",sha256={checksum},{len(data)}')
            out.writestr(_entry(name), data, compresslevel=1)  # a device is near, and time counts
        rows.append(f'"{info}/RECORD",,')
        out.writestr(_entry(f"{info}/RECORD"), "\n".join(rows) + "\n")
    return path


def stamp(distribution: metadata.Distribution) -> str:
    """A digest of what `repack` would pack, without the time that packing takes."""
    if _is_editable(distribution):
        return digest({name: sha256_file(path) for name, path in _editable(distribution)})
    return digest(distribution.read_text("RECORD"))  # it has the sum of each file


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, EPOCH)
    entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
    return entry


def _files(distribution: metadata.Distribution, stem: str) -> Iterator[tuple[str, Path]]:
    """Name in the wheel and place here, of all its files but RECORD."""
    if editable := _is_editable(distribution):
        yield from _editable(distribution)
    if not distribution.files:
        raise _damaged(distribution, "its metadata has no RECORD of its files")
    scripts = {entry.name for entry in distribution.entry_points if entry.group in ("console_scripts", "gui_scripts")}
    for file in distribution.files:
        source, name = Path(str(file.locate())), str(file)
        inside = ".dist-info" in file.parts[0]
        if (inside and file.name in MADE_HERE) or file.suffix == ".pyc" or (editable and not inside):
            continue
        if file.parts[0] == "..":
            if file.name in scripts:
                continue
            name = f"{stem}.data/{_outside(file)}"
        elif inside:
            name = str(PurePosixPath(f"{stem}.dist-info", *file.parts[1:]))
        if not source.is_file():
            raise _damaged(distribution, f"{source} is missing")
        yield name, source


def _outside(file: PurePosixPath) -> PurePosixPath:
    """Where a wheel has what was installed outside of site-packages: scripts/x of bin/x, data/share/x of share/x."""
    parts = [part for part in file.parts if part != ".."]
    return PurePosixPath("scripts", *parts[1:]) if parts[0] == "bin" else PurePosixPath("data", *parts)


def _is_editable(distribution: metadata.Distribution) -> bool:
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    return bool(origin.get("dir_info", {}).get("editable"))


def _editable(distribution: metadata.Distribution) -> Iterator[tuple[str, Path]]:
    """The package of an editable installation, which has the name of the distribution, where it really lies."""
    name = re.sub(r"[-.]", "_", distribution.name)
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise _damaged(distribution, f"it is editable, and no package {name!r} is found")
    root = Path(next(iter(found.submodule_search_locations)))
    for path in root.rglob("*"):
        inner = path.relative_to(root)
        if path.is_file() and "__pycache__" not in inner.parts and not any(p.startswith(".") for p in inner.parts):
            yield f"{name}/{inner.as_posix()}", path


def _damaged(distribution: metadata.Distribution, evidence: str) -> InputError:
    return InputError(
        f"cannot pack the installed {distribution.name} {distribution.version} as a wheel",
        evidence=evidence,
        hint=f"install it with pip in a virtual environment: pip install --force-reinstall {distribution.name}",
    )


class Wheels:
    """What devices install: edgeres and ``packages``, and what they need, as far as it fits a device.

    Wheels are made in ``folder`` of what is installed here, each once. One in the folder ``more`` comes before that,
    but for edgeres itself, and is known to be for such devices.
    """

    def __init__(self, folder: Path, packages: Sequence[str], more: Path | None = None) -> None:
        self.folder, self.packages, self._lock = folder, list(packages), threading.Lock()
        found = sorted(more.glob("*.whl")) if more else []
        if more and not found:
            raise UsageError(f"{more} holds no wheels", hint="give the folder that `pip download -d` filled")
        self.more = {wheel: tag_of(wheel) for wheel in found if name_of(wheel) != "edgeres"}
        self.here = installed(["edgeres", *packages])

    def _chosen(self, python: Python) -> tuple[list[Path], list[metadata.Distribution]]:
        """The wheels of ``more`` that fit, and what is installed here of other packages."""
        theirs = [wheel for wheel, tag in self.more.items() if fits(tag, python, alike=True)]
        names = {name_of(wheel) for wheel in theirs}
        return theirs, [distribution for distribution in self.here if name_of(distribution.name) not in names]

    def digest(self, python: Python) -> str:
        """Of what the wheels for ``python`` hold."""
        theirs, ours = self._chosen(python)
        stamps = {name_of(each.name): [each.version, stamp(each)] for each in ours if fits(tags(each), python)}
        return digest([{wheel.name: sha256_file(wheel) for wheel in theirs}, stamps, self.packages])

    def tar(self, python: Python) -> Path:
        """A tar of all wheels that ``python`` can use."""
        path = self.folder / f"{self.digest(python)[:16]}.tar"
        with self._lock:
            if path.exists():
                return path
            theirs, ours = self._chosen(python)
            wheels = [*theirs, *(repack(each, self.folder) for each in ours if fits(tags(each), python))]
            with atomic(path) as temporary, tarfile.open(temporary, "w", format=tarfile.GNU_FORMAT) as out:
                for wheel in sorted(wheels, key=lambda w: w.name):
                    entry = tarfile.TarInfo(wheel.name)
                    entry.size = wheel.stat().st_size
                    with open(wheel, "rb") as f:
                        out.addfile(entry, f)
        return path

    def lacking(self, python: Python) -> set[str]:
        """Packages that ``python`` needs and has no wheel of."""
        theirs, ours = self._chosen(python)
        out = {distribution.name for distribution in ours if not fits(tags(distribution), python)}
        known = {*map(name_of, theirs), *(name_of(distribution.name) for distribution in ours)}
        for requirement in metadata.requires("edgeres") or ():
            # what only an older Python needs is not installed with a newer one here
            found = re.fullmatch(r"([\w.-]+)[^;]*;\s*python_version\s*<\s*['\"](\d+)\.(\d+)['\"]", requirement)
            if found and python.version < (int(found[2]), int(found[3])) and name_of(found[1]) not in known:
                out.add(found[1])
        return out
