"""Through torch's own convolution or products, chunk by chunk.

A chunk of the input is normalised and activated into a scratch of `chunk_rows` pixels, then convolved. A 3x3 walks over
whole samples, a 3x1 too where one fits a chunk, else over columns of pixels with all their frames. On the CPU the
products are float32 whatever the storage, and a 3x1 runs as one matrix product for each tap on shifted views of the
scratch. On a GPU a 3x1 is cuDNN's convolution in three dimensions, what lies inside of a chunk takes the place of its
result where it can, and all that is added to a convolution is added in one pass.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmkernels.costs import device_kind
from mmkernels.kernels import group_norm
from mmkernels.kernels.call import Call
from mmkernels.kernels.convolution.inputs import Added, Inputs, Wants
from mmkernels.kernels.epilogue import add_into
from mmkernels.kernels.group_norm.norm import Rows, at
from mmkernels.rows import chunks_of_tokens, num_sharing
from mmkernels.scratch import Buffers, scratch_rows

# Pixels of a chunk on the CPU: enough to pay for oneDNN's reordering of the weights and, with several threads, for
# adding up each one's gradient of them.
_CPU_CHUNK_ROWS = 5760
# A 3x1 on the CPU reorders nothing: its scratch lies in the cache, and fewer rows for a thread slow the products down.
_PRODUCTS_CHUNK_BYTES, _PRODUCTS_MIN_ROWS = 3 << 19, 1536


def why_unsupported(call: Call) -> str | None:
    """It takes everything."""
    return None


def product_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """What the products are computed in: float32 (float64 for a float64 x) on the CPU, the weights' dtype elsewhere."""
    return torch.promote_types(x.dtype, torch.float32) if device_kind(x) == "cpu" else weight.dtype


def default_chunk_rows(x: Tensor, weight: Tensor) -> int:
    """Pixels of a chunk where the caller names none."""
    if _is_products(x, weight):
        row_bytes = weight.shape[1] * product_dtype(x, weight).itemsize
        return max(_PRODUCTS_MIN_ROWS * num_sharing("cpu"), _PRODUCTS_CHUNK_BYTES // row_bytes)
    if device_kind(x) == "cpu":
        return _CPU_CHUNK_ROWS
    # Forward's scratch and output, or backward's and the gradient by it; less a scratch that has its place in y or dx.
    K, C = weight.shape[:2]
    width = max(K if K == C else K + C, C if x.shape[3] == C else 2 * C)
    rows = scratch_rows(width * weight.element_size())
    if weight.shape[3] == 1 and rows < x.shape[1] * x.shape[2]:  # columns have no place there, and dy is copied
        rows = scratch_rows((2 * C + K) * weight.element_size())
    return rows


def forward(inputs: Inputs, added: Added, y: Tensor, chunk_rows: int) -> None:
    """Write y."""
    x, weight = inputs.x, inputs.weight
    dtype = product_dtype(x, weight)
    chunks, most_columns = _chunks(x, weight, chunk_rows)
    convolution = _convolution(x, weight.to(dtype), most_columns)
    is_cpu, inner_bias = device_kind(x) == "cpu", None
    if is_cpu and added.bias is not None:  # its convolution adds the bias in passing
        inner_bias, added = added.bias.to(dtype), added._replace(bias=None)
    for rows in chunks:
        part, target = inputs.of(rows), at(y, rows)
        is_free = not is_cpu and y.dtype == dtype and y.shape[3] == weight.shape[1] and target.is_contiguous()
        group_norm.activate(part.x, part.x2, part.norm, convolution.scratch(part.x, target if is_free else None))
        out = convolution.forward(inner_bias)
        add_into(out, *added.of(rows), target)
        del out  # or it would be there beside the next one


def backward(
    inputs: Inputs, dy: Tensor, dx: Tensor, dx2: Tensor | None, chunk_rows: int, wants: Wants
) -> tuple[Tensor, Tensor, Tensor]:
    """Write dx and dx2; returns dgamma, dbeta and dweight, added up over chunks at least in float32."""
    x, x2, norm, weight = inputs
    dtype = product_dtype(x, weight)
    chunks, most_columns = _chunks(x, weight, chunk_rows)
    convolution = _convolution(x, weight.to(dtype), most_columns)
    dgamma, dbeta = (torch.zeros_like(norm.gamma) for _ in range(2))
    whole: Tensor | None = None  # a chunk of whole samples needs none: its norm is differentiated at once
    is_in_columns = _is_products(x, weight) or _columns_at_once(x, weight, chunk_rows) < x.shape[2]
    if wants.data and is_in_columns:
        whole = dx if x2 is None else torch.empty((*x.shape[:3], weight.shape[1]), dtype=x.dtype, device=x.device)
    for rows in chunks:
        part, place = inputs.of(rows), None
        # A whole sample's gradient is written last: until then its place holds the activation.
        if wants.data and whole is None and x2 is None and dx.dtype == dtype and at(dx, rows).is_contiguous():
            place = at(dx, rows)
        activation = convolution.scratch(part.x, place)
        if wants.weight:  # only its gradient reads the activation
            group_norm.activate(part.x, part.x2, part.norm, activation)
        da = convolution.backward(at(dy, rows), wants)
        if whole is not None:
            at(whole, rows).copy_(da)
        elif wants.data:
            part_dx2 = None if dx2 is None else at(dx2, rows)
            sums = group_norm.norm_backward(part.x, part.x2, da, part.norm, at(dx, rows), part_dx2)
            dgamma += sums[0]
            dbeta += sums[1]
        del da
    if whole is not None:
        dgamma, dbeta = group_norm.norm_backward(x, x2, whole, norm, dx, dx2)
    return dgamma, dbeta, convolution.weight_gradient()


def _columns_at_once(x: Tensor, weight: Tensor, chunk_rows: int) -> int:
    """Columns of a chunk, each with all its rows: W and more are whole samples, as many as they make."""
    H, W = x.shape[1:3]
    columns = max(1, chunk_rows // H)
    if weight.shape[3] == 3:
        return max(columns, W)
    return min(columns, W) if _is_products(x, weight) else columns


def _chunks(x: Tensor, weight: Tensor, chunk_rows: int) -> tuple[list[Rows], int]:
    """Samples and columns of each chunk, with all rows; and the columns of the largest, of all its samples."""
    found, most_columns = chunks_of_tokens(x[:, 0], _columns_at_once(x, weight, chunk_rows))
    return [(samples, slice(0, x.shape[1]), columns) for samples, columns, _ in found], most_columns


def _convolution(x: Tensor, weight: Tensor, most_columns: int) -> _Convolution | _ShiftedProducts:
    buffers = Buffers(x, weight.dtype, most_columns)  # a row of them is a column of the picture
    return (_ShiftedProducts if _is_products(x, weight) else _Convolution)(weight, buffers)


def _is_products(x: Tensor, weight: Tensor) -> bool:
    """Whether the convolution runs as products: a 3x1 over frames on the CPU."""
    return weight.shape[3] == 1 and device_kind(x) == "cpu"


class _Convolution:
    """torch's convolution of one chunk after the other; weight (K, C, 3, 3) or (K, C, 3, 1).

    A 3x1 goes in three dimensions, over frames and a picture of the pixels: cuDNN's kernels for that are up to twice as
    fast as its conv2d. Everything is handed over channels last, as its strides say also where an axis has length 1.
    """

    def __init__(self, weight: Tensor, buffers: Buffers) -> None:
        self.buffers, self.is_3d = buffers, weight.shape[3] == 1
        self.weight = self._channels_first(weight.permute(0, 2, 3, 1).contiguous())
        self.wide = torch.promote_types(weight.dtype, torch.float32)
        self.padding = [1, 0, 0] if self.is_3d else [1, 1]
        self.activation = weight  # the chunk's scratch, once there is one
        self.dweight: Tensor | None = None

    def scratch(self, part: Tensor, memory: Tensor | None = None) -> Tensor:
        """An uninitialised (m, H, W, C) for the activation of a chunk: `memory`, or the same for each chunk."""
        (m, H, W), C = part.shape[:3], self.weight.shape[1]
        if memory is None:
            memory = self.buffers.take("activation", m * W, H * C).view(m, H, W, C)
        self.activation = memory
        return memory

    def forward(self, bias: Tensor | None) -> Tensor:
        """(m, H, W, K) of the chunk in the scratch."""
        ones, zeros = [1] * len(self.padding), [0] * len(self.padding)
        a = self._channels_first(self.activation)
        return self._channels_last(torch.convolution(a, self.weight, bias, ones, self.padding, ones, False, zeros, 1))

    def backward(self, dy: Tensor, wants: Wants) -> Tensor:
        """The gradient (m, H, W, C) of the chunk's activation, if wanted; adds up that of the weights."""
        dy = self._channels_first(dy.to(self.weight.dtype).contiguous())  # columns are copied, once for both
        # One after the other, so that the two results are not there at once.
        if wants.weight:
            dw = self._gradient(dy, [False, True, False])[1]
            self.dweight = dw if self.dweight is None else self.dweight.to(self.wide).add_(dw)
            del dw
        if not wants.data:
            return self.activation
        return self._channels_last(self._gradient(dy, [True, False, False])[0]).contiguous()

    def _gradient(self, dy: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
        ones, zeros = [1] * len(self.padding), [0] * len(self.padding)
        return torch.ops.aten.convolution_backward(
            dy, self._channels_first(self.activation), self.weight, None,
            ones, self.padding, ones, False, zeros, 1, wanted,
        )  # fmt: skip

    def weight_gradient(self) -> Tensor:
        """The sum over the chunks, at least float32 where there are several, shaped as the weight."""
        if self.dweight is None:
            return torch.zeros_like(self.weight[..., 0] if self.is_3d else self.weight, dtype=self.wide)
        return self.dweight[..., 0] if self.is_3d else self.dweight

    def _channels_first(self, x: Tensor) -> Tensor:
        """A dense (m, H, W, C) as torch takes it, a view: (m, C, H, W), or (m, C, H, h, w) with W pixels as h x w."""
        if not self.is_3d:
            return x.permute(0, 3, 1, 2)
        m, H, W, C = x.shape
        return x.view(m, H, *_sides(W), C).permute(0, 4, 1, 2, 3)

    def _channels_last(self, x: Tensor) -> Tensor:
        """What torch gives as (m, H, W, C)."""
        return x.permute(0, 2, 3, 4, 1).flatten(2, 3) if self.is_3d else x.permute(0, 2, 3, 1)


def _sides(pixels: int) -> tuple[int, int]:
    """Height and width of a picture of so many pixels, as square as may be."""
    width = next(n for n in range(math.isqrt(pixels), 0, -1) if pixels % n == 0)
    return pixels // width, width


class _ShiftedProducts:
    """A 3x1 over frames as one product for each tap: frame f of the chunk's output reads frames f, f + 1, f + 2 of a
    scratch (H + 2, W, C) whose first and last frame are zero, so each tap is a contiguous view of it."""

    def __init__(self, weight: Tensor, buffers: Buffers) -> None:
        self.buffers, self.taps = buffers, weight[..., 0].permute(2, 0, 1).contiguous()  # (3, K, C)
        self.frames = (0, 0)
        self.dtaps = torch.zeros_like(self.taps)

    def scratch(self, part: Tensor, _: Tensor | None = None) -> Tensor:
        """An uninitialised (1, H, W, C) for the activation of a chunk of one sample; the same memory for each."""
        self.frames = (part.shape[1], part.shape[2])
        return self._padded("activation", self.taps.shape[2])[1:-1][None]

    def forward(self, bias: Tensor | None) -> Tensor:
        """(1, H, W, K) of the chunk in the scratch."""
        y = self._rows("y", self.taps.shape[1])
        first, *others = (self._shifted("activation", tap, self.taps.shape[2]) for tap in range(3))
        if bias is None:
            torch.mm(first, self.taps[0].t(), out=y)
        else:
            torch.addmm(bias, first, self.taps[0].t(), out=y)
        for rows, tap in zip(others, self.taps[1:], strict=True):
            y.addmm_(rows, tap.t())
        return y.view(1, *self.frames, -1)

    def backward(self, dy: Tensor, wants: Wants) -> Tensor:
        """The gradient (1, H, W, C) of the chunk's activation, if wanted; adds up that of the weights."""
        K, C = self.taps.shape[1:]
        self._padded("dy", K)[1:-1].copy_(dy[0])
        da, rows_dy = self._rows("da", C), self._shifted("dy", 1, K)
        for tap in range(3):
            if wants.weight:
                self.dtaps[tap].addmm_(rows_dy.t(), self._shifted("activation", tap, C))
            if wants.data:
                shifted = self._shifted("dy", 2 - tap, K)
                torch.addmm(da, shifted, self.taps[tap], beta=int(tap > 0), out=da)
        return da.view(1, *self.frames, C)

    def weight_gradient(self) -> Tensor:
        """The sum over the chunks, (K, C, 3, 1)."""
        return self.dtaps.permute(1, 2, 0)[..., None].contiguous()

    def _padded(self, name: str, width: int) -> Tensor:
        H, W = self.frames
        padded = self._memory(name, H + 2, width)
        padded[0] = padded[-1] = 0
        return padded

    def _shifted(self, name: str, tap: int, width: int) -> Tensor:
        H, W = self.frames
        return self._memory(name, H + 2, width)[tap : tap + H].view(H * W, width)

    def _rows(self, name: str, width: int) -> Tensor:
        return self._memory(name, self.frames[0], width).view(-1, width)

    def _memory(self, name: str, frames: int, width: int) -> Tensor:
        W = self.frames[1]
        return self.buffers.take(name, W, frames * width).view(frames, W, width)
