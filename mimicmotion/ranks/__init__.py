"""Several processes: who is there, weights in parts, clips in parts, and one that is lost."""
