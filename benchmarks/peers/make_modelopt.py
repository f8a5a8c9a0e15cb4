"""FP32 ONNX + calibration batches -> INT8 ONNX with NVIDIA Model Optimizer, on the CPU. Run by `compare.py`."""

import argparse

import numpy as np
from modelopt.onnx.quantization import quantize


def main() -> None:
    """Parse and quantize. What stays in high precision stays FP32, so that ONNX Runtime's CPU kernels can run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("calibration", help=".npy of float32 (N, 3, H, W)")
    parser.add_argument("output")
    parser.add_argument("--method", choices=("max", "entropy"), default="max")
    args = parser.parse_args()
    quantize(
        args.model,
        quantize_mode="int8",
        calibration_data=np.load(args.calibration),
        calibration_method=args.method,
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        output_path=args.output,
        log_level="WARNING",
    )


if __name__ == "__main__":
    main()
