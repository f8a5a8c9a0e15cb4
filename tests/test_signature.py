from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgeres import signature
from edgeres.errors import InputError, MissingDependency
from edgeres.signature import check, fingerprint, public_keys, require_key, sign

DATA = b"0123  a.txt\n"


def make_key(path: Path, kind: str = "ed25519", phrase: str = "") -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", phrase, "-C", "", "-f", path], check=True)
    return path


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_key(tmp_path_factory.mktemp("keys") / "id_ed25519")


@pytest.fixture(autouse=True)
def _no_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)


def string(*parts: bytes) -> bytes:
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def ssh_sign(key: Path, *options: str, namespace: str = "edgeres-bundle") -> bytes:
    """What ssh-keygen alone makes."""
    command = ["ssh-keygen", "-Y", "sign", "-n", namespace, *options, "-f", str(key)]
    return subprocess.run(command, input=DATA, capture_output=True, check=True).stdout


def taken_by_ssh_keygen(armor: bytes, folder: Path) -> bool:
    (folder / "s.sig").write_bytes(armor)
    command = ["ssh-keygen", "-Y", "check-novalidate", "-n", "edgeres-bundle", "-s", str(folder / "s.sig")]
    return subprocess.run(command, input=DATA, capture_output=True).returncode == 0


def blob(armor: bytes) -> bytes:
    return base64.b64decode(b"".join(armor.splitlines()[1:-1]))


def armored(data: bytes, width: int = 70) -> bytes:
    text = base64.b64encode(data).decode()
    lines = [text[i : i + width] for i in range(0, len(text), width)]
    return "\n".join(["-----BEGIN SSH SIGNATURE-----", *lines, "-----END SSH SIGNATURE-----", ""]).encode()


def test_a_signature_is_ssh_keygens_own_and_always_the_same(key: Path) -> None:
    armor = sign(DATA, key)
    assert armor == sign(DATA, key) == ssh_sign(key)
    assert check(armor, DATA, Path("x")) == public_keys(key.with_suffix(".pub"))[0]


def test_a_fingerprint_is_that_of_ssh_keygen(key: Path) -> None:
    shown = subprocess.run(["ssh-keygen", "-l", "-f", key], capture_output=True, text=True, check=True).stdout
    assert fingerprint(public_keys(key.with_suffix(".pub"))[0]) == shown.split()[1]


def test_a_signature_of_something_else_is_refused(key: Path) -> None:
    with pytest.raises(InputError, match=r"box\.bundle has a signature of something else") as error:
        check(sign(DATA, key), DATA + b"x", Path("box.bundle"))
    assert "incorrect signature" in error.value.evidence
    assert error.value.hint


@pytest.mark.parametrize("kind", ["rsa", "ecdsa"])
def test_other_keys_are_refused_when_signing_and_when_checking(tmp_path: Path, kind: str) -> None:
    other = make_key(tmp_path / kind, kind)
    with pytest.raises(InputError, match="signed with Ed25519 keys") as error:
        sign(DATA, other)
    assert kind in error.value.evidence
    assert "ssh-keygen -t ed25519" in error.value.hint
    armor = ssh_sign(other)
    assert taken_by_ssh_keygen(armor, tmp_path)
    with pytest.raises(InputError, match="signed with Ed25519 keys"):
        check(armor, DATA, Path("x"))


def test_a_signature_for_another_use_is_refused(key: Path) -> None:
    with pytest.raises(InputError, match="damaged signature"):
        check(ssh_sign(key, namespace="git"), DATA, Path("x"))


def test_forms_that_ssh_keygen_takes_for_the_same_signature_are_refused(key: Path, tmp_path: Path) -> None:
    armor = sign(DATA, key)
    data = blob(armor)
    again = int.from_bytes(data[-32:], "little") + signature.ORDER
    forms = {
        "version": armored(data[:6] + bytes(4) + data[10:]),
        "order": armored(data[:-32] + again.to_bytes(32, "little")),
        "width": armored(data, 64),
        "spaces": armor.replace(b"\nA", b"\n A").replace(b"\n", b"\n\n", 1),
        "end": armor + b"\n",
        "sha256": ssh_sign(key, "-O", "hashalg=sha256"),
    }
    for name, form in forms.items():
        assert form != armor, name
        assert taken_by_ssh_keygen(form, tmp_path), name
        with pytest.raises(InputError, match="damaged signature"):
            check(form, DATA, Path("x"))


def test_what_is_no_signature_is_refused_before_anything_runs(key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    armor = sign(DATA, key)
    data = blob(armor)
    monkeypatch.setenv("PATH", "")
    bad = [b"", b"\n" * 5, armor[:-1], armor[:100], armor.replace(b"\n", b"\r\n"), armored(b""), armored(data[:-1])]
    bad += [armored(data + b"\0"), armored(data[:10] + b"\xff\xff\xff\xff" + data[14:]), armored(data[:10])]
    bad += [armored(data[:10] + string(b"", b"", b"", b"", b"")), armored(b"SSHSIH" + data[6:])]
    for form in bad:
        with pytest.raises(InputError, match="damaged signature"):
            check(form, DATA, Path("x"))


def test_without_ssh_keygen_the_next_step_is_named(key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    armor = sign(DATA, key)
    monkeypatch.setenv("PATH", "")
    for work in (lambda: sign(DATA, key), lambda: check(armor, DATA, Path("x"))):
        with pytest.raises(MissingDependency, match="ssh-keygen, which is not here") as error:
            work()
        assert "apt install openssh-client" in error.value.hint


def test_a_key_that_is_not_there_is_named_with_what_ssh_keygen_says(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot sign with") as error:
        sign(DATA, tmp_path / "absent")
    assert "No such file" in error.value.evidence


def test_a_key_that_cannot_sign_is_refused_before(key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_key(key)
    rsa, locked = make_key(tmp_path / "rsa", "rsa"), make_key(tmp_path / "locked", phrase="open sesame")
    agent = f"ssh-add {locked}, then --sign {locked}.pub"
    monkeypatch.setattr(signature, "_terminal", lambda: False)  # where nobody can be asked
    monkeypatch.setenv("SSH_ASKPASS", "false")
    monkeypatch.setenv("SSH_ASKPASS_REQUIRE", "force")
    (tmp_path / "text").write_text("no key")
    for path, hint in (
        (tmp_path / "absent", "ssh-keygen -t ed25519"),
        (tmp_path / "text", "ssh-keygen -t ed25519"),
        (rsa, "ssh-keygen -t ed25519"),
        (locked, agent),
        (make_key(tmp_path / "moved").rename(tmp_path / "elsewhere").with_name("moved.pub"), f"ssh-add {tmp_path}/mov"),
    ):
        with pytest.raises(InputError) as error:
            require_key(path)
        assert hint in error.value.hint, path


def test_what_a_person_must_do_is_asked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Path] = []
    monkeypatch.setattr(signature, "_terminal", lambda: True)
    monkeypatch.setattr(signature, "sign", lambda data, key: tried.append(key))
    (tmp_path / "sk.pub").write_bytes(b"sk-ssh-ed25519@openssh.com AAAA\n")
    locked, other = (make_key(tmp_path / kind, kind, "open sesame") for kind in ("ed25519", "ecdsa"))
    for key in (locked, locked.with_suffix(".pub"), tmp_path / "sk.pub", other, make_key(tmp_path / "open")):
        require_key(key)
    assert tried == [other, tmp_path / "open"]  # the other may not sign, whatever is typed


def test_a_key_in_an_agent_signs_by_its_public_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = make_key(tmp_path / "mine")
    monkeypatch.setenv("SSH_AUTH_SOCK", "agent")  # short: the path of a socket has a limit
    with subprocess.Popen(["ssh-agent", "-D", "-a", "agent"], stdout=subprocess.DEVNULL) as agent:
        try:
            while not Path("agent").exists():
                assert agent.poll() is None
                time.sleep(0.01)
            subprocess.run(["ssh-add", "-q", mine], check=True, capture_output=True)
            mine.unlink()
            assert check(sign(DATA, mine.with_suffix(".pub")), DATA, Path("x"))
        finally:
            agent.terminate()
    with pytest.raises(InputError, match="cannot sign with"):
        sign(DATA, mine.with_suffix(".pub"))


TYPED = """
import os, signal, sys
signal.alarm(30)  # asked twice, it would wait for ever
os.close(os.open(os.ttyname(1), os.O_RDWR))  # the terminal becomes this process's own
from pathlib import Path
from edgeres import signature
sys.stdin = open(os.devnull)
signature.require_key(Path("locked"))
Path("armor").write_bytes(signature.sign(Path("data").read_bytes(), Path("locked")))
"""


def converse(answer: bytes, folder: Path) -> tuple[int, bytes]:
    """Sign on a terminal where ``answer`` is typed at the prompt; exit status and all that was shown."""
    ours, theirs = os.openpty()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", TYPED]
    child = subprocess.Popen(command, cwd=folder, start_new_session=True, env=environment, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 1024):
            shown += piece
            if answer and shown.rstrip().endswith(b":") and b"passphrase" in shown:
                os.write(ours, answer)
                answer = b""
    except OSError:  # Linux says so when the other end is closed
        pass
    os.close(ours)
    return child.wait(60), shown


@pytest.mark.skipif(sys.platform != "linux", reason="how a process gets a terminal differs")
def test_a_passphrase_is_asked_for_on_the_terminal(tmp_path: Path) -> None:
    locked = make_key(tmp_path / "locked", phrase="open sesame")
    (tmp_path / "data").write_bytes(DATA)
    status, shown = converse(b"open sesame\n", tmp_path)
    assert status == 0, shown
    assert shown.count(b"Enter passphrase") == 1
    assert check((tmp_path / "armor").read_bytes(), DATA, locked) == public_keys(locked.with_suffix(".pub"))[0]
    (tmp_path / "armor").unlink()
    status, shown = converse(b"wrong\n", tmp_path)
    assert status == 1
    assert b"incorrect passphrase" in shown  # by ssh-keygen itself
    assert not (tmp_path / "armor").exists()


# Ed25519 as RFC 8032, 5.1 defines it, for a security key that is not there
P = 2**255 - 19
D = -121665 * pow(121666, -1, P) % P
BASE = (15112221349535400772501151409588531511454012693041857206046113283949847762202, 4 * pow(5, -1, P) % P)


def add(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    t = D * a[0] * b[0] * a[1] * b[1]
    x = (a[0] * b[1] + b[0] * a[1]) * pow(1 + t, -1, P) % P
    return x, (a[1] * b[1] + a[0] * b[0]) * pow(1 - t, -1, P) % P


def times(n: int) -> bytes:
    total, power = (0, 1), BASE
    for bit in bin(n)[:1:-1]:
        total = add(total, power) if bit == "1" else total
        power = add(power, power)
    return (total[1] | (total[0] & 1) << 255).to_bytes(32, "little")


def ed25519(message: bytes) -> tuple[bytes, bytes]:
    """Public key and signature, of a private key that is fixed."""
    h = hashlib.sha512(b"\x01" * 32).digest()
    a = int.from_bytes(h[:32], "little") & ~(7 | 1 << 255) | 1 << 254
    public, order = times(a), signature.ORDER
    r = int.from_bytes(hashlib.sha512(h[32:] + message).digest(), "little") % order
    k = int.from_bytes(hashlib.sha512(times(r) + public + message).digest(), "little") % order
    return public, times(r) + ((r + k * a) % order).to_bytes(32, "little")


def test_a_security_key_may_sign_and_its_counter_is_part_of_it() -> None:
    kind, application, tail = b"sk-ssh-ed25519@openssh.com", b"ssh:", b"\x01\0\0\0\x07"
    signed = b"SSHSIG" + string(b"edgeres-bundle", b"", b"sha512", hashlib.sha512(DATA).digest())
    # PROTOCOL.u2f: what the key signs
    public, number = ed25519(hashlib.sha256(application).digest() + tail + hashlib.sha256(signed).digest())
    key = string(kind, public, application)
    head = b"SSHSIG\0\0\0\x01" + string(key, b"edgeres-bundle", b"", b"sha512")
    assert check(armored(head + string(string(kind, number) + tail)), DATA, Path("x")) == key
    with pytest.raises(InputError, match="something else"):
        check(armored(head + string(string(kind, number) + b"\x01\0\0\0\x08")), DATA, Path("x"))
    for wrong in (
        string(kind, number) + tail[1:],
        string(kind, number + b"\0") + tail,
        string(b"ssh-ed25519", number) + tail,
    ):
        with pytest.raises(InputError, match="damaged signature"):
            check(armored(head + string(wrong)), DATA, Path("x"))


def test_keys_are_read_from_one_public_key_or_several(key: Path, tmp_path: Path) -> None:
    other = make_key(tmp_path / "other")
    several = tmp_path / "several.pub"
    several.write_text(f"# ours\n{key.with_suffix('.pub').read_text()}\n{other.with_suffix('.pub').read_text()}")
    assert public_keys(several) == public_keys(key.with_suffix(".pub")) + public_keys(other.with_suffix(".pub"))
    assert len({fingerprint(k) for k in public_keys(several)}) == 2


def test_what_holds_no_public_keys_is_refused(key: Path, tmp_path: Path) -> None:
    public = key.with_suffix(".pub").read_text()
    kind, text = public.split()[:2]
    path = tmp_path / "keys"
    bad = ["", "# nobody\n", f"me@example.org {public}", f"{kind}\n", f"{kind} {text[:-4]}\n", f"ssh-rsa {text}\n"]
    bad.append(f"{kind} {base64.b64encode(base64.b64decode(text)[:-1]).decode()}\n")
    for content in [*bad, f"{kind} no!base64\n", f"{public}x y\n", key.read_text()]:
        path.write_text(content)
        with pytest.raises(InputError, match="is not a file of public keys") as error:
            public_keys(path)
        assert "give the .pub file" in error.value.hint
        assert text not in str(error.value)
    with pytest.raises(InputError, match="cannot read"):
        public_keys(tmp_path / "absent")


def test_nothing_is_left_in_the_temporary_folder(key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signature.tempfile, "tempdir", str(tmp_path / "t"))
    (tmp_path / "t").mkdir()
    check(sign(DATA, key), DATA, Path("x"))
    assert os.listdir(tmp_path / "t") == []
    shutil.rmtree(tmp_path / "t")
    with pytest.raises(FileNotFoundError):  # it was the one in use
        check(sign(DATA, key), DATA, Path("x"))
