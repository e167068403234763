"""How this project writes a .safetensors: whole tensors, any new file's rights, what is said beside them as text."""

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor


def save_tensor_file(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors by name, with the file's rights by umask: safetensors alone makes files for their owner only."""
    path.touch()
    rights = path.stat().st_mode & 0o777
    plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    safetensors.torch.save_file(plain, path, metadata={"format": "pt", **(metadata or {})})
    path.chmod(rights)
