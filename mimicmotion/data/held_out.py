"""Which clips are never trained on: whole source videos, so that no clip is judged that lies beside a trained one."""

import hashlib
import math
from collections.abc import Sequence

from mimicmotion.data.cache import Clip


def split(clips: Sequence[Clip], share: float, seed: int) -> tuple[list[str], list[str]]:
    """Names of the clips that are trained on, and of those that are held out, by a share of the source videos.

    Rounded down: of a few videos none is given away for a small share. Which ones follows from the seed and each
    video's content, so a resumed run has the same, whatever the order of the manifest.
    """
    ranked = sorted({clip.source_sha256 for clip in clips}, key=lambda sha256: _rank(sha256, seed))
    number = min(len(ranked) - 1, math.floor(share * len(ranked)))
    held_out = set(ranked[:number])
    names = [(clip.clip_id, clip.source_sha256 in held_out) for clip in clips]
    return [name for name, is_held in names if not is_held], [name for name, is_held in names if is_held]


def _rank(sha256: str, seed: int) -> str:
    return hashlib.sha256(f"{seed} {sha256}".encode()).hexdigest()
