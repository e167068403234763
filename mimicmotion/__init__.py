"""The MimicMotion trainer: footage in, a pose-driven video model out."""
