"""What latents a run is trained on, told by digests: what a checkpoint keeps, and what has changed since."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from mimicmotion.data.cache import Clip, Manifest

_SHORT = 16  # hexadecimal digits of a digest
_ELSEWHERE = ("source", "statistics")  # where a video lies and what curation thought of it change no latent


@dataclass(frozen=True, kw_only=True)
class FootageIdentity:
    """encoder: what made the latents, as the manifest names it; clips: a digest of what each one follows from."""

    encoder: str
    encoder_version: str = ""
    clips: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, manifest: Manifest) -> "FootageIdentity":
        """Of a prepared folder."""
        made_by = [manifest.encoder_version, manifest.pose_backend, manifest.pose_version]
        made_by += [str(manifest.height), str(manifest.width)]
        return cls(
            encoder=manifest.encoder_name,
            encoder_version=manifest.encoder_version,
            clips={clip.clip_id: _digest(clip, made_by) for clip in manifest.clips},
        )

    def document(self) -> dict[str, Any]:
        """As JSON values."""
        return {"name": self.encoder, "version": self.encoder_version, "clips": dict(self.clips)}

    def changes_since(self, before: Mapping[str, Any]) -> list[str]:
        """What to say where `before`, a checkpoint's document, knew other clips or another build of the encoder.

        Raises ValueError where another encoder made the latents: the weights know nothing of those.
        """
        version = before.get("version", self.encoder_version)  # checkpoints of earlier versions know names alone
        clips = before.get("clips", self.clips)
        if version != self.encoder_version and before["name"] != self.encoder:
            raise ValueError(
                f"the checkpoint was trained on latents of {before['name']}, and the prepared clips are of "
                f"{self.encoder}; prepare them with that encoder, or start a run of its own"
            )
        notes = []
        if version != self.encoder_version:
            notes.append(f"{self.encoder} was of version {version} and is of {self.encoder_version} now")
        if clips != self.clips:
            gone, new = clips.keys() - self.clips.keys(), self.clips.keys() - clips.keys()
            made_anew = [name for name in clips.keys() & self.clips.keys() if clips[name] != self.clips[name]]
            notes.append(
                f"the clips differ from the checkpoint's {len(clips)}: {len(gone)} gone, {len(new)} new, "
                f"{len(made_anew)} made anew; from here on samples are others than without the interruption"
            )
        return notes


def _digest(clip: Clip, made_by: list[str]) -> str:
    fields = {name: value for name, value in asdict(clip).items() if name not in _ELSEWHERE}
    return hashlib.sha256(json.dumps([made_by, fields], sort_keys=True).encode()).hexdigest()[:_SHORT]
