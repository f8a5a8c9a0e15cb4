"""Deploys to real sshds on this machine: nothing of ssh is replaced, only what the devices have in their PATH."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result
from records import record, save
from rich.console import Console
from rows import flips
from sshd import SSHD, Device, new_key, wait

import edgeres
from edgeres import deploy, deploy_table, ssh
from edgeres.cli import cli
from edgeres.errors import EdgeresError, InputError

HERE = Path(__file__).parents[1]
READY = HERE / ".venv-device"
PYTHON = READY / "bin" / "python"
Deploy = Callable[..., Result]

needs_sshd = pytest.mark.skipif(SSHD is None, reason="needs sshd (sudo apt install openssh-server)")
needs_device = pytest.mark.skipif(not PYTHON.exists(), reason="needs .venv-device (make test)")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Device]]]:
    """The folder of the user's ssh configuration, and two devices."""
    folder = tmp_path_factory.mktemp("lab")
    key = new_key(folder / "key")
    with contextlib.ExitStack() as stack:
        devices = {}
        for name in ("one", "two"):
            devices[name] = Device(folder / name, name, key)
            stack.callback(devices[name].stop)
        yield folder, devices


@pytest.fixture
def devices(lab: tuple[Path, dict[str, Device]]) -> dict[str, Device]:
    """Both devices, clean."""
    for device in lab[1].values():
        device.reset()
    return lab[1]


@pytest.fixture
def config(lab: tuple[Path, dict[str, Device]], devices: dict[str, Device]) -> Path:
    """A configuration of ssh that knows both devices, and one that does not answer."""
    known = lab[0] / "known_hosts"
    known.write_text("".join(device.known for device in devices.values()), encoding="utf-8")
    path = lab[0] / "config"
    hosts = [device.config(lab[0] / "key", known) for device in devices.values()]
    path.write_text("".join([*hosts, "Host dead\n HostName 127.0.0.1\n Port 9\n"]), encoding="utf-8")
    return path


@pytest.fixture
def edgeres_deploy(config: Path) -> Deploy:
    """The command, with the lab's configuration and the environment that devices have."""

    def run(*arguments: object, python: object = READY) -> Result:
        ways = ["--ssh-config", config, "--seconds", 0.01, *(["--python", python] if python else [])]
        return CliRunner().invoke(cli, ["deploy", *map(str, (*arguments, *ways))])

    return run


def make_bundle(folder: Path, *flags: object) -> Path:
    result = CliRunner().invoke(cli, ["bundle", *map(str, flags), "-o", str(folder / "tiny.bundle")])
    assert result.exit_code == 0, result.output
    return folder / "tiny.bundle"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path, train_folder: Path, val_folder: Path) -> Path:
    """A bundle whose budget is met."""
    folder = tmp_path_factory.mktemp("bundle")
    images = f'[calibration]\nimages = "{train_folder}"\n[validation]\nimages = "{val_folder}"\n'
    (folder / "edgeres.toml").write_text(images, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("EDGERES_CACHE", str(folder / "cache"))
        return make_bundle(folder, "--model", tiny_path, "--precision", "int8", "--target", "cpu", "--max-drop", 50)


def slow(device: Device) -> Path:
    """An interpreter on the device whose self-test begins and does not end by itself."""
    return device.tool(
        "slow", f'if [ "$1" = -m ]; then touch "{device.tools}/begun"; sleep 100; fi; exec "{PYTHON}" "$@"'
    )


def begun(device: Device) -> bool:
    return (device.tools / "begun").exists()


def running(device: Device) -> list[str]:
    """Command lines of what a deploy started on the device."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes()
            if str(device.tools).encode() in line and b"edgeres-deploy" not in line and b"sshd" not in line[:40]:
                found.append(line.replace(b"\0", b" ").decode())
    return found


def only(result: Result) -> dict[str, Any]:
    (record,) = json.loads(result.stdout)
    return dict(record)


@needs_sshd
@needs_device
def test_two_devices_are_tested_and_left_as_they_were(
    edgeres_deploy: Deploy, bundle: Path, devices: dict[str, Device], tmp_path: Path
) -> None:
    done = edgeres_deploy("one", "two", bundle, "--json")
    assert done.exit_code == 0, done.output
    records = json.loads(done.stdout)
    assert [(r["host"], r["verdict"], r["met"], r["error"], r["notes"]) for r in records] == [
        ("one", "PASS", True, None, []),
        ("two", "PASS", True, None, []),
    ]
    for name in ("one", "two"):
        folder = tmp_path / "engines" / "out" / "deploy" / name
        assert sorted(p.name for p in folder.iterdir()) == ["outcomes.npz", "result.json"]
        result = json.loads((folder / "result.json").read_text())
        assert (result["images"], result["provenance"]["host"]) == (24, name)
        assert f"{name}: connected: Linux" in done.stderr
        assert devices[name].left == []
    assert "one: built" in done.stderr
    assert list(tmp_path.rglob("*.tmp")) == []


@needs_sshd
@needs_device
def test_a_host_that_is_dead_does_not_spoil_the_others(
    edgeres_deploy: Deploy, bundle: Path, devices: dict[str, Device], tmp_path: Path
) -> None:
    (tmp_path / "hosts").write_text("dead  # in the cellar\n\none\n", encoding="utf-8")
    done = edgeres_deploy(bundle, "--hosts", "hosts", "-o", "home")
    assert done.exit_code == 1
    assert (tmp_path / "home" / "one" / "result.json").exists()
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[1][0] == "dead"
    assert lines[1][2] == "failed"
    assert lines[2][0] == "one"
    assert "PASS" in lines[2]
    assert "dead: it cannot be reached" in done.stdout
    assert "Connection refused" in done.stdout


@needs_sshd
@needs_device
def test_a_cut_connection_ends_the_self_test_and_the_device_cleans_up_by_itself(
    edgeres_deploy: Deploy, bundle: Path, devices: dict[str, Device], tmp_path: Path
) -> None:
    one = devices["one"]
    path = slow(one)
    devices["two"].tool(path.name, f'exec "{PYTHON}" "$@"')

    def cut() -> None:
        wait(lambda: begun(one) and running(one), "the self-test did not begin")
        one.cut()

    thread = threading.Thread(target=cut)
    thread.start()
    done = edgeres_deploy("one", "two", bundle, "--json", python=path.name)
    thread.join()
    assert done.exit_code == 1
    one_, two = json.loads(done.stdout)
    assert one_["error"]["cause"] == "the connection was cut during selftest"
    assert "cleans up by itself" in one_["error"]["next"]
    assert two["verdict"] == "PASS"
    wait(lambda: one.left == [] and not running(one), "the device did not clean up")


@pytest.mark.slow
@needs_sshd
@needs_device
def test_a_connection_that_is_silent_for_too_long_counts_as_cut(
    edgeres_deploy: Deploy, bundle: Path, devices: dict[str, Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh, "SILENCE", 2)
    monkeypatch.setattr(ssh, "BEAT", 600)
    done = edgeres_deploy("one", bundle, "--json", python=slow(devices["one"]))
    assert "cut during selftest" in only(done)["error"]["cause"]
    assert devices["one"].left == []


@needs_sshd
@needs_device
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "killed"])
def test_when_edgeres_is_stopped_the_device_cleans_up(
    config: Path, bundle: Path, devices: dict[str, Device], sent: signal.Signals
) -> None:
    one = devices["one"]
    command = [sys.executable, "-m", "edgeres", "deploy", "one", str(bundle)]
    command += ["--ssh-config", str(config), "--python", str(slow(one))]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as process:
        wait(lambda: begun(one) and running(one), "the self-test did not begin")
        os.kill(process.pid, sent)
        out, err = process.communicate(timeout=60)
    if sent is signal.SIGINT:
        assert process.returncode == 1
        assert "stopping: waiting for the devices" in err
        assert "one: interrupted\n" in out
        assert one.left == []
    wait(lambda: one.left == [] and not running(one), "the device did not clean up")


@needs_sshd
@needs_device
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "killed"])
def test_a_python_that_hangs_is_ended_with_edgeres_and_what_the_others_did_is_shown(
    config: Path, bundle: Path, devices: dict[str, Device], tmp_path: Path, sent: signal.Signals
) -> None:
    one, two = devices["one"], devices["two"]
    one.tool("python", "sleep 1000")
    two.tool("python", f'exec "{PYTHON}" "$@"')
    command = [sys.executable, "-m", "edgeres", "deploy", "one", "two", str(bundle), "--json", "-o", "home"]
    command += ["--ssh-config", str(config), "--python", "python", "--seconds", "0.01"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, start_new_session=True) as process:
        wait(lambda: Path("home/two/result.json").exists() and running(one), "two has no result")
        os.kill(process.pid, sent)
        out, _ = process.communicate(timeout=60)
    if sent is signal.SIGINT:
        assert process.returncode == 1
        first, second = json.loads(out)
        assert (first["error"]["cause"], first["notes"]) == ("interrupted", [])
        assert (second["verdict"], second["error"]) == ("PASS", None)
        assert one.left == []
    wait(lambda: one.left == [] and not running(one), "the device did not clean up")


@needs_sshd
def test_a_python_that_hangs_is_given_up(
    edgeres_deploy: Deploy, bundle: Path, devices: dict[str, Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh, "LOOK", 1)
    python = devices["one"].tool("python", "sleep 1000")
    error = only(edgeres_deploy("one", bundle, "--json", python=python))["error"]
    assert error["cause"] == f"{python} hangs on the device"
    assert error["evidence"] == "no answer for 1 seconds"
    assert "name another interpreter with --python" in error["next"]
    assert devices["one"].left == []
    assert not running(devices["one"])


@needs_sshd
@needs_device
def test_a_self_test_without_a_word_is_told_and_ended_unless_it_computes(
    edgeres_deploy: Deploy, bundle: Path, devices: dict[str, Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh, "HUSH", 1)
    idle = slow(devices["one"])
    # it computes in a child, without a word, until it has been looked at three times
    busy = "timeout 6 sh -c 'while :; do :; done'"
    devices["two"].tool(idle.name, f'if [ "$1" = -m ]; then {busy}; fi; exec "{PYTHON}" "$@"')
    done = edgeres_deploy("one", "two", bundle, "--json", python=idle.name)
    one, two = json.loads(done.stdout)
    assert one["error"]["cause"] == "selftest hangs on the device"
    assert re.match(r"not a word from selftest for \S+ minutes, and hardly any computing", one["error"]["evidence"])
    assert one["notes"] == []
    assert devices["one"].left == []
    assert two["verdict"] == "PASS"
    assert done.stderr.count("two: not a word from selftest for ") >= 2


@needs_sshd
def test_an_account_that_runs_nothing_is_not_called_out_of_reach(
    edgeres_deploy: Deploy, bundle: Path, devices: dict[str, Device]
) -> None:
    devices["one"].tool("sh", 'echo "This account is currently not available." >&2; exit 1')
    error = only(edgeres_deploy("one", bundle, "--json"))["error"]
    assert error["cause"] == "it lets you in and runs nothing: its shell ended with status 1"
    assert error["evidence"].endswith("This account is currently not available.")
    assert error["next"].endswith("one true` works")


@needs_sshd
def test_a_device_of_another_key_is_not_talked_to(
    edgeres_deploy: Deploy, bundle: Path, devices: dict[str, Device], config: Path
) -> None:
    known = config.with_name("known_hosts")
    text = known.read_text(encoding="utf-8")
    known.write_text(text.replace(devices["one"].known.split()[2], devices["two"].known.split()[2]), encoding="utf-8")
    changed = only(edgeres_deploy("one", bundle, "--json"))
    assert changed["error"]["cause"] == "its host key is not the one that is known here"
    assert "ssh-keygen -R one" in changed["error"]["next"]
    known.write_text("", encoding="utf-8")
    unknown = only(edgeres_deploy("one", bundle, "--json"))
    assert unknown["error"]["cause"] == "its host key is not known here"
    assert devices["one"].left == []


@needs_sshd
def test_a_key_that_the_device_does_not_know_is_said(edgeres_deploy: Deploy, bundle: Path, config: Path) -> None:
    other = new_key(config.with_name("other"))
    config.write_text(config.read_text(encoding="utf-8").replace("/key\n", f"/{other.name}\n"), encoding="utf-8")
    refused = only(edgeres_deploy("one", bundle, "--json"))
    assert refused["error"]["cause"] == "it lets you in with none of your keys"
    assert "ssh-copy-id one" in refused["error"]["next"]


@needs_sshd
def test_options_of_the_user_reach_ssh(edgeres_deploy: Deploy, bundle: Path) -> None:
    error = only(edgeres_deploy("one", bundle, "--json", "--ssh-option", "Port=9"))["error"]
    assert "port 9: Connection refused" in error["evidence"]


@needs_sshd
@needs_device
def test_a_passphrase_is_asked_for_once(bundle: Path, devices: dict[str, Device], config: Path) -> None:
    """On a terminal of its own, as ssh asks there and nowhere else."""
    locked = config.with_name("locked")
    shutil.copy(config.with_name("key"), locked)
    subprocess.run(["ssh-keygen", "-q", "-p", "-P", "", "-N", "a secret", "-f", str(locked)], check=True)
    text = config.read_text(encoding="utf-8").replace("/key\n", "/locked\n")
    config.write_text(text, encoding="utf-8")
    ours, theirs = os.openpty()
    command = ["setsid", "--ctty", "--wait", sys.executable, "-m", "edgeres", "deploy", "one", str(bundle)]
    command += ["--ssh-config", str(config), "--python", str(READY), "--seconds", "0.01"]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        told = b""
        with contextlib.suppress(OSError):  # Linux: the other end was closed
            while data := os.read(ours, 1000):
                told += data
                if data.endswith(b"': "):
                    os.write(ours, b"a secret\n")
    os.close(ours)
    assert process.returncode == 0, told.decode()
    assert told.count(b"Enter passphrase") == 1
    assert devices["one"].left == []


@needs_sshd
@needs_device
def test_what_arrives_is_compared_with_what_was_sent(
    edgeres_deploy: Deploy, bundle: Path, devices: dict[str, Device]
) -> None:
    devices["one"].tool("cat", "/bin/cat | tr e f")
    changed = only(edgeres_deploy("one", bundle, "--json"))
    assert changed["error"]["cause"] == "what arrived on the device is not what was sent"
    devices["one"].tool("cat", "head -c 1000")
    short = only(edgeres_deploy("one", bundle, "--json"))
    assert short["error"]["cause"] == "the copy was cut short"
    assert devices["one"].left == []


@needs_sshd
@needs_device
def test_what_the_device_says_of_a_damaged_bundle_is_passed_on(
    edgeres_deploy: Deploy, bundle: Path, devices: dict[str, Device], tmp_path: Path
) -> None:
    data = bytearray(bundle.read_bytes())
    data[-5000] ^= 1
    (tmp_path / "damaged.bundle").write_bytes(data)
    error = only(edgeres_deploy("one", "damaged.bundle", "--json"))["error"]
    assert "bundle-" in error["cause"]
    assert error["next"]
    assert devices["one"].left == []
    assert not (tmp_path / "engines" / "out" / "deploy" / "one").exists()


@needs_sshd
@needs_device
def test_a_budget_that_is_not_met_is_no_failure_and_no_success(
    edgeres_deploy: Deploy,
    bundle: Path,
    devices: dict[str, Device],
    tmp_path: Path,
    tiny_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.chdir(bundle.parent)
        flags = ("--model", tiny_path, "--precision", "int8", "--target", "cpu", "--max-drop", 0)
        strict = make_bundle(tmp_path, *flags)
    seen = devices["one"].home / "env" / "seen"
    note = f'[ "$1" != -m ] || echo "$XDG_CACHE_HOME $PYTHONDONTWRITEBYTECODE" > "{seen}"'
    python = devices["one"].tool("python", f'{note}; exec "{PYTHON}" "$@"')
    (devices["one"].home / "env" / "bin").mkdir(parents=True)
    python.rename(devices["one"].home / "env" / "bin" / "python")
    done = edgeres_deploy("one", strict, "--json", python="~/env")
    assert done.exit_code == 1
    record = only(done)
    assert (record["verdict"], record["met"], record["error"]) == ("NOT ENOUGH IMAGES", False, None)
    assert json.loads(Path(record["result"]).read_text())["verdict"] == "NOT ENOUGH IMAGES"
    # libraries keep no cache, onnxruntime reports nothing, and an environment that is theirs gets no files
    assert re.fullmatch(f"{re.escape(str(devices['one'].cache))}/deploy-\\w+/tmp 1\n", seen.read_text())


@needs_sshd
@needs_device
def test_what_comes_home_must_belong_together_and_takes_nothing_else_away(
    edgeres_deploy: Deploy, bundle: Path, devices: dict[str, Device], tmp_path: Path
) -> None:
    folder = tmp_path / "home" / "one"
    folder.mkdir(parents=True)
    (folder / "notes").write_text("mine")
    devices["one"].tool("tar", 'echo more >> "$4/outcomes.npz"; exec /bin/tar "$@"')
    error = only(edgeres_deploy("one", bundle, "--json", "-o", "home"))["error"]
    assert error["cause"] == "the outcomes that came from the device are not those of the result"
    assert [p.name for p in folder.iterdir()] == ["notes"]
    devices["one"].tool("tar", "exit 1")
    assert only(edgeres_deploy("one", bundle, "--json", "-o", "home"))["error"]["cause"].startswith("fetch ended")
    devices["one"].reset()
    assert edgeres_deploy("one", bundle, "-o", "home").exit_code == 0
    assert sorted(p.name for p in folder.iterdir()) == ["notes", "outcomes.npz", "result.json"]


def test_what_a_killed_deploy_left_here_is_in_nobodys_way(tmp_path: Path) -> None:
    home, rows = tmp_path / "home", flips(10, 1, 0)
    (home / f".{os.getpid()}.tmp").mkdir(parents=True)  # in a container the next one has the same number
    r = record()
    r["provenance"]["digests"]["outcomes"] = rows.save(tmp_path / "outcomes.npz")
    save(tmp_path, r)

    def step(name: str, stdout: Any) -> None:
        stdout.write(b"edgeres data=tar\n")
        with tarfile.open(fileobj=stdout, mode="w|") as tar:
            for file in deploy.FILES:
                tar.add(tmp_path / file, file)

    device: Any = SimpleNamespace(host="one", step=step)
    assert deploy._bring_home(device, home, None)["provenance"]["host"] == "one"
    assert {path.name for path in home.iterdir()} == {*deploy.FILES, f".{os.getpid()}.tmp"}


@needs_sshd
@needs_device
def test_a_bug_that_one_device_meets_costs_no_other_its_results(
    edgeres_deploy: Deploy, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(device: ssh.Device, folder: Path, failed: EdgeresError | None) -> dict[str, Any]:
        if device.host == "one":
            raise ZeroDivisionError("one by none")
        return real(device, folder, failed)

    real = deploy._bring_home
    monkeypatch.setattr(deploy, "_bring_home", bug)
    done = edgeres_deploy("one", "two", bundle)
    assert done.exit_code == 1
    lines = [line.split() for line in done.stdout.splitlines()]
    assert (lines[1][0], lines[2][0]) == ("one", "two")
    assert "failed" in lines[1]
    assert "PASS" in lines[2]
    assert "one: ZeroDivisionError, a bug in edgeres" in done.stdout
    assert "Traceback" in done.stdout
    assert "ZeroDivisionError: one by none" in done.stdout


@needs_sshd
@needs_device
def test_a_device_fills_neither_disk_nor_memory_here(
    edgeres_deploy: Deploy, bundle: Path, devices: dict[str, Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh, "SENT", 1 << 20)
    devices["one"].tool("tar", "head -c 20000000 /dev/zero")
    endless = only(edgeres_deploy("one", bundle, "--json"))
    assert endless["error"]["cause"] == "the device sent more than 1 MiB during fetch"
    wait(lambda: devices["one"].left == [], "the device did not clean up")
    devices["one"].reset()
    heard = list[int]()
    real = ssh.failure

    def failure(errors: list[str], otherwise: str) -> EdgeresError:
        heard.extend(map(len, errors))
        return real(errors, otherwise)

    monkeypatch.setattr(ssh, "failure", failure)
    noise = '{ yes | head -n 2000; head -c 200000 /dev/zero | tr "\\000" x; echo; echo "Error: it broke"; } >&2; exit 1'
    loud = devices["one"].tool("loud", f'if [ "$1" = -m ]; then {noise}; fi; exec "{PYTHON}" "$@"')
    assert only(edgeres_deploy("one", bundle, "--json", python=loud))["error"]["cause"] == "it broke"
    assert (len(heard), max(heard)) == (ssh.LINES, ssh.LINE)


@needs_sshd
@pytest.mark.parametrize("name", ["a space", "per%cent", "long" * 20])
def test_connections_work_wherever_temporary_files_are(
    config: Path, devices: dict[str, Device], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / name))
    with ssh.sockets() as folder:
        device = ssh.Device("one", Path(folder), (), config)
        assert device.connect("python3", False, threading.Lock())["system"] == "Linux"
        assert device.step("have", "", "none", "") == {}
        assert device.close() == []


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
def test_no_time_to_measure_is_refused_before_anything_is_sent(bundle: Path, seconds: str) -> None:
    done = CliRunner().invoke(cli, ["deploy", "nowhere", str(bundle), "--seconds", seconds])
    assert done.exit_code == 2
    assert "seconds to measure" in done.stderr


@needs_sshd
@needs_device
def test_a_full_disk_is_seen_before_and_while_copying(
    edgeres_deploy: Deploy, bundle: Path, devices: dict[str, Device]
) -> None:
    devices["one"].tool("df", 'printf "header\n/dev/root 100 99 1 99%% /\n"')
    before = only(edgeres_deploy("one", bundle, "--json"))["error"]
    assert before["cause"] == "there is not enough room on the device"
    assert "0.0 MB are free" in before["evidence"]
    devices["one"].reset()
    devices["one"].tool("cat", "exec /bin/cat > /dev/full")
    during = only(edgeres_deploy("one", bundle, "--json"))["error"]
    assert during["cause"] == "the device could not take the file"
    assert "No space left on device" in during["evidence"]
    assert devices["one"].left == []


@needs_sshd
@needs_device
def test_one_deploy_at_a_time_and_leftovers_of_dead_ones_go(
    edgeres_deploy: Deploy, bundle: Path, devices: dict[str, Device], config: Path
) -> None:
    one = devices["one"]
    with contextlib.ExitStack() as stack:
        at_work = ssh.Device("one", config.parent, (), config)
        at_work.connect("python3", False, threading.Lock())
        stack.callback(at_work.close)
        error = only(edgeres_deploy("one", bundle, "--json"))["error"]
        assert error["cause"] == "another deploy is at work on this device"
        assert (one.cache / "lock").is_symlink()  # of the first, which goes on
    assert one.left == []
    # a deploy whose guard the machine itself has ended: a number that another process has by now
    for path in ("deploy-dead/made/env-half", "env-half/bin/python", "env-kept/edgeres-ready"):
        (one.cache / path).parent.mkdir(parents=True, exist_ok=True)
        (one.cache / path).touch()
    (one.cache / "lock").symlink_to(f"dead.{os.getpid()}")
    assert edgeres_deploy("one", bundle).exit_code == 0
    assert sorted(p.name for p in one.cache.iterdir()) == ["env-kept"]


@pytest.mark.slow
@needs_sshd
@needs_device
def test_an_environment_is_made_offline_kept_used_again_and_left(
    edgeres_deploy: Deploy, bundle: Path, devices: dict[str, Device]
) -> None:
    one = devices["one"]
    first = edgeres_deploy("one", bundle, "--keep", python=None)
    assert first.exit_code == 0, first.output
    assert "making a Python environment" in first.stderr
    assert "package index" not in first.stderr
    kept = sorted(p.name for p in one.cache.iterdir())
    assert [name.split("-")[0] for name in kept] == ["bundle", "env", "work"]
    second = edgeres_deploy("one", bundle, python=None)
    assert second.exit_code == 0, second.output
    assert "making" not in second.stderr
    assert "copying" not in second.stderr
    assert "up to date" in second.stderr  # the engine
    # what it found there it leaves, but a bundle that is damaged is copied anew
    assert sorted(p.name for p in one.cache.iterdir()) == kept
    (one.cache / kept[0]).write_bytes(b"damaged")
    assert "copying the bundle" in edgeres_deploy("one", bundle).stderr


@needs_sshd
@needs_device
def test_packages_that_are_nowhere_are_named(
    edgeres_deploy: Deploy, bundle: Path, devices: dict[str, Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device of another kind, for which nothing compiled here fits."""
    real = deploy.Python
    monkeypatch.setattr(deploy, "Python", lambda version, machine, glibc: real(version, "aarch64", glibc))
    # pip is real, only nothing comes of it
    pip = f'PIP_DRY_RUN=1 PIP_IGNORE_INSTALLED=1 exec "{PYTHON}" "$@"'
    devices["one"].tool("pip", pip)
    copy = f'mkdir -p "$4/bin" && exec cp "{devices["one"].tools}/pip" "$4/bin/python"'
    devices["one"].tool("python3", f'[ "$2" != venv ] || {{ {copy}; }}; exec "{PYTHON}" "$@"')
    error = only(edgeres_deploy("one", bundle, "--json", python=None))["error"]
    assert re.fullmatch(r"the device lacks \w+, and found no package index with it", error["cause"])
    assert (
        "--platform manylinux_2_28_aarch64 --platform manylinux2014_aarch64 numpy onnxruntime protobuf" in error["next"]
    )
    assert devices["one"].left == []


def test_a_device_needs_few_tools(tmp_path: Path) -> None:
    """No sha256sum, no timeout: its Python adds up, and only the end of the connection ends the guard."""
    (tmp_path / "bin").mkdir()
    tools = ("cat", "df", "grep", "ln", "mkdir", "mv", "readlink", "rm", "rmdir", "sh", "tr", "uname", "wc")
    for name in tools:
        (tmp_path / "bin" / name).symlink_to(str(shutil.which(name)))
    (tmp_path / "bin" / "python3").symlink_to(sys.executable)
    script = (Path(edgeres.__file__).parent / "device.sh").read_text(encoding="utf-8")
    environment = {"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path)}
    cache = tmp_path / ".cache" / "edgeres"

    def start(*arguments: str) -> subprocess.Popen[bytes]:
        command = ["sh", "-c", script, "edgeres-deploy", "0123", *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, start_new_session=True)

    with start("guard", "1", "") as guard:
        assert guard.stdout
        facts = dict[str, str]()
        while "ready" not in facts:
            ssh._note(guard.stdout.readline(), facts)
        with start("look", "python3") as look:
            for line in look.communicate()[0].splitlines():
                ssh._note(line, facts)
        deploy.require(facts, None, "onnxruntime", [])
        assert facts["ready"] == str(cache / "deploy-0123")
        with start("put", "bundle-x", "4", hashlib.sha256(b"data").hexdigest()) as put:
            put.communicate(b"data")
        assert put.returncode == 0
        assert (cache / "bundle-x").read_bytes() == b"data"
        with start("put", "bundle-y", "4", hashlib.sha256(b"other").hexdigest()) as put:
            put.communicate(b"data")
        assert put.returncode == 1
        assert not (cache / "bundle-y").exists()
        out, _ = guard.communicate()
    assert b"edgeres end=clean" in out
    assert not cache.parent.exists()
    with start("have", "a", "b", "c") as late:
        late.communicate()
    assert late.returncode == 1


@pytest.mark.parametrize(
    ("hosts", "word"),
    [
        (["-oProxyCommand=x"], "is no host"),
        (["a b"], "is no host"),
        ([".."], "is no host"),
        ([""], "is no host"),
        (["a", "b", "a"], "twice: a"),
        ([], "no host"),
    ],
)
def test_hosts_that_make_no_sense_are_refused(hosts: list[str], word: str, bundle: Path) -> None:
    done = CliRunner().invoke(cli, ["deploy", "--", *hosts, str(bundle)])
    assert done.exit_code == 2
    assert word in done.stderr


FACTS = {"system": "Linux", "machine": "aarch64", "python": "/usr/bin/python3", "version": "3.10.12", "venv": "yes"}
FACTS |= {"edgeres": "", "tensorrt": "10.3.0", "cuda": "2025.1", "model": "NVIDIA Jetson"}


@pytest.mark.parametrize(
    ("change", "python", "cause", "hint"),
    [
        ({"system": "Darwin"}, None, "does not run Linux", ""),
        ({"version": ""}, None, "no python3", "apt install python3"),
        ({"version": "3.8.10"}, None, "too old", "JetPack 6"),
        ({"venv": ""}, None, "cannot make environments", "apt install python3.10-venv"),
        ({"tensorrt": ""}, None, "finds none", "apt install tensorrt python3-libnvinfer"),
        ({"cuda": ""}, None, "PyCUDA or cuda-python", "--wheels"),
        ({"cuda": "", "edgeres": edgeres.__version__}, "/env", "PyCUDA or cuda-python", "--python"),
        ({"venv": ""}, "/env", "has not the edgeres", "--python"),
        ({"edgeres": "0.0.1"}, "/env", "has not the edgeres", "--python"),
    ],
)
def test_what_keeps_a_device_from_working_is_said_with_what_to_do(
    change: dict[str, str], python: str | None, cause: str, hint: str
) -> None:
    deploy.require(FACTS, None, "tensorrt", [])
    deploy.require({**FACTS, "cuda": ""}, None, "tensorrt", ["pycuda"])  # which is among the wheels
    deploy.require({**FACTS, "tensorrt": "", "venv": "", "edgeres": edgeres.__version__}, "/env", "onnxruntime", [])
    with pytest.raises(EdgeresError) as caught:
        deploy.require({**FACTS, **change}, python, "tensorrt", [])
    assert cause in caught.value.cause
    assert hint in caught.value.hint


def test_a_binding_among_the_wheels_is_installed_for_tensorrt(tmp_path: Path) -> None:
    (tmp_path / "pycuda-2025.1-cp310-cp310-linux_aarch64.whl").touch()
    assert deploy._packages("tensorrt", tmp_path) == ("pycuda",)
    assert deploy._packages("tensorrt", None) == ()
    assert deploy._packages("onnxruntime", tmp_path) == ("onnxruntime",)


def test_a_device_cannot_write_outside_of_its_folder(tmp_path: Path) -> None:
    data = io.BytesIO()
    data.write(b"welcome\nedgeres data=tar\n")
    with tarfile.open(fileobj=data, mode="w|") as tar:
        for name, kind in (
            ("./result.json", tarfile.REGTYPE),
            ("../out", tarfile.REGTYPE),
            ("/tmp/out", tarfile.REGTYPE),
            ("link", tarfile.SYMTYPE),
            ("folder", tarfile.DIRTYPE),
            (".hidden", tarfile.REGTYPE),
        ):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/passwd"
            tar.addfile(entry)
    (tmp_path / "in").mkdir()
    deploy._unpack(data, tmp_path / "in")
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["in", "in/result.json"]
    with pytest.raises(EdgeresError, match="damaged"):
        deploy._unpack(io.BytesIO(b"edgeres data=tar\nno tar" * 100), tmp_path / "in")


@pytest.mark.parametrize(
    ("headers", "damaged"),
    [
        ({"GNU.sparse.map": "a,b"}, True),
        ({"GNU.sparse.size": "zz"}, True),
        ({"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "zz"}, True),
        ({"GNU.sparse.map": "0,1", "GNU.sparse.size": str(1 << 20)}, False),
        ({"path": "other.json"}, False),
    ],
)
def test_files_with_holes_and_headers_that_lie_come_to_nothing(
    tmp_path: Path, headers: dict[str, str], damaged: bool
) -> None:
    data = io.BytesIO(b"edgeres data=tar\n")
    data.seek(0, io.SEEK_END)
    with tarfile.open(fileobj=data, mode="w", format=tarfile.PAX_FORMAT) as tar:
        entry = tarfile.TarInfo("result.json")
        entry.size, entry.pax_headers = 5, headers
        tar.addfile(entry, io.BytesIO(b"12345"))
    with pytest.raises(EdgeresError, match="damaged") if damaged else contextlib.nullcontext():
        deploy._unpack(data, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_words_of_a_program_become_an_error() -> None:
    error = ssh.failure(["noise", "Error: it broke", "  because", "Next: mend it"], "other")
    assert (error.cause, error.evidence, error.hint) == ("it broke", "because", "mend it")
    assert ssh.failure(["noise", "Error: it broke"], "").evidence == ""
    assert ssh.failure(["df: full", "Failed: no room"], "").evidence == "df: full"
    assert ssh.failure(["one", "two"], "it ended").evidence == "one\ntwo"


def test_an_output_that_cannot_be_written_is_refused_before_any_device_works(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        deploy.deploy(["nowhere.invalid"], bundle, tmp_path / "file")
    with pytest.raises(InputError, match="there is no bundle"):
        deploy.deploy(["nowhere.invalid"], tmp_path / "box-1", tmp_path / "out")


def test_a_former_result_is_not_taken_for_that_of_a_deploy_that_fails(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "nowhere.invalid"
    folder.mkdir(parents=True)
    for name in ("result.json", "outcomes.npz"):
        (folder / name).write_text("old")
    (record,) = deploy.deploy(["nowhere.invalid"], bundle, tmp_path / "out")
    assert record["error"]
    assert sorted(p.name for p in folder.iterdir()) == ["former-outcomes.npz", "former-result.json"]


def test_the_table_says_why_and_where_and_cuts_no_name() -> None:
    found: dict[str, Any] = {
        "device": None,
        "result": None,
        "error": None,
        "drop": 0.4,
        "interval": [-0.1, 0.9],
        "p50_ms": 2.0,
    }
    found |= {"met": False, "verdict": "NOT ENOUGH IMAGES", "images_needed": 900, "notes": [], "seconds": 1.0}
    hosts = ["line-7-camera-12-of-the-hall-in-the-north", "line-7-camera-13-of-the-hall-in-the-north"]
    records = [
        {**found, "host": h, "reasons": [f"not decided for {i}"], "unstable": ["clocks changed"]}
        for i, h in enumerate(hosts)
    ]
    console = Console(file=io.StringIO(), width=80)
    console.print(deploy_table.table(records))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\u2026" not in text
    assert max(map(len, text.splitlines())) <= 80
    squeezed = re.sub(r"\s", "", text)
    for i, host in enumerate(hosts):
        assert f"{host}:notdecidedfor{i}" in squeezed
        assert f"{host}:latencyisnotstable:clockschanged" in squeezed
