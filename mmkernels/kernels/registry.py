"""Every backend of every family of kernels, in the order in which they are preferred; imported when first asked.

A backend is a module with `why_unsupported(call) -> str | None` and what its family launches. Here stands what can be
said without importing it: the kind of device it is for, and why it is not installed. The last of a family may be
`formula`, plain torch: it takes everything, and is taken where nobody else takes the call.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mmkernels.kernels.installed import why_no_cuda, why_no_native, why_no_triton

if TYPE_CHECKING:
    from mmkernels.kernels.call import Call

FORMULA = "formula"


@dataclass(frozen=True)
class Backend:
    """One way to compute a family's calls. module: under mmkernels.kernels. device: "" for every kind."""

    module: str
    device: str = ""
    why_absent: Callable[[], str | None] = lambda: None

    def why_unsupported(self, call: Call) -> str | None:
        """Why it does not take the call, or None where it does."""
        if self.device not in ("", call.device):
            return f"{self.module} is for {self.device}, the tensors are on {call.device}"
        return self.why_absent() or self.loaded.why_unsupported(call)

    @cached_property
    def loaded(self) -> Any:
        """The module."""
        return importlib.import_module(f"mmkernels.kernels.{self.module}")


FAMILIES: dict[str, Mapping[str, Backend]] = {
    "attention": {
        "cpu": Backend("attention.cpu", "cpu"),
        "flash": Backend("attention.flash", "cuda"),
        "cudnn": Backend("attention.cudnn", "cuda"),
        "efficient": Backend("attention.efficient", "cuda"),
    },
    "adamw8bit": {
        "triton": Backend("adamw8bit.triton", "cuda", why_no_triton),
    },
    "geglu": {
        "pass": Backend("geglu_product.two_passes"),
        "epilogue": Backend("geglu_product.triton", "cuda", why_no_triton),
    },
    "temporal_attention": {
        "native": Backend("temporal_attention.native", "cpu", why_no_native),
        "triton": Backend("temporal_attention.triton", "cuda", why_no_triton),
        "cuda": Backend("temporal_attention.cuda", "cuda", why_no_cuda),
        "library": Backend("temporal_attention.library", "cuda"),
        FORMULA: Backend("temporal_attention.formula"),
    },
    "layer_norm": {
        "native": Backend("layer_norm.native", "cpu", why_no_native),
        "triton": Backend("layer_norm.triton", "cuda", why_no_triton),
        FORMULA: Backend("layer_norm.formula"),
    },
    "geglu_pass": {
        "native": Backend("geglu.native", "cpu", why_no_native),
        "triton": Backend("geglu.triton", "cuda", why_no_triton),
        FORMULA: Backend("geglu.formula"),
    },
    "column_sums": {
        "triton": Backend("column_sums.triton", "cuda", why_no_triton),
        FORMULA: Backend("column_sums.formula"),
    },
    "epilogue": {
        "triton": Backend("epilogue.triton", "cuda", why_no_triton),
        FORMULA: Backend("epilogue.formula"),
    },
    "blend": {
        "triton": Backend("blend.triton", "cuda", why_no_triton),
        FORMULA: Backend("blend.formula"),
    },
    "group_norm_tokens": {
        "triton": Backend("group_norm_tokens.triton", "cuda", why_no_triton),
        FORMULA: Backend("group_norm_tokens.formula"),
    },
    "group_norm": {
        "native": Backend("group_norm.native", "cpu", why_no_native),
        "triton": Backend("group_norm.triton", "cuda", why_no_triton),
        FORMULA: Backend("group_norm.formula"),
    },
    "group_norm_silu_conv": {
        "chunked": Backend("convolution.chunked"),
        "triton": Backend("convolution.triton", "cuda", why_no_triton),
        "cuda": Backend("convolution.cuda", "cuda", why_no_cuda),
    },
}
