"""FP32 ONNX + calibration batches -> INT8 ONNX with ONNX Neural Compressor. Run by `compare.py`."""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx_neural_compressor import data_reader
from onnx_neural_compressor.quantization import CalibrationMethod, QuantFormat, QuantType, config, quantize

METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
}
FORMATS = {"qdq": QuantFormat.QDQ, "qoperator": QuantFormat.QOperator}


class Reader(data_reader.CalibrationDataReader):
    """Calibration images, ``batch`` at a time, as often as asked."""

    def __init__(self, pixels: np.ndarray, batch: int) -> None:
        self._batches = [pixels[i : i + batch] for i in range(0, len(pixels), batch)]
        self.rewind()

    def __len__(self) -> int:
        return len(self._batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)

    def rewind(self) -> None:
        self._feeds = ({"input": batch} for batch in self._batches)


def main() -> None:
    """Parse and quantize."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("calibration", help=".npy of float32 (N, 3, H, W)")
    parser.add_argument("output")
    parser.add_argument("--method", choices=METHODS, default="minmax")
    parser.add_argument("--format", choices=FORMATS, default="qdq")
    parser.add_argument("--float-logits", action="store_true", help="leave the classifier's output FP32")
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()
    reader = Reader(np.load(args.calibration), args.batch)
    settings = config.StaticQuantConfig(
        reader,
        calibrate_method=METHODS[args.method],
        quant_format=FORMATS[args.format],
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm"]} if args.float_logits else {},
        calibration_sampling_size=len(reader),
        execution_provider="CPUExecutionProvider",
    )
    with tempfile.TemporaryDirectory() as folder:
        scattered = Path(folder) / "int8.onnx"  # its weights lie in a second file
        quantize(args.model, scattered, settings)
        onnx.save(onnx.load(scattered), args.output)


if __name__ == "__main__":
    main()
