"""One picture, one result, however it is stored."""

import io

import numpy as np
import pytest
from PIL import Image

from mts_fast.pipeline.data.images import UnreadableImage, read_image, shorter_side

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 20, 3), dtype=np.uint8)
GREY = PIXELS[..., 0]


def stored(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pixels(content):
    image = read_image(content)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM", "TGA"])
def test_lossless_formats_agree(form):
    assert np.array_equal(pixels(stored(Image.fromarray(PIXELS), form)), PIXELS)
    assert np.array_equal(pixels(stored(Image.fromarray(GREY), form)), np.stack(3 * [GREY], 2))


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled(form):
    deep = GREY.astype(np.uint16) * 257
    assert np.array_equal(pixels(stored(Image.fromarray(deep), form))[..., 0], GREY)


def test_floating_point_values():
    content = stored(Image.fromarray(GREY.astype(np.float32) / 255), "TIFF")
    assert np.array_equal(pixels(content)[..., 0], GREY)
    with pytest.raises(UnreadableImage, match="outside"):
        read_image(stored(Image.fromarray(GREY.astype(np.float32)), "TIFF"))


def test_one_bit_pictures():
    image = Image.fromarray(GREY).convert("1")
    assert np.array_equal(pixels(stored(image))[..., 0], np.asarray(image) * 255)


def test_cmyk_is_converted():
    content = stored(Image.fromarray(PIXELS).convert("CMYK"), "JPEG", quality=95)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    assert np.array_equal(pixels(content), expected)


def test_transparency_has_one_rule():
    few = Image.fromarray(PIXELS // 128 * 127).quantize(16)
    clear = np.zeros((12, 20), bool)
    clear[3:6] = True
    rgba = np.dstack([np.asarray(few.convert("RGB")), np.where(clear, 0, 255).astype(np.uint8)])
    indices = np.asarray(few).copy()
    indices[clear] = 200
    palette = Image.fromarray(indices)
    palette = palette.convert("P")
    palette.putpalette(few.getpalette() + [9] * (768 - len(few.getpalette())))
    one, other = pixels(stored(Image.fromarray(rgba))), pixels(stored(palette, transparency=200))
    assert (one[clear] == 255).all() and np.array_equal(one, other)
    grey = Image.fromarray(np.dstack([GREY, np.where(clear, 0, 255).astype(np.uint8)]))
    assert (pixels(stored(grey))[clear] == 255).all()


@pytest.mark.parametrize("tag", range(1, 9))
def test_orientation_is_applied(tag):
    exif = Image.Exif()
    exif[0x0112] = tag
    content = stored(Image.fromarray(PIXELS), "TIFF", exif=exif)
    turned = {
        1: PIXELS,
        2: PIXELS[:, ::-1],
        3: PIXELS[::-1, ::-1],
        4: PIXELS[::-1],
        5: PIXELS.transpose(1, 0, 2),
        6: np.rot90(PIXELS, -1),
        7: PIXELS[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(PIXELS),
    }
    assert np.array_equal(pixels(content), turned[tag])


def test_first_frame_of_several():
    frames = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
    content = stored(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.array_equal(pixels(content)[..., 0], GREY)


def test_damaged_files_are_never_half_a_picture():
    png = stored(Image.fromarray(PIXELS))
    jpeg = stored(Image.fromarray(RNG.integers(0, 256, (99, 99, 3), dtype=np.uint8)), "JPEG")
    for content, said in (
        (b"", "0 bytes"),
        (b"<html>404</html>", "no known image format, begins with b'<html>40'"),
        (png[:-300], "damaged"),
        (jpeg[:-300], "damaged"),
        (png[:60], "damaged"),
    ):
        with pytest.raises(UnreadableImage, match=said):
            read_image(content)
        assert shorter_side(content[:20]) is None
    assert shorter_side(png[:-300]) == 12


def test_every_place_to_cut_a_file_off():
    for form in ("PNG", "BMP", "TIFF", "JPEG", "GIF", "WEBP", "PPM", "TGA"):
        options = {"lossless": True} if form == "WEBP" else {}
        content = stored(Image.fromarray(PIXELS), form, **options)
        whole = pixels(content)
        for end in range(0, len(content) - 8, max(1, len(content) // 40)):
            try:
                half = pixels(content[:end])
            except UnreadableImage:
                continue
            assert np.array_equal(half, whole), (form, end)


def test_giants(monkeypatch):
    monkeypatch.setattr("mts_fast.pipeline.data.images.LARGEST_PIXELS", 100)
    with pytest.raises(UnreadableImage, match="20 x 12 pixels"):
        read_image(stored(Image.fromarray(PIXELS)))
