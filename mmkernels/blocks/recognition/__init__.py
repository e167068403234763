"""Whether a block computes what a drop-in computes: its settings, how its forward reads, and what a probe measures."""
