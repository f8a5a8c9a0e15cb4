"""Sealed archives: files that travel as one, in which a changed byte is refused wherever it is.

An uncompressed POSIX ustar archive. Its members are SHA256SUMS (in sha256sum's text format, of every file in it),
SHA256SUMS.sig if it is signed (see `signature`), and then the files. `tar xf` unpacks it and `sha256sum -c SHA256SUMS`
checks it where edgeres is not installed. A header is made from name and size alone, so that the same files make the
same archive, and a reader makes each header again and compares.

Who can change an archive can take its signature away as well, or sign it anew: only ``signed_by`` tells that apart.
"""

from __future__ import annotations

import glob
import io
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import IO

from edgeres import signature
from edgeres.errors import EdgeresError, InputError
from edgeres.files import FULL, atomic, lock, sha256_file, temporary_name

SUMS, SIGNATURE = "SHA256SUMS", "SHA256SUMS.sig"
BLOCK = 512
PAGE = 4096
"""A file fills whole pages of most disks, and its folder may take another."""
PIECE = 1 << 20
"""Bytes of a member in memory at a time."""
LONGEST = 4 << 20
"""Bytes of SHA256SUMS and of its signature, which a reader holds in memory."""
# names that mean one file everywhere: no part is empty, ends in a dot (so not .. either), or is a device on Windows
_PART = r"(?!(?:con|prn|aux|nul|com\d|lpt\d)(?:\.|/|$))[a-z0-9._-]*[a-z0-9_-]"
_NAME = re.compile(rf"(?=.{{1,100}}$){_PART}(?:/{_PART})*", re.IGNORECASE | re.ASCII)
_LINE = re.compile(r"([0-9a-f]{64})  (.*)")


@dataclass(frozen=True)
class Member:
    """One file of an archive: where its ``size`` bytes begin, and their SHA-256 by SHA256SUMS."""

    name: str
    offset: int
    size: int
    sha256: str


def write(path: Path, members: Mapping[str, Path | bytes], sign_with: Path | None = None) -> str:
    """Write ``members`` (name -> file or bytes), in their order; returns the archive's digest, SHA-256 of SHA256SUMS.

    ``sign_with`` is an SSH key as `ssh-keygen -f` takes it: a private key, or a public one whose private one an agent
    has. ssh-keygen asks for a passphrase on the terminal.
    """
    if wrong := _wrong_names([SUMS, SIGNATURE, *members]):
        raise InputError(f"cannot write {path}", evidence=wrong, hint="give the member another name")
    digests = {n: sha256(s).hexdigest() if isinstance(s, bytes) else sha256_file(s) for n, s in members.items()}
    sizes = {n: len(s) if isinstance(s, bytes) else s.stat().st_size for n, s in members.items()}
    sums = "".join(f"{digests[name]}  {name}\n" for name in members).encode()
    if len(sums) > LONGEST:
        raise InputError(f"cannot write {path}", evidence=f"{len(members)} members are too many", hint="give fewer")
    first: dict[str, bytes] = {SUMS: sums} | ({SIGNATURE: signature.sign(sums, sign_with)} if sign_with else {})
    need = sum(size + 2 * BLOCK for size in sizes.values()) + len(sums) + 10 * BLOCK
    with _room(path.parent, need, "write a bundle", "-o"), atomic(path) as temporary, open(temporary, "wb") as out:
        for name, source in (first | dict(members)).items():
            size = len(source) if isinstance(source, bytes) else sizes[name]
            out.write(_header(name, size))
            if isinstance(source, bytes):
                out.write(source)
            else:
                with _open(source) as file:
                    if _copy(file, size, out) != digests[name]:
                        raise InputError(f"{source} changed while it was read", hint="write the archive again")
            out.write(bytes(-size % BLOCK))
        out.write(bytes(2 * BLOCK))
    return sha256(sums).hexdigest()


@dataclass(frozen=True)
class Sealed:
    """An archive whose structure, SHA256SUMS and signature are right; contents are checked when they are read.

    ``digest`` is the SHA-256 of SHA256SUMS, ``signer`` the fingerprint of the key that signed it, if one did.
    """

    path: Path
    digest: str
    members: dict[str, Member]
    signer: str | None
    sums: bytes = field(repr=False)
    signature: bytes | None = field(repr=False)

    @classmethod
    def open(cls, path: Path, signed_by: Path | None = None) -> Sealed:
        """Open ``path``; `InputError` unless every byte outside its members is as `write` would have it.

        A signature is always checked. With ``signed_by``, a file of public keys (a line each, as in a .pub file), there
        must be one, by one of these keys.
        """
        keys = signature.public_keys(signed_by) if signed_by else None
        with _open(path, "give the file that `edgeres bundle` wrote") as file:
            walk = _walk(file, path)
            sums = _small(file, path, next(walk))
            digests = _digests(sums, path)
            armor, members = None, dict[str, Member]()
            for name, offset, size in walk:
                if name == SIGNATURE and armor is None and not members:
                    armor = _small(file, path, (name, offset, size))
                elif name not in digests:
                    raise _refusal(path, f"{name} is not in {SUMS}")
                elif name in members:
                    raise _refusal(path, f"{name} is there twice")
                else:
                    members[name] = Member(name, offset, size, digests[name])
        if missing := digests.keys() - members.keys():
            raise _refusal(path, f"{min(missing)} is in {SUMS}, but not in the archive")
        if list(members) != list(digests):
            raise _refusal(path, f"its members are in another order than in {SUMS}")
        key = None if armor is None else signature.check(armor, sums, path)
        if keys is not None and key not in keys:
            found = "it is not signed" if key is None else f"it is signed by {signature.fingerprint(key)}"
            raise InputError(
                f"{path} is not signed by {signed_by}",
                evidence=f"{found}, asked for is {' or '.join(map(signature.fingerprint, keys))}",
                hint="ask whoever made the archive for a signed one, or for their public key",
            )
        signer = None if key is None else signature.fingerprint(key)
        return cls(path, sha256(sums).hexdigest(), members, signer, sums, armor)

    def read(self, name: str) -> bytes:
        """All bytes of one member; `InputError` unless they are those in SHA256SUMS."""
        if name not in self.members:
            raise InputError(f"{self.path} has no {name}", evidence=f"it has {', '.join(self.members)}")
        with _open(self.path) as file:
            self._copy(file, self.members[name], out := io.BytesIO())
        return out.getvalue()

    def unpack(self, folder: Path) -> None:
        """Write every member, SHA256SUMS and the signature into ``folder``, which appears whole or not at all.

        If it has them all already, unchanged, it is left as it is, and so is what else is in it; otherwise it is made
        anew, unless that would remove other files (`InputError`). `EdgeresError` if there is no room.
        """
        folder = folder.resolve()
        _clear(folder)
        if self._is_in(folder):
            return
        here = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()}
        others = sorted(here - {SUMS, SIGNATURE, *self.members})
        if others or (folder.exists() and not folder.is_dir()):
            raise InputError(
                f"{folder} is there, and is not {self.path} unpacked",
                evidence=f"it has {', '.join(others[:5])}" if others else "it is a file",
                hint="name another folder, or remove this one",
            )
        new = [parent for parent in folder.parents if not parent.exists()]
        temporary = temporary_name(folder)
        need = sum(member.size + 2 * PAGE for member in self.members.values())
        try:
            with _room(folder.parent, need, "unpack", "--work"):
                self._unpack(temporary)
            if folder.exists():
                shutil.rmtree(folder)
            try:
                temporary.rename(folder)
            except OSError:
                if not self._is_in(folder):  # another process may have been quicker
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            for parent in new:
                with suppress(OSError):  # unless all went well, it is empty
                    parent.rmdir()

    def _unpack(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        with _locked(folder, wait=True), _open(self.path) as file:
            for member in self.members.values():
                target = folder / member.name
                target.parent.mkdir(parents=True, exist_ok=True)
                with open(target, "wb") as out:
                    self._copy(file, member, out)
        (folder / SUMS).write_bytes(self.sums)
        if self.signature is not None:
            (folder / SIGNATURE).write_bytes(self.signature)

    def _is_in(self, folder: Path) -> bool:
        own = {name: member.sha256 for name, member in self.members.items()} | {SUMS: self.digest}
        if self.signature is not None:
            own[SIGNATURE] = sha256(self.signature).hexdigest()
        files = {name: folder / name for name in own}
        return all(p.is_file() and not p.is_symlink() for p in files.values()) and all(
            sha256_file(files[name]) == digest for name, digest in own.items()
        )

    def _copy(self, file: IO[bytes], member: Member, out: IO[bytes]) -> None:
        file.seek(member.offset)
        if (found := _copy(file, member.size, out)) != member.sha256:
            raise _refusal(self.path, f"{member.name} has SHA-256 {found}, in {SUMS} it is {member.sha256}")


def _refusal(path: Path, evidence: str, cause: str = "is not as it was made") -> InputError:
    return InputError(
        f"{path} {cause}", evidence=evidence, hint="get it again from where it was made, and do not use it"
    )


def _open(path: Path, hint: str = "") -> IO[bytes]:
    try:
        return open(path, "rb")
    except OSError as error:
        raise InputError(f"cannot read {path}", evidence=error.strerror or str(error), hint=hint) from error


def _copy(source: IO[bytes], size: int, out: IO[bytes]) -> str:
    """Copy ``size`` bytes, or as many as there are; returns their SHA-256."""
    digest = sha256()
    while size and (piece := source.read(min(PIECE, size))):
        digest.update(piece)
        out.write(piece)
        size -= len(piece)
    return digest.hexdigest()


def _clear(folder: Path) -> None:
    """Remove what an unpacking into ``folder`` left that was killed: nobody holds it, and nothing in it is new."""
    for old in folder.parent.glob(f".{glob.escape(folder.name)}.*.tmp"):
        with suppress(OSError), _locked(old, wait=False) as alone:  # who holds it is at work, or clears it, too
            if max(p.lstat().st_mtime for p in (old, *old.rglob("*"))) < time.time() - (60 if alone else 3600):
                shutil.rmtree(old)


@contextmanager
def _locked(folder: Path, wait: bool) -> Iterator[bool]:
    """Hold ``folder`` in the block; False where there are no locks. Without ``wait`` `OSError` if another holds it."""
    if os.name != "posix":
        yield False
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield lock(handle, wait)
    finally:
        os.close(handle)


@contextmanager
def _room(folder: Path, need: int, to: str, option: str) -> Iterator[None]:
    """`EdgeresError` unless ``folder``, which ``option`` names, has ``need`` bytes of room, or if it runs out of it."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        evidence = f"{there} is a file" if not there.is_dir() else f"{there} cannot be written"
        raise EdgeresError(f"cannot {to} in {folder}", evidence=evidence, hint=f"name another folder with {option}")
    cause, hint = f"no room to {to} in {folder}", f"make room there, or name another disk with {option}"
    if (free := shutil.disk_usage(there).free) < need:
        raise EdgeresError(cause, evidence=f"it takes {need:,} bytes, {free:,} are free", hint=hint)
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise EdgeresError(cause, evidence=f"it takes {need:,} bytes: {error.strerror}", hint=hint) from error


def _wrong_names(names: Iterable[str]) -> str:
    """What is wrong with the first name that a file of an archive cannot have; empty if nothing is."""
    files, folders = set[str](), set[str]()
    for name in names:
        if not _NAME.fullmatch(name):
            return f"{name!r} is not a plain relative path of letters, digits and ._- (100 at most)"
        low = name.lower()
        parts = low.split("/")
        above = {"/".join(parts[:i]) for i in range(1, len(parts))}
        if low in files or low in folders or not files.isdisjoint(above):
            return f"{name} is another member, or a folder of one, to systems that ignore case"
        files.add(low)
        folders |= above
    return ""


def _header(name: str, size: int) -> bytes:
    """One ustar header (POSIX.1-1988); a size of 8 GiB or more is in base 256, as GNU tar writes it."""
    digits = b"%011o\0" % size if size < 8 << 30 else (0x80 << 88 | size).to_bytes(12, "big")
    before = name.encode().ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + digits + b"%011o\0" % 0
    after = b"0" + bytes(100) + b"ustar\0" + b"00" + bytes(247)
    return before + b"%06o\0 " % (sum(before) + sum(after) + 8 * ord(" ")) + after


def _walk(file: IO[bytes], path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of every member, SHA256SUMS first; `InputError` at a byte that `write` would not write."""
    end = file.seek(0, os.SEEK_END)
    at = file.seek(0)
    while (head := file.read(BLOCK)) != bytes(BLOCK) or at == 0:
        if at == 0 and (head[257:263] != b"ustar\0" or head[:100] != SUMS.encode().ljust(100, b"\0")):
            raise _refusal(path, f"it does not begin with {SUMS}", "is not a bundle")
        if len(head) < BLOCK:
            raise _refusal(path, f"no end after {end:,} bytes", "was cut short")
        name, digits = head[:100].rstrip(b"\0").decode("latin-1"), head[124:136]
        if head[156:157] != b"0":
            raise _refusal(path, f"{name!r} is a link, a folder or a device (type {head[156:157]!r}), not a file")
        if wrong := _wrong_names([name]):
            raise _refusal(path, wrong)
        octal = int(digits[:11], 8) if re.fullmatch(rb"[0-7]{11}\0", digits) else 0
        size = int.from_bytes(digits[1:], "big") if digits[0] == 0x80 else octal
        if head != _header(name, size):
            raise _refusal(path, f"the header of {name} is not made from its name and size alone")
        if at + BLOCK + size + -size % BLOCK > end:
            raise _refusal(path, f"{name} does not end within its {end:,} bytes", "was cut short")
        yield name, at + BLOCK, size
        file.seek(at + BLOCK + size)
        if file.read(-size % BLOCK).strip(b"\0"):
            raise _refusal(path, f"there is something after the end of {name}")
        at = file.tell()
    rest = file.read(BLOCK + 1)
    if len(rest) < BLOCK:
        raise _refusal(path, f"no end after {end:,} bytes", "was cut short")
    if rest != bytes(BLOCK):
        raise _refusal(path, f"its members end after {at:,} of {end:,} bytes", "has bytes after its end")


def _small(file: IO[bytes], path: Path, member: tuple[str, int, int]) -> bytes:
    name, offset, size = member
    if size > LONGEST:
        raise _refusal(path, f"{name} has {size:,} bytes")
    file.seek(offset)
    return file.read(size)


def _digests(sums: bytes, path: Path) -> dict[str, str]:
    """SHA256SUMS -> name: SHA-256."""
    lines = [_LINE.fullmatch(line) for line in sums.decode("latin-1").split("\n")[:-1]]
    found = [(line[2], line[1]) for line in lines if line]
    if "".join(f"{digest}  {name}\n" for name, digest in found).encode("latin-1") != sums:
        raise _refusal(path, f"{SUMS} has other lines than `sha256sum` writes")
    if wrong := _wrong_names([SUMS, SIGNATURE, *(name for name, _ in found)]):
        raise _refusal(path, f"{SUMS}: {wrong}")
    return dict(found)
