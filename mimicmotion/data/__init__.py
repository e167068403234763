"""Footage to training clips: videos, poses, curation, cached latents and the dataset."""
