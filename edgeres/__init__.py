"""edgeres: ResNet-50 from PyTorch to a quantized engine, with proof of what that cost and what it won."""

import os

__version__ = "0.1.0"

# from 1.29 on ONNX Runtime writes a number of the device to its disk and reports what it runs (docs/Privacy.md there),
# unless it is told not to before it is imported
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
