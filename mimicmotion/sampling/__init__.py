"""Videos out: sampling, and what surrounds it."""
