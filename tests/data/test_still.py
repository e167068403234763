"""Pictures of every kind as a viewer shows them, and at the size that a model takes."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from mimicmotion.data.still import fitted, read_still

HALVES = np.zeros((48, 64, 3), dtype=np.uint8)
HALVES[:, :32], HALVES[:, 32:] = (200, 40, 40), (40, 40, 200)


def saved(path: Path, image: Image.Image, **options) -> Path:
    image.save(path, **options)
    return path


def test_a_plain_picture_is_itself(tmp_path):
    still = read_still(saved(tmp_path / "a.png", Image.fromarray(HALVES)))
    assert np.array_equal(still.picture, HALVES) and still.notes == ()


def test_exif_says_which_way_is_up(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its left side: to be turned clockwise
    still = read_still(saved(tmp_path / "a.png", Image.fromarray(HALVES), exif=exif))
    assert np.array_equal(still.picture, np.rot90(HALVES, -1)) and still.notes == ("is turned as its EXIF says",)


def test_what_is_transparent_lies_over_white(tmp_path):
    alpha = np.full((48, 64, 1), 255, dtype=np.uint8)
    alpha[:24], alpha[24:30] = 0, 128
    still = read_still(saved(tmp_path / "a.png", Image.fromarray(np.concatenate([HALVES, alpha], axis=2))))
    assert (still.picture[:24] == 255).all() and np.array_equal(still.picture[30:], HALVES[30:])
    assert np.abs(still.picture[24, 0].astype(int) - (np.array([200, 40, 40]) * 128 + 255 * 127) / 255).max() <= 1
    assert still.notes == ("is transparent: shown over white",)


def test_cmyk_palettes_gray_and_sixteen_bits(tmp_path):
    cmyk = read_still(saved(tmp_path / "a.jpg", Image.fromarray(HALVES).convert("CMYK"), quality=100, subsampling=0))
    assert cmyk.notes == ("is CMYK: converted without a profile",)
    assert np.abs(cmyk.picture[:, 8:24].astype(int) - HALVES[:, 8:24]).max() < 12
    palette = read_still(saved(tmp_path / "p.png", Image.fromarray(HALVES).quantize(8)))
    assert np.abs(palette.picture.astype(int) - HALVES).max() < 12
    gray = read_still(saved(tmp_path / "g.png", Image.fromarray(HALVES[..., 0])))
    assert np.array_equal(gray.picture, HALVES[..., :1].repeat(3, axis=2))
    deep = Image.fromarray(HALVES[..., 0].astype(np.uint16) << 8)
    assert read_still(saved(tmp_path / "d.png", deep)).picture[0, [0, 40], 0].tolist() == [199, 40]


def test_a_profile_counts_with_transparency_too(tmp_path, monkeypatch):
    """As phones and screenshots save Display P3; a converter of our own shows that it is asked."""
    monkeypatch.setattr(ImageCms, "profileToProfile", lambda image, *_, **__: ImageOps.invert(image))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for mode in ("RGB", "RGBA"):
        Image.new(mode, (40, 40), (10, 20, 30, 255)[: len(mode)]).save(tmp_path / "a.png", icc_profile=profile)
        assert read_still(tmp_path / "a.png").picture[0, 0].tolist() == [245, 235, 225]


def test_of_an_animation_the_first_picture(tmp_path):
    others = [Image.fromarray(np.full_like(HALVES, value)) for value in (0, 255)]
    path = saved(tmp_path / "a.gif", Image.fromarray(HALVES), save_all=True, append_images=others)
    still = read_still(path)
    assert still.notes == ("is an animation of 3 pictures: the first is taken",)
    assert np.abs(still.picture.astype(int) - HALVES).max() < 12


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, r"is not there \(in .*\); give a picture"),
        (lambda path: path.mkdir(), "is not there"),
        (lambda path: path.write_text("<html>"), "is no picture that can be read"),
        (lambda path: path.write_bytes(b""), "is no picture that can be read"),
        (lambda path: Image.new("RGB", (5000, 4000)).save(path, "PNG"), r"is 5000x4000, more than 16,777,216 pixels"),
        (lambda path: Image.new("RGB", (20, 400)).save(path, "PNG"), "is 20x400; give one of at least 32"),
    ],
)
def test_what_is_no_picture_is_said_in_one_line(tmp_path, make, message):
    make(tmp_path / "a.png")
    with pytest.raises(ValueError, match=message) as caught:
        read_still(tmp_path / "a.png")
    assert "\n" not in str(caught.value)


def test_a_cut_picture_is_refused(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = saved(tmp_path / "a.png", Image.fromarray(noise)).read_bytes()
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        read_still(tmp_path / "b.png")


def test_crop_keeps_the_middle_and_pad_keeps_all():
    picture = np.zeros((40, 80, 3), dtype=np.uint8)
    picture[:, 20:60] = 200
    assert (fitted(picture, 64, 64, "crop") > 180).mean() > 0.95
    padded = fitted(picture, 64, 64, "pad")
    assert padded.shape == (64, 64, 3) and not padded[:16].any() and not padded[48:].any() and padded[32, 32, 0] == 200
    assert abs(float((padded[20:44, :, 0] > 100).mean()) - 0.5) < 0.05
    for height, width in ((64, 192), (192, 64), (64, 64)):
        for fit in ("crop", "pad"):
            assert fitted(picture, height, width, fit).shape == (height, width, 3)
