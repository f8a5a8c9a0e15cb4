"""FP32 ONNX + calibration batches -> INT8 ONNX with NNCF's ONNX backend. Run by `compare.py`."""

import argparse

import nncf
import numpy as np
import onnx
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix
from nncf.quantization.range_estimator import RangeEstimatorParametersSet


def main() -> None:
    """Parse and quantize."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("calibration", help=".npy of float32 (N, 3, H, W)")
    parser.add_argument("output")
    parser.add_argument("--preset", choices=("performance", "mixed"), default="performance")
    parser.add_argument("--minmax", action="store_true", help="cover the whole range")
    parser.add_argument("--no-bias-correction", action="store_true", help="the fast one is NNCF's default")
    args = parser.parse_args()
    # this is for processors whose dot products cannot overflow: no weight needs to give up a bit
    advanced = AdvancedQuantizationParameters(
        overflow_fix=OverflowFix.DISABLE, disable_bias_correction=args.no_bias_correction
    )
    if args.minmax:  # of all images, where the default is the mean of each image's range
        advanced.activations_range_estimator_params = RangeEstimatorParametersSet.MINMAX
    pixels = np.load(args.calibration)
    model = nncf.quantize(
        onnx.load(args.model),
        nncf.Dataset([{"input": image[None]} for image in pixels]),
        preset=nncf.QuantizationPreset(args.preset),
        target_device=nncf.TargetDevice.CPU,
        subset_size=len(pixels),
        advanced_parameters=advanced,
    )
    onnx.save(model, args.output)


if __name__ == "__main__":
    main()
