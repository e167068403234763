"""Shapes that the benchmarks run at; the defaults are those of the README's figures."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class TemporalShape:
    """B clips of F frames of height x width latent pixels, C channels in N heads."""

    batch: int = 1
    frames: int = 72
    height: int = 24
    width: int = 40
    channels: int = 320
    heads: int = 5

    def __post_init__(self) -> None:
        if min(self.batch, self.frames, self.height, self.width, self.channels, self.heads) < 1:
            raise ValueError(f"every size must be at least 1, got {asdict(self)}")
        if self.channels % self.heads:
            raise ValueError(f"channels must be a multiple of heads, got {self.channels} and {self.heads}")

    @property
    def pixels(self) -> int:
        """P, latent pixels of a frame."""
        return self.height * self.width

    @property
    def tokens(self) -> tuple[int, int, int]:
        """Size of a tensor (B*F, P, C)."""
        return self.batch * self.frames, self.pixels, self.channels

    @property
    def head_dim(self) -> int:
        """D, channels of a head."""
        return self.channels // self.heads

    def as_row(self) -> dict[str, int]:
        """Sizes by name, for the JSON row."""
        return asdict(self)

    def __str__(self) -> str:
        return f"B={self.batch} F={self.frames} P={self.height}x{self.width} C={self.channels} N={self.heads}"
