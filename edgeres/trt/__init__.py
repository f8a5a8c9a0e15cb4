"""TensorRT and TensorRT-RTX as builders: typed ONNX -> plan. One code path from TensorRT 8.6 to 11.

What a library can do is asked of the library, never of its version: members are looked up by name, and every ``None``
or ``False`` that it returns becomes an error with what its logger and parser said.
"""

from edgeres.trt.bindings import EXECUTORS, ahead_of_time, load_library, logger, strongly_typed
from edgeres.trt.builder import Built, OutOfMemory, build, build_plan
from edgeres.trt.calibrator import Calibration
from edgeres.trt.options import MIB, Options

__all__ = [
    "EXECUTORS",
    "MIB",
    "Built",
    "Calibration",
    "Options",
    "OutOfMemory",
    "ahead_of_time",
    "build",
    "build_plan",
    "load_library",
    "logger",
    "strongly_typed",
]
