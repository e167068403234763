"""A launch of a Triton kernel as a value, so that a tool without a GPU can run it as well."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class Launch(NamedTuple):
    """A kernel, the number of its programs (all on grid axis x), its arguments and compile-time constants."""

    kernel: Any
    num_programs: int
    positional: list[Any]
    constants: dict[str, Any]

    def on(self, device: torch.device) -> None:
        """Run it on a CUDA device."""
        with torch.cuda.device(device):
            self.kernel[(self.num_programs,)](*self.positional, **self.constants)
