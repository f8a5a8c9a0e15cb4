"""Axes and extents of a foreign graph's tensors: what a reshape, a window or a constant means for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from edgeres.foreign_ops import Value


class Unreadable(Exception):
    """A node that has no counterpart in the normal form; the text says what about it."""


def view(x: Value, shape: Sequence[int]) -> Value:
    """Deal the letters of ``x``, in the order they lie in memory, to axes of these extents."""
    letters = [letter for group in x.layout for letter in group]
    axes: list[str] = []
    for extent in shape:
        group, held = "", 1
        while letters and (held < extent or (letters[0] == "N" and held == extent == x.size["N"] == 1)):
            held *= x.size[letters[0]]
            group += letters.pop(0)
        axes.append(group)
        if held != extent:
            raise Unreadable(f"reshapes {x.shape} to {tuple(shape)}")
    if letters:
        raise Unreadable(f"reshapes {x.shape} to {tuple(shape)}")
    return replace(x, axes=tuple(axes))


def per_channel(x: Value, constant: np.ndarray) -> np.ndarray:
    """``constant``, which is combined with ``x``, as one number per channel (C,)."""
    shape = (1,) * (len(x.axes) - constant.ndim) + constant.shape
    if len(shape) > len(x.axes) or any(n > 1 and group != "C" for n, group in zip(shape, x.layout, strict=False)):
        raise Unreadable(f"combines {x.shape} with a constant of shape {constant.shape}, which is not per channel")
    return np.broadcast_to(constant.reshape(-1), x.size["C"])


def window_of(x: Value, kernel: Sequence[int], attributes: dict[str, Any]) -> dict[str, Any]:
    """Kernel, strides, dilations and explicit pads [top, left, bottom, right] of a convolution or pool of ``x``."""
    strides = list(attributes.get("strides", [1, 1]))
    dilations = list(attributes.get("dilations", [1, 1]))
    pads = list(attributes.get("pads", [0, 0, 0, 0]))
    auto = attributes.get("auto_pad", b"NOTSET").decode()
    for i, extent in enumerate(x.op.sizes[2:]):
        reach, stride = (kernel[i] - 1) * dilations[i] + 1, strides[i]
        if auto.startswith("SAME"):
            total = max((-(-extent // stride) - 1) * stride + reach - extent, 0)
            small, large = total // 2, total - total // 2
            pads[i], pads[i + 2] = (small, large) if auto == "SAME_UPPER" else (large, small)
        elif attributes.get("ceil_mode"):  # as padding: the last window may reach over the border
            steps = -(-(extent + pads[i] + pads[i + 2] - reach) // stride)
            steps -= steps * stride >= extent + pads[i]  # but does not start behind it
            pads[i + 2] = max(pads[i + 2], steps * stride + reach - extent - pads[i])
    return {"kernel_shape": list(kernel), "strides": strides, "pads": pads, "dilations": dilations}


def extents(x: Value, window: dict[str, Any]) -> tuple[int, int]:
    """Height and width of what a window, as `window_of` gives it, leaves of ``x``."""
    out = []
    for i, extent in enumerate(x.op.sizes[2:]):
        reach = (window["kernel_shape"][i] - 1) * window.get("dilations", [1, 1])[i] + 1
        out.append((extent + window["pads"][i] + window["pads"][i + 2] - reach) // window["strides"][i] + 1)
    return out[0], out[1]
