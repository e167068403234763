"""The parts of bench/verify_gpu.py, each a process of its own, and what they share: device, record, page."""
