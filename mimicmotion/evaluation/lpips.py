"""LPIPS (Zhang et al. 2018), AlexNet: how far apart two pictures look.

With the activations x_l of AlexNet's five layers, each divided by its length over channels, and the learnt weights w_l
of a channel: the sum over layers of the mean over pixels of sum_c w_lc (x_lc - y_lc)^2. Pictures in [-1, 1].
The weights w_l come with torchmetrics; those of AlexNet are torchvision's file, given by its path or downloaded.
"""

from pathlib import Path

import torch
import torchmetrics.functional.image
from torch import Tensor, nn

from mimicmotion.data.cache import file_sha256

DOWNLOAD = "download"
URL = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
# LPIPS shifts and scales what is in [-1, 1]; it is ImageNet's normalisation of what is in [0, 1].
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
# Of the convolutions: index among torchvision's features, channels in and out, kernel, stride, padding.
CONVOLUTIONS = (
    (0, 3, 64, 11, 4, 2), (3, 64, 192, 5, 1, 2), (6, 192, 384, 3, 1, 1), (8, 384, 256, 3, 1, 1), (10, 256, 256, 3, 1, 1)
)  # fmt: skip
LEAST_SIDE = 63  # below it nothing is left of a picture before the last layer
FRAMES_AT_ONCE = 8


class Lpips:
    """Distances of pictures, with the digest of AlexNet's file."""

    def __init__(self, weights: dict[str, Tensor], heads: list[Tensor], sha256: str) -> None:
        """weights: "features.N.weight" and ".bias" as torchvision names them. heads: (C,) of each layer."""
        self.sha256 = sha256
        self._layers = nn.ModuleList()
        for index, channels, out, kernel, stride, padding in CONVOLUTIONS:
            layer = nn.Conv2d(channels, out, kernel, stride, padding)
            names = {part: f"features.{index}.{part}" for part in ("weight", "bias")}
            if missing := [name for name in names.values() if name not in weights]:
                raise ValueError(f"the LPIPS backbone lacks {', '.join(missing)}; give torchvision's AlexNet ({URL})")
            try:
                layer.load_state_dict({part: weights[name].float() for part, name in names.items()})
            except RuntimeError as error:
                raise ValueError(f"the LPIPS backbone is no AlexNet ({error}); give torchvision's ({URL})") from error
            self._layers.append(layer.requires_grad_(False))
        self._heads = heads

    @classmethod
    def load(cls, given: str) -> "Lpips":
        """From AlexNet's file, or "download". Raises ValueError where it is another file, OSError without a network."""
        if given == DOWNLOAD:
            torch.hub.load_state_dict_from_url(URL, map_location="cpu", check_hash=True, weights_only=True)
            path = Path(torch.hub.get_dir(), "checkpoints", URL.rpartition("/")[2])
        else:
            path = Path(given)
        if not path.is_file():
            raise ValueError(
                f"--backbones.lpips: {path} is not there; give torchvision's AlexNet ({URL}) or {DOWNLOAD!r}"
            )
        return cls(_read(path), _heads(), file_sha256(path))

    @torch.no_grad()
    def __call__(self, generated: Tensor, truth: Tensor) -> float:
        """Mean over frames (F, 3, H, W) in [-1, 1]."""
        if min(truth.shape[2:]) < LEAST_SIDE:
            raise ValueError(f"LPIPS needs {LEAST_SIDE} pixels a side, got {tuple(truth.shape)}")
        parts = zip(generated.split(FRAMES_AT_ONCE), truth.split(FRAMES_AT_ONCE), strict=True)
        return float(torch.cat([self._distances(one, other) for one, other in parts]).double().mean())

    def _distances(self, one: Tensor, other: Tensor) -> Tensor:
        total = torch.zeros(len(one))
        for x, y, head in zip(self._activations(one), self._activations(other), self._heads, strict=True):
            total += ((_unit(x) - _unit(y)).square() * head.view(1, -1, 1, 1)).sum(dim=1).mean(dim=(1, 2))
        return total

    def _activations(self, pictures: Tensor) -> list[Tensor]:
        shift, scale = (torch.tensor(values).view(1, 3, 1, 1) for values in (SHIFT, SCALE))
        x, found = (pictures.float().cpu().clamp(-1, 1) - shift) / scale, []
        for number, layer in enumerate(self._layers):
            if number in (1, 2):
                x = nn.functional.max_pool2d(x, 3, 2)
            x = layer(x).relu()
            found.append(x)
        return found


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises what its readers raise, of many kinds
        raise ValueError(
            f"{path} is no file of weights ({type(error).__name__}); give torchvision's ({URL})"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__} and no weights by name; give torchvision's ({URL})")
    return found


def _heads() -> list[Tensor]:
    """LPIPS's learnt weights of each layer, (C,), as torchmetrics carries them."""
    path = Path(torchmetrics.functional.image.__file__).parent / "lpips_models" / "alex.pth"
    heads = _read(path)
    return [heads[f"lin{layer}.model.1.weight"].flatten().float() for layer in range(len(CONVOLUTIONS))]
