from __future__ import annotations

import hashlib
import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import picture, save
from PIL import Image

from edgeres import images as images_module
from edgeres.errors import InputError, UsageError
from edgeres.images import PRESETS, decode, normalize, open_image, preset, resize
from edgeres.recipe import Preprocess

EXACT = Preprocess(crop=8, resize=8, interpolation="nearest")


# decoding


@pytest.mark.parametrize(
    ("size", "resized", "left", "top"),
    [
        ((36, 36), (36, 36), 2, 2),
        ((72, 72), (36, 36), 2, 2),
        ((61, 43), (51, 36), 10, 2),  # 36 * 61 / 43 = 51.07; 9.5 rounds to the even 10
        ((43, 61), (36, 51), 2, 10),
        ((40, 53), (36, 47), 2, 8),  # 47.7 is cut to 47; 7.5 rounds to the even 8
        ((36, 49), (36, 49), 2, 8),  # 8.5 rounds to the even 8
        ((72, 40), (64, 36), 16, 2),  # 64.8 is cut to 64
        ((10, 7), (51, 36), 10, 2),  # enlarged
        ((1, 1), (36, 36), 2, 2),
        ((2, 300), (36, 5400), 2, 2684),
    ],
)
def test_shorter_side_is_resized_and_the_center_cropped(
    tmp_path: Path, size: tuple[int, int], resized: tuple[int, int], left: int, top: int
) -> None:
    pixels = picture(*size)
    reference = np.asarray(Image.fromarray(pixels).resize(resized, Image.Resampling.BILINEAR))
    found = decode(save(tmp_path / "a.png", pixels), Preprocess(crop=32, resize=36))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, reference[top : top + 32, left : left + 32])


def test_an_image_of_the_right_size_is_only_cropped(tmp_path: Path) -> None:
    pixels = picture(36, 40)
    found = decode(save(tmp_path / "a.png", pixels), Preprocess(crop=31, resize=36))
    np.testing.assert_array_equal(found, pixels[4:35, 2:33])  # 4.5 and 2.5 round to the even 4 and 2


def test_box_filter_averages(tmp_path: Path) -> None:
    pixels = picture(8, 8)
    found = decode(save(tmp_path / "a.png", pixels), Preprocess(crop=4, resize=4, interpolation="box"))
    mean = pixels.reshape(4, 2, 4, 2, 3).mean((1, 3))
    assert np.abs(found - mean).max() <= 1  # the filter rounds after each direction


def test_bilinear_filter_is_as_wide_as_the_reduction(tmp_path: Path) -> None:
    pixels = picture(16, 16)
    found = decode(save(tmp_path / "a.png", pixels), Preprocess(crop=8, resize=8, interpolation="bilinear"))
    # halving: a triangle of half width 2 meets pixel centers at distances 0.5 and 1.5 on either side
    taps = np.zeros((8, 16))
    for i in range(8):
        for j, weight in zip(range(2 * i - 1, 2 * i + 3), (1, 3, 3, 1), strict=True):
            if 0 <= j < 16:
                taps[i, j] = weight
    taps /= taps.sum(1, keepdims=True)
    expected = np.einsum("ij,kl,jlc->ikc", taps, taps, pixels.astype(float))
    assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos", "box"])
def test_each_interpolation_is_its_own(tmp_path: Path, interpolation: str) -> None:
    path = save(tmp_path / "a.png", picture(50, 50))
    found = {
        name: decode(path, Preprocess(crop=20, resize=20, interpolation=name)).tobytes()
        for name in ("nearest", "bilinear", "bicubic", "lanczos", "box")
    }
    assert [name for name, pixels in found.items() if pixels == found[interpolation]] == [interpolation]


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("L", 77, (77, 77, 77)),
        ("LA", (77, 3), (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("RGB", (10, 20, 30), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (10, 20, 30)),  # transparency is dropped, not blended
    ],
)
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str, color: object, expected: tuple[int, ...]) -> None:
    Image.new(mode, (8, 8), color).save(tmp_path / "a.png")  # type: ignore[arg-type]
    assert decode(tmp_path / "a.png", EXACT).reshape(-1, 3).tolist() == [list(expected)] * 64


def test_a_palette_is_looked_up(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 9, 90, 200])
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "a.png")
    found = decode(tmp_path / "a.png", EXACT)
    assert found[0, 0].tolist() == [0, 0, 0]
    assert found[0, 1].tolist() == found[7, 7].tolist() == [9, 90, 200]


def test_cmyk_jpeg_becomes_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    found = decode(tmp_path / "a.jpg", EXACT).astype(int)
    assert np.abs(found - np.array([255, 0, 0])).max() < 8


# the same pixels as torchvision


def mixed(width: int, height: int, channels: int) -> np.ndarray:
    """Some picture with edges and gradients, from integers alone."""
    y, x, c = np.indices((height, width, channels))
    return ((x * x * 7 + y * 31 + x * y * 3 + c * 85) % 256).astype(np.uint8)


def images_of_every_mode() -> dict[str, Image.Image]:
    """Mode and size -> an image; odd sizes, one pixel high, one pixel wide, smaller and larger than the crop."""
    found = {}
    for width, height in ((61, 43), (300, 1), (1, 77), (333, 511), (500, 375), (225, 301), (257, 256)):
        rgb = Image.fromarray(mixed(width, height, 3))
        made = {"RGB": rgb, "L": rgb.convert("L"), "1": rgb.convert("1"), "CMYK": rgb.convert("CMYK")}
        made |= {"RGBA": Image.fromarray(mixed(width, height, 4)), "LA": Image.fromarray(mixed(width, height, 2))}
        made["P"] = Image.fromarray(mixed(width, height, 1)[..., 0] % 23)
        made["P"].putpalette(list(mixed(23, 1, 3).ravel()))
        found |= {f"{mode} {width}x{height}": image for mode, image in made.items()}
    return found


def write_every_mode(folder: Path) -> dict[str, Path]:
    """The images as lossless files, palettes with half-transparent entries, some with the EXIF tag "turned by 90"."""
    found = {}
    for name, image in images_of_every_mode().items():
        found[name] = folder / f"{name}.{'tiff' if image.mode == 'CMYK' else 'png'}"
        image.save(found[name], **({"transparency": bytes([0, 100, 255])} if image.mode == "P" else {}))
    turned = Image.Exif()
    turned[0x0112] = 6
    found["EXIF 225x301"] = folder / "exif.png"
    Image.fromarray(mixed(225, 301, 3)).save(found["EXIF 225x301"], exif=turned)
    return found


# SHA-256 over the names and pixels, in order, of default_loader -> Resize -> CenterCrop of torchvision 0.29.2 with
# Pillow 13.0.0, for `write_every_mode`
TORCHVISION = {
    "imagenet": "5ef8ca56035bd8e1c28f846fe12b499151457c3e6633bd66e3490f699a4077d3",
    "imagenet-v2": "0924f83b8f87049eb8f545baff818051f7e1f4a74aa9c331a8c80cbc2a9f5fd1",
    "timm": "09ecc4062bba820fd70e4d18c97b42eba603ca4554af5bd2143111f47b5369c1",
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_pixels_are_those_that_torchvision_made(tmp_path: Path, name: str) -> None:
    digest = hashlib.sha256()
    for what, path in write_every_mode(tmp_path).items():
        digest.update(what.encode() + decode(path, preset(name)).tobytes())
    assert digest.hexdigest() == TORCHVISION[name]


def triangle(x: np.ndarray) -> np.ndarray:
    return np.clip(1 - abs(x), 0, None)


def cubic(x: np.ndarray) -> np.ndarray:
    x = abs(x)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((2.5 - x / 2) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


FILTERS = {"bilinear": (1.0, triangle), "bicubic": (2.0, cubic)}


def resampled(pixels: np.ndarray, n: int, name: str) -> np.ndarray:
    """The first axis brought to ``n`` by the definition: a filter as wide as the reduction, weights of 22 bits."""
    m = len(pixels)
    support, curve = FILTERS[name]
    scale = m / n
    wide = max(scale, 1)
    out = np.empty((n, *pixels.shape[1:]), np.uint8)
    for i in range(n):
        center = (i + 0.5) * scale
        first, last = max(int(center - support * wide + 0.5), 0), min(int(center + support * wide + 0.5), m)
        weights = curve((np.arange(first, last) - center + 0.5) / wide)
        fixed = np.rint(weights / weights.sum() * 2**22).astype(np.int64)
        total = np.tensordot(fixed, pixels[first:last].astype(np.int64), 1)
        out[i] = np.clip((total + 2**21) >> 22, 0, 255)
    return out


@pytest.mark.parametrize("name", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(61, 43), (300, 1), (1, 77), (33, 40), (101, 200), (36, 37)])
def test_pixels_follow_from_the_filters_definition(tmp_path: Path, name: str, size: tuple[int, int]) -> None:
    pixels = mixed(*size, 3)
    width, height = (int(36 * extent / min(size)) for extent in size)
    rows = resampled(pixels.transpose(1, 0, 2), width, name).transpose(1, 0, 2) if width != size[0] else pixels
    both = resampled(rows, height, name) if height != size[1] else rows
    left, top = round((width - 32) / 2), round((height - 32) / 2)
    found = decode(save(tmp_path / "a.png", pixels), Preprocess(crop=32, resize=36, interpolation=name))
    np.testing.assert_array_equal(found, both[top : top + 32, left : left + 32])


def test_the_exif_tag_is_ignored_as_in_torchvision(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    pixels = picture(8, 12)
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=turned)
    np.testing.assert_array_equal(decode(tmp_path / "a.png", EXACT), pixels[2:10])


def test_the_first_of_several_frames_is_read(tmp_path: Path) -> None:
    frames = [Image.fromarray(picture(8, 8, seed)) for seed in range(3)]
    frames[0].save(tmp_path / "a.tiff", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decode(tmp_path / "a.tiff", EXACT), picture(8, 8, 0))


# more than 8 bits


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, rows: bytes, depth: int = 8, color: int = 2) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


WIDE = np.array([[0, 255, 256, 511, 4660, 32768, 65279, 65535]] * 8, np.uint16)
HIGH = [0, 0, 1, 1, 18, 128, 254, 255]


@pytest.mark.parametrize("kind", ["png", "little tiff", "big tiff", "pgm"])
def test_gray_of_16_bits_is_scaled_and_not_clipped(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind.split()[-1]}"
    if kind == "pgm":
        path.write_bytes(b"P5 8 8 65535\n" + WIDE.astype(">u2").tobytes())
    elif kind == "big tiff":
        header = b"MM\0*" + struct.pack(">I", 8) + struct.pack(">H", 7)
        tags = [(256, 8), (257, 8), (258, 16), (259, 1), (262, 1), (273, 8 + 2 + 7 * 12 + 4), (279, 128)]
        body = b"".join(struct.pack(">HHII", tag, 4, 1, value) for tag, value in tags)
        path.write_bytes(header + body + b"\0" * 4 + WIDE.astype(">u2").tobytes())
    else:
        Image.fromarray(WIDE).save(path)
    found = decode(path, EXACT)
    assert found[0, :, 0].tolist() == HIGH
    assert (found == found[:1, :, :1]).all()


def test_gray_and_color_of_16_bits_agree(tmp_path: Path) -> None:
    rows = b"".join(b"\0" + np.repeat(row, 3).astype(">u2").tobytes() for row in WIDE)
    (tmp_path / "color.png").write_bytes(png(8, 8, rows, depth=16))
    Image.fromarray(WIDE).save(tmp_path / "gray.png")
    np.testing.assert_array_equal(decode(tmp_path / "color.png", EXACT), decode(tmp_path / "gray.png", EXACT))


@pytest.mark.parametrize(("mode", "word"), [("F", "floating-point"), ("I", "32-bit")])
def test_numbers_without_a_white_are_refused(tmp_path: Path, mode: str, word: str) -> None:
    Image.new(mode, (8, 8), 1).save(tmp_path / "a.tiff")
    with pytest.raises(InputError, match=f"{word} pixels: which number is white is not recorded"):
        decode(tmp_path / "a.tiff", EXACT)


# bad images


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"this is no image", "not an image that Pillow knows: it starts with b'this is '"),
        (png(8, 8, b"")[:20], "Truncated"),
        (b"\xff\xd8\xff", "not an image"),
        (png(0, 8, b""), "."),
        (png(20_000, 20_000, b""), "too many pixels: .*400000000"),
        (png(14_000, 13_000, b""), "too many pixels: .*182000000 .* 178956970"),
        (png(2**31 - 1, 2**31 - 1, b""), "too many pixels"),
        (png(60_000, 1, b"\0" + b"\7" * 180_000), "60000 x 1 pixels would be resized to 15360000 x 256"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_no_usable_image_is_refused_with_its_reason(
    tmp_path: Path, content: bytes, reason: str, stream: bool
) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises((InputError, OSError, SyntaxError), match=reason) as error:
        decode(io.BytesIO(content) if stream else tmp_path / "a.png", PRESETS["imagenet"])
    assert "\n" not in str(error.value)


def test_an_image_cut_short_is_an_error_not_a_gray_half(tmp_path: Path) -> None:
    whole = save(tmp_path / "a.jpg", picture(64, 64)).read_bytes()
    (tmp_path / "a.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match="truncated"):
        decode(tmp_path / "a.jpg", EXACT)


def test_pixel_data_that_expands_without_end_is_not_read_to_it(tmp_path: Path) -> None:
    bomb = png(8, 8, b"\0" * 200_000_000)
    assert len(bomb) < 200_000
    assert decode(io.BytesIO(bomb), EXACT).max() == 0


def test_a_large_image_within_the_limit_warns_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow warns above it, and raises above twice that
    with open_image(io.BytesIO(png(10, 15, b""))) as image:
        assert image.size == (10, 15)
    monkeypatch.setattr(images_module, "MAX_PIXELS", 140)
    with (
        pytest.raises(InputError, match="too many pixels: 10 x 15; the limit is 140"),
        open_image(io.BytesIO(png(10, 15, b""))),
    ):
        pass
    assert warnings.filters[0][0] != "ignore"  # the filters are as they were


# presets


def test_presets_are_what_their_owners_say() -> None:
    assert PRESETS["imagenet"] == Preprocess(crop=224, resize=256, interpolation="bilinear")
    assert PRESETS["imagenet-v2"] == Preprocess(crop=224, resize=232, interpolation="bilinear")
    assert PRESETS["timm"] == Preprocess(crop=224, resize=int(224 / 0.95), interpolation="bicubic")
    assert (PRESETS["mlperf"].crop, PRESETS["mlperf"].size, PRESETS["mlperf"].channel_order) == (224, 256, "RGB")


def test_mlperf_subtracts_means_and_does_not_divide() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 256, 1, 1).repeat(3, 3)
    found = normalize(pixels, preset("mlperf"))
    expected = np.arange(256)[None, :] - np.array([[123.68], [116.78], [103.94]])  # (3, 256)
    np.testing.assert_allclose(found[0, :, :, 0], expected, atol=5e-5)


def test_an_unknown_preset_is_named() -> None:
    with pytest.raises(UsageError, match="unknown preprocess preset 'mlpref'") as error:
        preset("mlpref")
    assert "did you mean 'mlperf'?" in error.value.hint


def covered(pixels: np.ndarray, n: int) -> np.ndarray:
    """The first axis brought to ``n``: every pixel cut into n, every m of those averaged."""
    m = len(pixels)
    return np.repeat(pixels, n, axis=0).reshape(n, m, *pixels.shape[1:]).mean(1)


@pytest.mark.parametrize(
    ("size", "to"), [((90, 70), (64, 50)), ((8, 8), (4, 4)), ((30, 20), (48, 32)), ((5, 1), (40, 8)), ((9, 9), (7, 9))]
)
def test_area_weighs_a_pixel_by_how_much_of_it_is_covered(size: tuple[int, int], to: tuple[int, int]) -> None:
    pixels = mixed(*size, 3)
    both = covered(covered(pixels.astype(float), to[1]).transpose(1, 0, 2), to[0]).transpose(1, 0, 2)
    found = np.asarray(resize(Image.fromarray(pixels), to, "area"))
    assert (found.shape, found.dtype) == ((to[1], to[0], 3), np.uint8)
    assert np.abs(found - both).max() <= 0.5 + 1e-9


def test_area_is_that_of_opencv() -> None:
    # cv2.resize(mixed(7, 5, 3), (4, 3), interpolation=cv2.INTER_AREA)[..., 0] of OpenCV 5.0.0
    expected = [[16, 50, 124, 180], [68, 110, 163, 80], [119, 170, 136, 135]]
    found = np.asarray(resize(Image.fromarray(mixed(7, 5, 3)), (4, 3), "area"))[..., 0]
    assert np.abs(found.astype(int) - expected).max() <= 1  # it rounds sums of 32-bit floats


# normalizing


def test_normalize_gives_the_imagenet_extremes() -> None:
    black_white = np.stack([np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)])
    found = normalize(black_white, Preprocess())
    assert (found.shape, found.dtype) == ((2, 3, 2, 2), np.float32)
    np.testing.assert_allclose(found[0, :, 0, 0], [-2.117904, -2.035714, -1.804444], atol=2e-6)
    np.testing.assert_allclose(found[1, :, 1, 1], [2.248908, 2.428571, 2.64], atol=2e-6)


def test_normalize_puts_channels_first_and_keeps_rows_and_columns() -> None:
    pixels = picture(5, 4)[None]
    found = normalize(pixels, Preprocess(mean=(0, 0, 0), std=(1, 1, 1)))
    assert found.flags.c_contiguous
    for c in range(3):
        for row in range(4):
            np.testing.assert_allclose(found[0, c, row] * 255, pixels[0, row, :, c], atol=1e-4)


def test_bgr_swaps_the_channels_after_each_got_its_own_mean_and_std() -> None:
    pixels = np.array([[[[51, 102, 204]]]], np.uint8)  # 0.2, 0.4, 0.8
    preprocess = Preprocess(mean=(0.1, 0.2, 0.3), std=(1, 2, 5), channel_order="BGR")
    np.testing.assert_allclose(normalize(pixels, preprocess).ravel(), [0.1, 0.1, 0.1], atol=1e-6)
    preprocess = Preprocess(mean=(0.0, 0.0, 0.0), std=(1, 2, 4), channel_order="BGR")
    np.testing.assert_allclose(normalize(pixels, preprocess).ravel(), [0.2, 0.2, 0.2], atol=1e-6)
    preprocess = Preprocess(mean=(0.0, 0.0, 0.0), std=(1, 1, 1), channel_order="BGR")
    np.testing.assert_allclose(normalize(pixels, preprocess).ravel(), [0.8, 0.4, 0.2], atol=1e-6)
