"""Implicit INT8, which TensorRT has up to 10.16: scales from a calibration cache, or from images while it builds.

TensorRT calls a calibrator from C++, where an exception would pass for "no more images" and give a bad engine without
a word (python/src/infer/pyInt8.cpp). So nothing is raised in here: it is kept, and raised after the build.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeres.errors import BuildError, InputError, UsageError
from edgeres.recipe import at_least, one_of
from edgeres.trt.bindings import title

if TYPE_CHECKING:
    import numpy as np

    from edgeres.runners.cuda import Cuda

ALGORITHMS = {
    "entropy": ("IInt8EntropyCalibrator2", "EntropyCalibration2"),
    "minmax": ("IInt8MinMaxCalibrator", "MinMaxCalibration"),
}
"""How TensorRT chooses ranges -> the class of calibrator, and what its caches are headed with."""

EXPLICIT = "a graph with Q/DQ nodes is quantized already: give the FP32 one, which `edgeres export` makes"
AGAIN = "make it again, with the graph: `edgeres quantize`"


@dataclass(frozen=True)
class Calibration:
    """Where scales come from: a ``cache``, as `edgeres.calibration_cache.write` makes it, or images.

    ``batches`` gives them anew each time it is called: FP32 arrays of (N, 3, H, W), any N. They are cut into batches
    of ``batch_size``; a network of fixed batch takes its own. ``algorithm`` is TensorRT's for images; a cache is
    headed with it.
    """

    cache: str | None = None
    batches: Callable[[], Iterator[np.ndarray]] | None = None
    batch_size: int = 8
    algorithm: str = "entropy"

    def __post_init__(self) -> None:
        one_of("calibration algorithm", self.algorithm, tuple(ALGORITHMS))
        at_least("calibration batch size", self.batch_size, 1)
        if (self.cache is None) == (self.batches is None):
            raise UsageError("calibration takes either a cache or images")


class Images:
    """Calibration images as batches of ``shape``, one after the other at one address of the device."""

    def __init__(self, batches: Callable[[], Iterator[np.ndarray]], cuda: Cuda, shape: tuple[int, ...]) -> None:
        import numpy as np

        self.served = self.left_out = 0
        self.ended = False
        self._batches, self._cuda, self._shape = batches, cuda, shape
        with cuda.current():
            self._host = cuda.host(shape, np.dtype(np.float32))
            self._device, self._stream = cuda.device(self._host.nbytes), cuda.stream()
        self._full = self._fill()

    def next(self) -> int | None:
        """The address, where the next batch is; None if there is none."""
        with self._cuda.current():
            if next(self._full, None) is None:
                self.ended = True
                return None
            self._cuda.copy_in(self._device, self._host, self._stream)
            self._cuda.synchronize(self._stream)
        self.served += 1
        return self._device

    def _fill(self) -> Iterator[np.ndarray]:
        """The page-locked array, each time it is full."""
        have, want = 0, self._shape[0]
        for batch in self._batches():
            if batch.shape[1:] != self._shape[1:] or batch.dtype != self._host.dtype:
                raise InputError(
                    f"calibration images are {batch.dtype} of {batch.shape[1:]}",
                    evidence=f"the network takes float32 of {self._shape[1:]}",
                )
            while len(batch):
                some, batch = batch[: want - have], batch[want - have :]
                self._host[have : have + len(some)] = some
                have += len(some)
                if have == want:
                    yield self._host
                    have = 0
        self.left_out = have


def calibrator(trt: Any, calibration: Calibration, cuda: Cuda | None, shape: tuple[int, ...]) -> Any:
    """The calibrator of library ``trt``: serves ``calibration``, images in batches of ``shape`` through ``cuda``.

    ``cache`` holds what TensorRT wrote, or was given; ``text`` says how far it is; ``stop`` ends it.
    Raises `InputError` for a cache that is none.
    """
    kind, algorithm = ALGORITHMS[calibration.algorithm]
    base = getattr(trt, kind)
    given = None if calibration.cache is None else _cache_for(trt.__version__, algorithm, calibration.cache)
    images = Images(calibration.batches, cuda, shape) if calibration.batches and cuda else None

    class Calibrator(base):  # type: ignore[misc,valid-type]
        """What TensorRT calls."""

        def __init__(self) -> None:
            base.__init__(self)
            self.cache = given
            self._read = self._asked = self._stopped = False
            self.error: BaseException | None = None

        def get_batch_size(self) -> int:
            return shape[0]

        def get_batch(self, names: list[str]) -> list[int] | None:
            self._asked = True
            if images is None or self._stopped or self.error:
                return None
            try:
                address = images.next()
            except BaseException as error:
                self.error = error
                return None
            return None if address is None else [address]

        def read_calibration_cache(self) -> bytes | None:
            self._read = True
            return given  # not a new copy: TensorRT reads it after this returns

        def write_calibration_cache(self, cache: Any) -> None:
            self.cache = bytes(cache)

        def stop(self) -> None:
            self._stopped = True

        @property
        def text(self) -> str:
            return f"calibration batch {images.served}" if images and images.served and not images.ended else ""

        @property
        def done(self) -> bool:
            """Whether ``cache`` is from all there is."""
            return self.cache is not None and (images is None or images.ended)

        @property
        def notes(self) -> list[str]:
            if images is None or not images.left_out:
                return []
            return [f"{images.left_out} calibration images were left out: they fill no batch of {shape[0]}"]

        def check(self) -> None:
            """Raise `BuildError` unless TensorRT took all that there is."""
            if images is None:
                if self._asked:
                    raise BuildError(f"{title(trt)} refused the calibration cache", hint=AGAIN)
                if not self._read:
                    raise BuildError(f"{title(trt)} did not read the calibration cache", hint=EXPLICIT)
            elif not self._asked:
                raise BuildError(f"{title(trt)} asked for no calibration images", hint=EXPLICIT)
            elif not images.served:
                raise InputError(f"{images.left_out} calibration images fill no batch of {shape[0]}")
            elif not images.ended:
                raise BuildError(
                    f"{title(trt)} took {images.served} calibration batches of {shape[0]}, and there are more"
                )

    return Calibrator()


def _cache_for(version: str, algorithm: str, text: str) -> bytes:
    """A cache as ``version`` takes it: with the header of its own."""
    from edgeres import calibration_cache

    calibration_cache.read(text)
    _, _, lines = text.partition("\n")
    return f"{calibration_cache.header(version, algorithm)}\n{lines}".encode()
