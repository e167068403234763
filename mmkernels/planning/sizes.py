"""Sizes of what Stable Video Diffusion works on."""

LATENT_STRIDE = 8  # pixels a side of one latent pixel, of the VAE
SIDE_PIXELS = LATENT_STRIDE * 8  # a side is a multiple of: the UNet halves latents three times


def parse_size(size: str) -> tuple[int, int]:
    """Width and height, in pixels, of "1024x576". Raises ValueError for anything else."""
    width, _, height = size.partition("x")
    if not (width.isdigit() and height.isdigit()) or int(width) % SIDE_PIXELS or int(height) % SIDE_PIXELS:
        raise ValueError(f"got size {size!r}, wanted width x height, sides by {SIDE_PIXELS} pixels, such as 1024x576")
    return int(width), int(height)
