"""Fetch a published file once: resumable, checked before its name appears."""

from __future__ import annotations

import urllib.request
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError

import edgeres
from edgeres.errors import InputError
from edgeres.files import alone, sha256_file
from edgeres.progress import bar, say

ATTEMPTS = 3
OWN = "give a checkpoint of your own with --weights FILE, or see the flow without network: `edgeres demo`"


def download(url: str, path: Path, sha256: str, mib: float | None = None) -> None:
    """Fetch ``url`` to ``path``; the name appears only when size and hash are right.

    ``sha256`` may be the first digits only. ``mib`` is the published size in MiB, as precisely as it is given. What an
    interrupted download received stays in a file beside ``path`` and is continued by the next call. Of two processes
    the second waits for the first.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _failure(url, part, error) from error
    with alone(path.parent, f"downloads to {path.parent}"):
        if path.is_file():  # of that process
            return
        _fetch_all(url, part)
        size, found = part.stat().st_size, sha256_file(part)
        if not found.startswith(sha256) or (mib is not None and abs(size / 2**20 - mib) > 0.06):
            part.unlink()
            raise InputError(
                f"the download of {url} is not the published file",
                evidence=f"{size:,} bytes, SHA-256 {found[:12]}, expected {sha256[:12]}",
                hint=f"nothing was kept; try again, or {OWN}",
            )
        part.replace(path)


def _fetch_all(url: str, part: Path) -> None:
    """`_fetch` again where the connection breaks."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _fetch(url, part)
            return
        except (OSError, HTTPException) as error:  # URLError is an OSError
            if attempt == ATTEMPTS or isinstance(error, HTTPError) or not part.is_file():
                raise _failure(url, part, error) from error
            say(f"the connection broke ({error}); continuing")


def _failure(url: str, part: Path, error: Exception) -> InputError:
    reason = error if isinstance(error, HTTPError) else getattr(error, "reason", error)
    kept = f"{part.stat().st_size:,} bytes are kept and continued next time; " if part.is_file() else ""
    return InputError(f"cannot download {url}", evidence=str(reason), hint=kept + OWN)


def _fetch(url: str, part: Path) -> None:
    """Append to ``part`` what is missing of ``url``. Raises OSError if the connection ends early."""
    have = part.stat().st_size if part.is_file() else 0
    headers = {"User-Agent": f"edgeres/{edgeres.__version__}"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30)
    except HTTPError as error:
        error.close()  # it is the answer too, with an open connection
        if error.code != 416:
            raise
        return  # nothing is missing: the hash decides whether what is there is right
    with response:
        if response.status != 206:  # the server sends everything, whatever was asked for
            have = 0
        length = have + int(response.headers.get("Content-Length") or 0)
        with open(part, "ab" if have else "wb") as out, bar(f"download {part.stem}", length >> 20, "MiB") as step:
            for _ in range(have >> 20):
                step()
            while chunk := response.read(1 << 20):
                out.write(chunk)
                have += len(chunk)
                step()
    if have < length:
        raise ConnectionError(f"{have:,} of {length:,} bytes")
