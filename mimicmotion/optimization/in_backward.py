"""Updates inside backward: each weight moves as soon as its gradient is there, and the gradient is freed at once.

So at no time do all gradients exist (LOMO, Lv et al. 2023, arXiv 2306.09782, and PyTorch's tutorial on the optimizer
step in backward). The global norm that clipping divides by is known only after the last gradient; LOMO runs backward
twice for it. Here each gradient g_k is scaled by what is known when it arrives,

    s_k = c / max(c, n, S_k),   S_k = sqrt(|g_1|^2 + ... + |g_k|^2),

c the limit, n the norm of the last step that was used (0 before the first), S_k the norm of this step so far. While
this step's norm N = S_last is at most n, every s_k is c / max(c, n): one factor for the whole gradient, never more
than plain clipping's c / max(c, N), and the same where N = n. Where N grows past M = max(c, n), the norm that is
applied is at most c sqrt(1 + 2 ln(N / M)), since the terms |g_k|^2 / S_k^2 past M sum to at most a logarithm: 3.9 c
for a thousandfold norm.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from mimicmotion.config import Config


class InBackward:
    """Hooks on parameters that clip, update and free each gradient; `finish()` after each backward.

    A gradient that is not finite is never used: its parameter and all that come after it in that backward stay as they
    are, and `norm()` is not finite. What came before has moved. Each gradient's norm is read by the host, which waits
    for the device once a parameter.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], update: Callable[[str], None], *, max_grad_norm: float
    ) -> None:
        """update: moves one parameter, by its name, by the gradient it has."""
        self._update, self._max_grad_norm = update, max_grad_norm
        self.last_norm = 0.0  # of the last step that was used
        self._squares = 0.0
        self._arrived: set[str] = set()
        for name, parameter in parameters.items():
            parameter.register_post_accumulate_grad_hook(self._hook(name))

    def norm(self) -> float:
        """2-norm of the gradients of this backward so far, before clipping."""
        return math.sqrt(self._squares)

    def refuse(self) -> None:
        """Use no gradient of this step."""
        self._squares = math.nan

    @property
    def has_begun(self) -> bool:
        """Whether weights of a step that is not finished may have moved."""
        return bool(self._arrived)

    def drop(self) -> None:
        """Forget a step that is not finished, its norm too."""
        self._squares = 0.0
        self._arrived.clear()

    def finish(self) -> None:
        """End a step: its norm is what the next one is clipped by, unless it is not finite."""
        if math.isfinite(self._squares):
            self.last_norm = self.norm()
        self.drop()

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def arrived(parameter: Tensor) -> None:
            if name in self._arrived:
                raise RuntimeError(f"the gradient of {name} came in two parts; turn optimizer.in_backward off.")
            self._arrived.add(name)
            gradient = parameter.grad
            assert gradient is not None
            norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
            self._squares += 1.0 if isinstance(norm, FakeTensor) else float(norm) ** 2  # a fake one has no value
            if math.isfinite(self._squares):
                gradient.mul_(self._max_grad_norm / max(self._max_grad_norm, self.last_norm, self.norm()))
                self._update(name)
            parameter.grad = None

        return arrived


def check_one_backward(config: Config, num_ranks: int) -> None:
    """Raise ValueError where updates in backward are asked for and a step has more than one, of more ranks or clips."""
    batch, micro = config.trainer.batch_size, config.trainer.micro_batch_size
    if config.optimizer.in_backward and (num_ranks > 1 or batch > micro):
        raise ValueError(
            f"optimizer.in_backward updates from one backward of one rank; got {num_ranks} rank(s), "
            f"trainer.batch_size {batch} and trainer.micro_batch_size {micro}. Give one rank and equal sizes."
        )
