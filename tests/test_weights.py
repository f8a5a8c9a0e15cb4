from __future__ import annotations

import hashlib
import os
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_resnet
from safetensors.torch import save_file
from torch import Tensor

from edgeres import weights
from edgeres.errors import EdgeresError, InputError, MissingDependency, UsageError
from edgeres.model import ResNet, resnet50
from edgeres.weights import Checkpoint, load_checkpoint, load_model, locate

Tensors = dict[str, Tensor]


def save(tensors: Any, path: Path) -> Path:
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return path


def full_size(classes: int = 5, variant: str = "v1.5") -> Tensors:
    torch.manual_seed(1)
    return resnet50(variant, classes).state_dict()


def outline(classes: int = 5) -> Tensors:
    """Names and shapes of ResNet-50 without the memory: each tensor is one zero, seen many times."""
    with torch.device("meta"):
        shapes = {k: t.shape for k, t in resnet50("v1.5", classes).state_dict().items()}
    return {
        k: torch.zeros((), dtype=torch.int64 if k.endswith("tracked") else None).expand(s) for k, s in shapes.items()
    }


def checkpoint(tensors: Tensors) -> Checkpoint:
    return Checkpoint("mine.pth", "0" * 64, tensors)


# files


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_tensors_and_hash_come_back_from_a_file(tmp_path: Path, suffix: str) -> None:
    tensors = tiny_resnet().state_dict()
    path = save(tensors, tmp_path / f"a{suffix}")
    found = load_checkpoint(path)
    assert found.tensors.keys() == tensors.keys()
    assert all(torch.equal(found.tensors[k], t) for k, t in tensors.items())
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.source == path.name
    assert load_checkpoint(path, "imagenet").source == "imagenet"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_full_size_checkpoint_gives_its_logits_back(tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(2)
    model = resnet50("v1", 3).eval()
    found = load_model(load_checkpoint(save(model.state_dict(), tmp_path / f"a{suffix}")), "v1")
    x = torch.randn(1, 3, 40, 40, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert torch.equal(found(x), model(x))
    assert not found.training
    assert all(p.dtype == torch.float32 for p in found.parameters())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_fp32(tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    tensors = {"fc.weight": torch.tensor([[0.5, -1.25]], dtype=dtype), "steps": torch.tensor(7)}
    found = load_checkpoint(save(tensors, tmp_path / f"a{suffix}")).tensors
    assert found["fc.weight"].dtype == torch.float32
    assert found["fc.weight"].tolist() == [[0.5, -1.25]]
    assert found["steps"].dtype == torch.int64


def test_a_whole_training_state_is_refused_with_its_keys(tmp_path: Path) -> None:
    path = save({"epoch": 3, "state_dict": {"fc.weight": torch.zeros(1)}}, tmp_path / "a.pth")
    with pytest.raises(InputError, match="does not hold tensors by name") as error:
        load_checkpoint(path)
    assert "['epoch', 'state_dict']" in error.value.evidence
    assert "state_dict()" in error.value.hint


def test_a_list_of_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not hold tensors by name") as error:
        load_checkpoint(save([torch.zeros(1)], tmp_path / "a.pth"))
    assert "it holds a list" in error.value.evidence


class Intruder:
    """Unpickling it makes a folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("intruded",)


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    path = save({"fc.weight": Intruder()}, tmp_path / "a.pth")
    with pytest.raises(InputError, match="is not a readable checkpoint") as error:
        load_checkpoint(path)
    assert "Weights only load failed" in error.value.evidence
    assert not (tmp_path / "intruded").exists()
    torch.load(path, weights_only=False)  # the same file does harm where code is trusted
    assert (tmp_path / "intruded").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_cut_files_are_refused_by_name(tmp_path: Path, suffix: str, keep: int) -> None:
    path = save({"fc.weight": torch.ones(64, 64)}, tmp_path / f"a{suffix}")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="is not a readable checkpoint") as error:
        load_checkpoint(path)
    assert str(path) in error.value.cause
    assert error.value.evidence
    assert ".safetensors" in error.value.hint


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_text_is_refused_as_a_checkpoint(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("<html>not found</html>" * 20)
    with pytest.raises(InputError, match="is not a readable checkpoint"):
        load_checkpoint(tmp_path / name)


@pytest.mark.parametrize("name", ["absent.pth", "absent.safetensors", ""])
def test_a_file_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="cannot read checkpoint") as error:
        load_checkpoint(tmp_path / name)
    assert str(tmp_path / name) in error.value.cause


def test_safetensors_not_installed_is_no_fault_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save({"fc.weight": torch.ones(1)}, tmp_path / "a.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(MissingDependency, match="'safetensors'") as error:
        load_checkpoint(path)
    assert error.value.hint == 'pip install "edgeres[torch]"'


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_refused_by_name(tmp_path: Path, value: float) -> None:
    tensors = {"conv1.weight": torch.ones(3), "fc.weight": torch.tensor([1.0, value]), "fc.bias": torch.tensor(value)}
    with pytest.raises(InputError, match="holds NaN or infinity") as error:
        load_checkpoint(save(tensors, tmp_path / "a.pth"))
    assert error.value.evidence == "in fc.weight and 1 more"


# models


def test_missing_step_counters_are_no_matter() -> None:
    tensors = full_size()
    old = {k: t for k, t in tensors.items() if not k.endswith("num_batches_tracked")}
    assert len(old) < len(tensors)
    found = load_model(checkpoint(old), "v1.5").state_dict()
    assert all(torch.equal(found[k], t) for k, t in old.items())
    assert found["bn1.num_batches_tracked"] == 0


def test_half_precision_weights_arrive_exactly() -> None:
    tensors = {k: t.half().float() if t.is_floating_point() else t for k, t in full_size().items()}
    found = load_model(checkpoint(tensors), "v1.5").state_dict()
    assert all(torch.equal(found[k], t) for k, t in tensors.items())


@pytest.mark.parametrize("classes", [1, 7])
def test_classes_are_counted_in_the_checkpoint(classes: int) -> None:
    found = checkpoint(outline(classes))
    assert found.classes == classes
    assert load_model(found, "v1").fc.out_features == classes
    assert load_model(found, "v1", classes).fc.out_features == classes


def test_another_number_of_classes_is_refused() -> None:
    with pytest.raises(UsageError, match="has 5 classes, 10 were asked for") as error:
        load_model(checkpoint(outline()), "v1.5", 10)
    assert "--classes 5" in error.value.hint


def resnet18(prefix: str = "") -> Tensors:
    """Outline of another network of the family: two 3x3 convolutions per block, no bottleneck."""
    tensors = {"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.weight": torch.zeros(5, 512), "fc.bias": torch.zeros(5)}
    for stage, width in enumerate((64, 128, 256, 512), 1):
        for block in (0, 1):
            for conv in (1, 2):
                tensors[f"layer{stage}.{block}.conv{conv}.weight"] = torch.zeros(()).expand(width, width, 3, 3)
    return {prefix + k: t for k, t in tensors.items()}


def without_fc() -> Tensors:
    return {k: t for k, t in outline().items() if not k.startswith("fc.")}


NOT_RESNET50: dict[str, tuple[Tensors, list[str]]] = {
    "resnet18": (resnet18(), ["missing: bn1.weight and ", "layer1.0.conv1.weight is (64, 64, 3, 3)", "(64, 64, 1, 1)"]),
    "prefixed": (
        {f"module.{k}": t for k, t in outline().items()},
        ["not in ResNet-50: module.conv1.weight and 319 more"],
    ),
    "resnet101": (
        outline() | {"layer3.6.conv1.weight": torch.zeros(256, 1024, 1, 1)},
        ["not in ResNet-50: layer3.6.conv1.weight"],
    ),
    "wide": (
        outline() | {"layer1.0.conv2.weight": torch.zeros(128, 64, 3, 3)},
        ["layer1.0.conv2.weight is (128, 64, 3, 3), ResNet-50 has (64, 64, 3, 3)"],
    ),
    "headless": (without_fc(), ["missing: fc.weight and 1 more"]),
    "another": (
        {"features.0.weight": torch.zeros(3)},
        ["missing: conv1.weight", "not in ResNet-50: features.0.weight"],
    ),
    "empty": ({}, ["missing: conv1.weight and "]),
    "scalar classifier": (outline() | {"fc.weight": torch.zeros(())}, ["fc.weight is ()"]),
}


@pytest.mark.parametrize("name", NOT_RESNET50)
def test_other_networks_are_refused_with_evidence(name: str) -> None:
    tensors, evidence = NOT_RESNET50[name]
    with pytest.raises(InputError, match=r"mine\.pth is not a ResNet-50 checkpoint") as error:
        load_model(checkpoint(tensors), "v1.5")
    for part in evidence:
        assert part in error.value.evidence
    assert "torchvision's parameter names" in error.value.hint


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown variant 'v3'"):
        load_model(checkpoint(outline()), "v3")


# names and downloads


def test_a_path_is_located_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "mine.pth"
    path.touch()
    assert locate(str(path), "v1") == path


@pytest.mark.parametrize("name", ["absent.pth", "imagenet1k", "."])
def test_neither_file_nor_name_lists_the_names(name: str) -> None:
    with pytest.raises(InputError, match="no checkpoint") as error:
        locate(name, "v1.5")
    assert name in error.value.cause
    assert "imagenet" in error.value.hint


def test_published_weights_of_the_other_variant_are_refused_before_any_download(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"imagenet weights are of variant v1\.5, not v1") as error:
        locate("imagenet", "v1")
    assert "--weights FILE" in error.value.hint
    assert not (tmp_path / "cache").exists()


def test_published_weights_name_their_hash() -> None:
    for variant, url, prefix in weights.PUBLISHED.values():
        assert variant in ("v1", "v1.5")
        assert url.startswith("https://")
        assert url.endswith(f"-{prefix}.pth")
        assert len(prefix) >= 8


BODY = bytes(range(256)) * 8000
"""About 2 MB, more than is read at once."""


@dataclass
class Server:
    """What is served, and what was asked for."""

    url: str = ""
    answer: str = "whole"
    requests: list[str] = field(default_factory=list)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Published weights from this machine, no farther."""
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.requests.append(self.path)
            if state.answer == "absent":
                self.send_error(404)
            elif state.answer == "no HTTP":
                self.wfile.write(b"220 mail.example ready\r\n\r\n")
            elif state.answer == "hang up":
                self.connection.shutdown(socket.SHUT_RDWR)
            elif state.answer == "cut chunks":
                self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffff\r\nonly a little")
            else:
                body = {"whole": BODY, "cut": BODY[:-1000], "another": BODY[::-1], "empty": b"", "plain": BODY}
                self.send_response(200)
                if state.answer != "plain":
                    self.send_header("Content-Length", str(len(BODY) if state.answer != "empty" else 0))
                self.end_headers()
                self.wfile.write(body[state.answer])

        def log_message(self, *_args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        state.url = f"http://127.0.0.1:{http.server_port}/models/resnet50-test.pth"
        publish(monkeypatch, state.url)
        yield state
        http.shutdown()
        thread.join()


def publish(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    prefix = hashlib.sha256(BODY).hexdigest()[:8]
    monkeypatch.setitem(weights.PUBLISHED, "imagenet", ("v1.5", url, prefix))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def files_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("answer", ["whole", "plain"])  # plain: of a length not told
def test_published_weights_are_downloaded_once(tmp_path: Path, server: Server, answer: str) -> None:
    server.answer = answer
    path = locate("imagenet", "v1.5")
    assert path == tmp_path / "cache" / "weights" / "resnet50-test.pth"
    assert path.read_bytes() == BODY
    assert locate("imagenet", "v1.5") == path
    assert server.requests == ["/models/resnet50-test.pth"]
    assert files_in(tmp_path) == ["resnet50-test.pth"]


def refused(tmp_path: Path) -> EdgeresError:
    with pytest.raises(InputError) as error:
        locate("imagenet", "v1.5")
    assert files_in(tmp_path) == []
    assert "--weights FILE" in error.value.hint
    assert "`edgeres demo`" in error.value.hint
    return error.value


@pytest.mark.parametrize(
    ("answer", "evidence"),
    [
        ("cut", "2,047,000 of 2,048,000 bytes"),
        ("another", "2,048,000 of 2,048,000 bytes"),
        ("empty", "0 of 0 bytes, SHA-256 e3b0c44298fc"),  # of nothing
    ],
)
def test_a_damaged_download_is_refused_and_not_kept(tmp_path: Path, server: Server, answer: str, evidence: str) -> None:
    server.answer = answer
    error = refused(tmp_path)
    assert server.url in error.cause
    assert "damaged" in error.cause
    assert evidence in error.evidence
    assert f"expected {hashlib.sha256(BODY).hexdigest()[:8]}" in error.evidence
    server.answer = "whole"
    assert locate("imagenet", "v1.5").read_bytes() == BODY  # and trying again helps


def test_the_length_counts_beside_the_hash(tmp_path: Path, server: Server) -> None:
    server.answer = "cut"
    with pytest.raises(InputError, match="damaged"):
        weights.download(server.url, tmp_path / "a.pth", "")
    assert files_in(tmp_path) == []


@pytest.mark.parametrize(
    ("answer", "evidence"),
    [("absent", "404"), ("no HTTP", "220 mail"), ("hang up", "closed"), ("cut chunks", "IncompleteRead")],
)
def test_a_failed_download_says_why_and_leaves_nothing(
    tmp_path: Path, server: Server, answer: str, evidence: str
) -> None:
    server.answer = answer
    error = refused(tmp_path)
    assert error.cause == f"cannot download {server.url}"
    assert evidence in error.evidence


def test_a_refused_connection_says_so_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody else can answer there
        publish(monkeypatch, f"http://127.0.0.1:{taken.getsockname()[1]}/a.pth")
        error = refused(tmp_path)
    assert "cannot download" in error.cause
    assert "refused" in error.evidence


def test_an_interrupted_download_leaves_nothing(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_path: Path) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "sha256_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        locate("imagenet", "v1.5")
    assert server.requests
    assert files_in(tmp_path) == []


def test_loaded_models_are_resnet50() -> None:
    model = load_model(checkpoint(outline()), "v1")
    assert isinstance(model, ResNet)
    assert model.get_submodule("layer2.0.conv1").stride == (2, 2)
    assert load_model(checkpoint(outline()), "v1.5").get_submodule("layer2.0.conv2").stride == (2, 2)
