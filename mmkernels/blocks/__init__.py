"""Drop-in modules for the blocks of diffusers' Stable Video Diffusion UNet, with the same parameter names."""
