"""Ways to run the temporal attention core: q, k, v (B, F, P, N, D) in, (B, F, P, N, D) out, contiguous both ways."""

from collections.abc import Callable
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from bench import harness
from bench.attention_libraries import LIBRARIES, Library, attention, why_no_library
from bench.harness import Outputs, Provider
from bench.shapes import TemporalShape
from mmkernels.ops.temporal_attention import temporal_attention

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def permuted_copies(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """permute + SDPA + permute, each permute made a copy: what frames-last layouts pay."""
    B, F, P, N, D = q.shape
    q, k, v = (x.permute(0, 2, 3, 1, 4).contiguous().view(B * P, N, F, D) for x in (q, k, v))
    o = scaled_dot_product_attention(q, k, v)  # (B*P, N, F, D)
    return o.view(B, P, N, F, D).permute(0, 3, 1, 2, 4).contiguous()


def permuted_views(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The same with the inputs read by stride: only the result is copied back. Batches take a copy (reshape)."""
    B, F, P, N, D = q.shape
    q, k, v = (x.permute(0, 2, 3, 1, 4).reshape(B * P, N, F, D) for x in (q, k, v))
    o = scaled_dot_product_attention(q, k, v)  # (B*P, N, F, D)
    return o.reshape(B, P, N, F, D).permute(0, 3, 1, 2, 4).contiguous()


def by_library(name: Library, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """A library's attention, which reads (B*P, F, N, D) by stride: only the result is copied back."""
    B, F, P, N, D = q.shape
    q, k, v = (x.permute(0, 2, 1, 3, 4).reshape(B * P, F, N, D) for x in (q, k, v))
    o = attention(name)(q, k, v)
    return o.view(B, P, F, N, D).permute(0, 2, 1, 3, 4).contiguous()


class Core:
    """Inputs of one run, and its providers in the two modes."""

    def __init__(self, shape: TemporalShape, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        size = (shape.batch, shape.frames, shape.pixels, shape.heads, shape.head_dim)
        self.q, self.k, self.v, self.do = (
            torch.randn(size, generator=generator).to(device, dtype).requires_grad_(index < 3) for index in range(4)
        )
        self.skipped: dict[str, str] = {}
        self.compiled: tuple[Attention, float] | None = None  # and the seconds it took

    def run(self, attention: Attention, mode: str) -> Outputs:
        """Run once: o, and in mode `both` dq, dk, dv."""
        return self._run(attention, mode, self.q, self.k, self.v, self.do)

    def plain(self, mode: str) -> Outputs:
        """Plain torch in the dtype of the run: its error is the budget of the gate."""
        return self.run(permuted_copies, mode)

    def exact(self, mode: str) -> Outputs:
        """The same in float64."""
        q, k, v = (x.detach().double().requires_grad_() for x in (self.q, self.k, self.v))
        return self._run(permuted_copies, mode, q, k, v, self.do.double())

    def providers(self, mode: str, compile_limit_s: float = 0.0) -> list[Provider]:
        """Every way that this device and installation have; the reasons for the others are in `skipped`."""
        if self.compiled is None and "compile" not in self.skipped:
            self._compile(compile_limit_s)
        ways: dict[str, tuple[Attention, str]] = {
            "torch": (permuted_copies, "permute copies of q, k, v + SDPA + permute copy of o"),
            "torch-strided": (permuted_views, "SDPA on permuted views (B=1) + permute copy of o"),
        }
        if self.compiled is not None:
            function, compile_s = self.compiled
            ways["compile"] = (function, f"torch.compile of torch; compiled in {compile_s:.0f} s")
        for name in LIBRARIES:
            if (reason := why_no_library(name, self.q.device, self.q.dtype)) is not None:
                self.skipped[name] = reason
            else:
                ways[name] = (partial(by_library, name), f"{name}'s attention on permuted views + permute copy of o")
        ways["fused"] = (temporal_attention, "mmkernels.temporal_attention: frames read by stride, no copies")
        return [
            Provider(name=name, step=lambda way=way: self.run(way, mode), includes=includes)
            for name, (way, includes) in ways.items()
        ]

    def _compile(self, limit_s: float) -> None:
        function = torch.compile(permuted_copies)
        took_s, reason = harness.compile_time_s(lambda: self.run(function, "both"), limit_s)
        if reason is not None:
            self.skipped["compile"] = reason
        else:
            self.compiled = function, took_s

    @staticmethod
    def _run(
        attention: Attention, mode: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, do: torch.Tensor
    ) -> Outputs:
        o = attention(q, k, v)
        if mode == "forward":
            return {"o": o.detach()}
        dq, dk, dv = torch.autograd.grad(o, (q, k, v), do)
        return {"o": o.detach(), "dq": dq, "dk": dk, "dv": dv}
