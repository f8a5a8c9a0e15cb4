"""Signatures of archives: OpenSSH's own (PROTOCOL.sshsig), made and checked by ssh-keygen.

Users sign with the SSH keys that they have, in an agent or on a security key too, and a device needs no package to
check them. Keys are Ed25519: their signatures of the same bytes are the same, save that a security key counts its uses.
"""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import tempfile
from hashlib import sha256
from pathlib import Path

from edgeres.errors import InputError, MissingDependency

NAMESPACE = "edgeres-bundle"
"""What is signed, so that a signature of something else, a git commit for one, is not taken for one of an archive."""
KINDS = {b"ssh-ed25519": 0, b"sk-ssh-ed25519@openssh.com": 5}
"""Keys that may sign, and the bytes after the signature proper: a security key adds flags and a counter."""
ORDER = 2**252 + 27742317777372353535851937790883648493
"""Of Ed25519's group (RFC 8032, 5.1)."""
PREFIX = b"SSHSIG" + (1).to_bytes(4, "big")
MAKE_A_KEY = "give an Ed25519 key; ssh-keygen -t ed25519 makes one"
PRIVATE = b"openssh-key-v1\0"
"""How a private key begins (OpenSSH, PROTOCOL.key); its cipher follows, and the public key in clear."""
GET_AGAIN = "get it again from where it was made, and do not use it"


def sign(data: bytes, key: Path) -> bytes:
    """Signature of ``data``, armored. ``key`` is a private key, or a public one whose private one an agent has.

    ssh-keygen asks for a passphrase on the terminal itself.
    """
    done = _ssh_keygen("sign", "-f", str(key), stdin=data)
    if done.returncode:
        said = (done.stderr or b"ssh-keygen said why").decode(errors="replace").strip()
        private, agent = _private(key), _locked(key) or _content(key).startswith(tuple(KINDS))
        hint = f"ssh-add {private}, then --sign {private}.pub" if agent else MAKE_A_KEY
        raise InputError(f"cannot sign with {key}", evidence=said, hint=hint)
    armor = _armor(_blob(done.stdout))  # in one form, whichever OpenSSH made it
    check(armor, data, key)
    return armor


def require_key(key: Path) -> None:
    """Raise what would keep `sign` from signing with ``key``, to look before work, not after it.

    Where a person must type a passphrase or touch a security key, that is not tried: once is enough, when it signs.
    """
    content = _content(key)
    person = _locked(key) or b"sk-ssh-ed25519" in content
    if not (person and any(kind in content for kind in KINDS) and _terminal()):
        sign(b"", key)


def _content(key: Path) -> bytes:
    """What is in the file of a key, a private one decoded; empty if it cannot be read."""
    try:
        content = key.read_bytes()
        return _blob(content) if content.startswith(b"-----") else content
    except (OSError, ValueError):
        return b""


def _private(key: Path) -> Path:
    """The private key of ``key``, as ssh-keygen looks for it."""
    return key.with_suffix("") if key.suffix == ".pub" else key


def _locked(key: Path) -> bool:
    """Whether the private key is there, under a passphrase."""
    content = _content(_private(key))
    return content.startswith(PRIVATE) and not content.startswith(PRIVATE + b"\0\0\0\x04none")


def _terminal() -> bool:
    """Whether there is one, where ssh-keygen can ask."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR))
    except OSError:
        return False
    return True


def check(armor: bytes, data: bytes, path: Path) -> bytes:
    """The public key (SSH wire format) whose signature of ``data`` this is; `InputError` about ``path`` if it is none.

    ssh-keygen lets some changes pass: white space, a lower version number, and the same signature plus the order of the
    group. So whatever it does not compute with is compared here.
    """
    try:
        blob = _blob(armor)
        key, namespace, reserved, digest, signature = _strings(blob[len(PREFIX) :])
        kind = _strings(key)[0]
        if kind not in KINDS:
            cause = f"{path}: archives are signed with Ed25519 keys"
            raise InputError(cause, evidence=f"this one is {kind.decode(errors='replace')}", hint=MAKE_A_KEY)
        again, number = _strings(signature[: len(signature) - KINDS[kind]])
        if (
            armor != _armor(blob)
            or not blob.startswith(PREFIX)
            or (namespace, reserved, digest) != (NAMESPACE.encode(), b"", b"sha512")
            or (again, len(number)) != (kind, 64)
            or int.from_bytes(number[32:], "little") >= ORDER
        ):
            raise ValueError(f"it is not as `ssh-keygen -Y sign -n {NAMESPACE}` writes it")
    except (ValueError, IndexError) as error:
        raise InputError(f"{path} has a damaged signature", evidence=str(error), hint=GET_AGAIN) from error
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "signature"
        file.write_bytes(armor)
        done = _ssh_keygen("check-novalidate", "-s", str(file), stdin=data)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        raise InputError(f"{path} has a signature of something else", evidence=said, hint=GET_AGAIN)
    return key


def fingerprint(key: bytes) -> str:
    """As `ssh-keygen -l` shows it."""
    return "SHA256:" + base64.b64encode(sha256(key).digest()).decode().rstrip("=")


def public_keys(path: Path) -> list[bytes]:
    """The keys (SSH wire format) of a .pub file, or of several in one."""
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line.strip() and not line.startswith(b"#")]
    except OSError as error:
        raise InputError(f"cannot read {path}", evidence=error.strerror or str(error)) from error
    try:
        keys = [base64.b64decode(line[1], validate=True) for line in lines]
        if not keys or any(_strings(key)[0] != line[0] for key, line in zip(keys, lines, strict=True)):
            raise ValueError("no line begins with a type of key and that key")
    except (ValueError, IndexError) as error:
        if isinstance(error, IndexError):
            error = ValueError("a line has fewer than two words")
        hint = "give the .pub file of the signer; in an allowed_signers file, leave out the names before each key"
        raise InputError(f"{path} is not a file of public keys", evidence=str(error), hint=hint) from error
    return keys


def _ssh_keygen(verb: str, *arguments: str, stdin: bytes) -> subprocess.CompletedProcess[bytes]:
    # that a security key waits to be touched must be seen at once; where nobody looks, what it says is evidence
    stderr = None if verb == "sign" and sys.stderr.isatty() else subprocess.PIPE
    command = ["ssh-keygen", "-q", "-Y", verb, "-n", NAMESPACE, *arguments]
    try:
        return subprocess.run(command, input=stdin, stdout=subprocess.PIPE, stderr=stderr, check=False)
    except FileNotFoundError as error:
        raise MissingDependency(
            "signatures of archives are made and checked by ssh-keygen, which is not here",
            evidence=str(error),
            hint="install OpenSSH 8.2 or newer: apt install openssh-client",
        ) from error


def _blob(armor: bytes) -> bytes:
    return base64.b64decode(b"".join(armor.splitlines()[1:-1]))


def _armor(blob: bytes) -> bytes:
    text = base64.b64encode(blob)
    lines = [text[i : i + 70] for i in range(0, len(text), 70)]
    return b"\n".join([b"-----BEGIN SSH SIGNATURE-----", *lines, b"-----END SSH SIGNATURE-----", b""])


def _strings(data: bytes) -> list[bytes]:
    """The strings (RFC 4251, 5) that ``data`` consists of."""
    found = []
    while data:
        end = 4 + int.from_bytes(data[:4], "big")
        if end > len(data):
            raise ValueError("a length in it goes beyond its end")
        found.append(data[4:end])
        data = data[end:]
    return found
