"""edgeres: ResNet-50 from PyTorch to a quantized engine, with proof of what that cost and what it won."""

__version__ = "0.1.0"
