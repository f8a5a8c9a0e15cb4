"""FP32 ONNX + calibration batches -> INT8 ONNX with onnxruntime.quantization. Run by `compare.py`."""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
}


class Reader(CalibrationDataReader):
    """Calibration images, ``batch`` at a time."""

    def __init__(self, pixels: np.ndarray, batch: int) -> None:
        self._feeds = ({"input": pixels[i : i + batch]} for i in range(0, len(pixels), batch))

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


def main() -> None:
    """Parse, prepare, quantize."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path, help=".npy of float32 (N, 3, H, W)")
    parser.add_argument("output", type=Path)
    parser.add_argument("--method", choices=METHODS, default="minmax")
    parser.add_argument("--percentile", type=float, default=99.999)
    parser.add_argument("--scheme", choices=("u8s8", "s8s8", "tensorrt"), default="u8s8")
    parser.add_argument("--float-logits", action="store_true", help="leave the classifier's output FP32")
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()
    symmetric = args.scheme != "u8s8"  # which percentile would be by default
    options: dict[str, object] = {
        "ActivationSymmetric": symmetric,
        "CalibTensorRangeSymmetric": symmetric,
        "CalibPercentile": args.percentile,
    }
    if args.float_logits:
        options["OpTypesToExcludeOutputQuantization"] = ["Gemm"]
    if args.scheme == "tensorrt":  # Q/DQ on inputs only, biases FP32: what TensorRT fuses
        options |= {"AddQDQPairToWeight": True, "DedicatedQDQPair": True, "QuantizeBias": False}
        options["OpTypesToExcludeOutputQuantization"] = ["Conv", "Gemm", "Add"]
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(args.model, prepared)
        quantize_static(
            prepared,
            args.output,
            Reader(np.load(args.calibration), args.batch),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8 if args.scheme == "u8s8" else QuantType.QInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=METHODS[args.method],
            extra_options=options,
        )


if __name__ == "__main__":
    main()
