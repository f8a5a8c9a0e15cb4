"""The FP32 network with its activations in reach, as fast as ONNX Runtime computes it without."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from edgeres import graph
from edgeres.errors import need

ROOM = 256 << 20
"""Bytes of activations held at a time; one image of ResNet-50 at 224 has 66 MB of them."""


class Probe:
    """``model`` with the named tensors as outputs, written into memory that is used again and again.

    The system clears each page it hands out: fresh memory for each batch takes about as long as counting what is in it.
    """

    def __init__(self, model: Any, names: list[str]) -> None:
        ort = need("onnxruntime", "onnx")
        self.inner = [n for n in names if n != graph.INPUT]
        probe = graph.expose(model, self.inner)
        options = ort.SessionOptions()
        options.add_session_config_entry("session.force_spinning_stop", "1")  # between runs the cores are for counting
        # on Arm this one fuses away convolutions whose outputs are asked for, and no session comes of it
        off, cpu = ["ConvAddActivationFusion"], ["CPUExecutionProvider"]
        self.session = ort.InferenceSession(probe.SerializeToString(), options, cpu, disabled_optimizers=off)
        self.memory: list[np.ndarray] = []

    def run(self, pixels: np.ndarray) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Pixels (N, 3, H, W) -> a few images at a time: the place of the first, and each tensor (n, ...) by name.

        The tensors hold until the next step.
        """
        if not self.inner:  # a session is not run for nothing
            yield 0, {graph.INPUT: pixels}
            return
        if not self.memory:
            shapes = [v.shape[1:] for v in self.session.run(self.inner, {graph.INPUT: pixels[:1]})]
            most = max(1, ROOM // (4 * sum(map(math.prod, shapes))))
            self.memory = [np.empty((most, *shape), np.float32) for shape in shapes]
        most = len(self.memory[0])
        for start in range(0, len(pixels), most):
            some = pixels[start : start + most]
            tensors = dict(zip(self.inner, (m[: len(some)] for m in self.memory), strict=True))
            binding = self.session.io_binding()
            binding.bind_cpu_input(graph.INPUT, some)
            for name, values in tensors.items():
                binding.bind_output(name, "cpu", 0, np.float32, values.shape, values.ctypes.data)
            self.session.run_with_iobinding(binding)
            yield start, {graph.INPUT: some, **tensors}
