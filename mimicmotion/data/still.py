"""A still picture from a file as a viewer shows it, and how it is brought to the size that a model takes.

Choices: EXIF says which way is up; CMYK, gray, palettes and 16 bits become RGB, an embedded colour profile sRGB; what
is transparent lies over white; of an animation the first picture is taken. Each is said in a note.
"""

import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from mimicmotion.data.film import MAX_FRAME_PIXELS
from mimicmotion.paths import near, printable

Fit = Literal["crop", "pad"]
FITS = ("crop", "pad")
# A side below this shows nobody that could be followed.
MIN_SIDE = 32


@dataclass(frozen=True, kw_only=True)
class Still:
    """A picture (H, W, 3) uint8 RGB and what was decided about it."""

    picture: np.ndarray
    notes: tuple[str, ...] = ()


def read_still(path: Path) -> Still:
    """The picture of a file. Raises ValueError where it is missing, no picture, cut short, or too large or small."""
    name = printable(path)
    if not path.is_file():
        raise ValueError(f"picture {name} is not there ({near(path, Path.is_file)}); give a picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is our own
            opened = Image.open(path)
        width, height = opened.size
        if width * height > MAX_FRAME_PIXELS:
            most = f"{MAX_FRAME_PIXELS:,}"
            raise ValueError(f"picture {name} is {width}x{height}, more than {most} pixels; shrink it first")
        if min(width, height) < MIN_SIDE:
            raise ValueError(f"picture {name} is {width}x{height}; give one of at least {MIN_SIDE} pixels a side")
        with opened:
            return _upright_rgb(opened)
    except UnidentifiedImageError as error:
        raise ValueError(f"picture {name} is no picture that can be read; give a PNG, JPEG or WebP") from error
    except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"picture {name} cannot be read: {error}; save it anew") from error


def from_pil(opened: Image.Image) -> Still:
    """The picture of an image that is open already, with the same choices."""
    return _upright_rgb(opened)


def _upright_rgb(opened: Image.Image) -> Still:
    notes = []
    if getattr(opened, "n_frames", 1) > 1:
        notes.append(f"is an animation of {getattr(opened, 'n_frames', 1)} pictures: the first is taken")
    turned = ImageOps.exif_transpose(opened)
    if opened.getexif().get(0x0112, 1) != 1:
        notes.append("is turned as its EXIF says")
    if turned.mode.startswith("I"):  # 16 bits a pixel, which PIL would clip to 255
        values = np.asarray(turned).clip(0, 65535)
        turned = Image.fromarray((values / (257 if values.max() > 255 else 1)).round().astype(np.uint8))
    if turned.has_transparency_data:
        seen = turned.convert("RGBA")
        under = Image.new("RGBA", seen.size, (255, 255, 255, 255))
        if np.asarray(seen)[..., 3].min() < 255:
            notes.append("is transparent: shown over white")
        profile = turned.info.get("icc_profile")
        turned = Image.alpha_composite(under, seen).convert("RGB")
        turned.info["icc_profile"] = profile
    turned = _in_screen_colors(turned, notes)
    return Still(picture=np.asarray(turned.convert("RGB")), notes=tuple(notes))


def _in_screen_colors(image: Image.Image, notes: list[str]) -> Image.Image:
    """An image of CMYK or with a colour profile in sRGB."""
    profile = image.info.get("icc_profile")
    if image.mode == "CMYK":
        notes.append(f"is CMYK: converted {'by its profile' if profile else 'without a profile'}")
    if not profile:
        return image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except ImageCms.PyCMSError:
        notes.append("has a colour profile that does not fit it: taken without")
        return image
    return image if converted is None else converted


def fitted(picture: np.ndarray, height: int, width: int, fit: Fit = "crop") -> np.ndarray:
    """A picture (H, W, 3) uint8 as (height, width, 3).

    crop: scaled until it covers the size and cut to its middle, as released. pad: scaled to fit in, black around it.
    """
    if fit not in FITS:
        raise ValueError(f"got fit {fit!r}, wanted one of {', '.join(FITS)}")
    scales = height / picture.shape[0], width / picture.shape[1]
    scale = max(scales) if fit == "crop" else min(scales)
    inner = [max(1, round(side * scale)) for side in picture.shape[:2]]
    inner = [max(a, b) if fit == "crop" else min(a, b) for a, b in zip(inner, (height, width), strict=True)]
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    resized = cv2.resize(picture, (inner[1], inner[0]), interpolation=way)
    top, left = abs(inner[0] - height) // 2, abs(inner[1] - width) // 2
    if fit == "crop":
        return np.ascontiguousarray(resized[top : top + height, left : left + width])
    padded = np.zeros((height, width, 3), dtype=np.uint8)
    padded[top : top + inner[0], left : left + inner[1]] = resized
    return padded
