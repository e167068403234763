"""The copies in which a stretch of a video is kept: as filmed, in larger crops drawn at random, and each mirrored.

Latents are made once and kept, so what changes pictures is drawn here and not while training.
"""

from dataclasses import dataclass

import numpy as np

from mimicmotion.data.cache import Crop
from mimicmotion.data.crop import jittered_crop
from mimicmotion.data.footage import VideoProperties
from mimicmotion.data.recipe import Recipe


@dataclass(frozen=True)
class Variant:
    """One copy; suffix is what its name ends in."""

    suffix: str
    crop: Crop
    is_mirrored: bool


def variants(recipe: Recipe, crop: Crop, sha256: str, first_row: int, properties: VideoProperties) -> list[Variant]:
    """The copies of a stretch, the one as filmed in `crop` first.

    Jittered crops follow from the video's content, the stretch's first frame and their number. Where the picture leaves
    them no room there are none.
    """
    crops = {crop: ""}
    for number in range(1, recipe.num_jittered + 1):
        random = np.random.default_rng([int(sha256[:16], 16), first_row, number])
        crops.setdefault(jittered_crop(crop, properties.height, properties.width, random), f"-jittered{number}")
    return [
        Variant(f"{suffix}{'-mirrored' * is_mirrored}", one, is_mirrored)
        for one, suffix in crops.items()
        for is_mirrored in ((False, True) if recipe.with_mirrored else (False,))
    ]
