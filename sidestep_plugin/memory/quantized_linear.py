"""A linear layer whose frozen weight is stored in one byte per value. Imports torch, so it is imported when needed.

Each row of the weight has a scale of its own (symmetric, weight only). The layer computes in the type of its input, or
in autocast's. Only the bytes are kept for the backward pass, which multiplies them out again: torchao and
optimum-quanto keep a copy in bf16 for it, or fail where ACE-Step's loop casts the decoder (docs/less-memory.md).
"""

from __future__ import annotations

from typing import Any, Final

import torch

LARGEST: Final = {"int8": 127.0, "fp8": 448.0}
"""The largest number that each type holds; fp8 is ``torch.float8_e4m3fn``."""


class QuantizedLinear(torch.nn.Linear):
    """A frozen ``torch.nn.Linear`` with its weight in int8 or fp8. It has no weight that could be trained.

    Args:
        layer: the layer to take the place of; it is left as it is. Weight [out,in], bias [out] or none.
        kind: "int8" or "fp8".

    Attributes:
        data: the quantized weight [out,in], int8, or the bytes of fp8 as uint8, so that no cast of a whole model to
            another floating-point type changes them.
        scale: the scale of each row [out,1], float32.
    """

    def __init__(self, layer: torch.nn.Linear, kind: str) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        del self.weight
        self.kind = kind
        self.bias = layer.bias
        weight = layer.weight.detach().float()
        scale = weight.abs().amax(dim=1, keepdim=True) / LARGEST[kind]
        # Rounded before it is used, so that its rounding when computing in bf16 is no further error.
        scale = scale.to(torch.bfloat16).float().clamp(min=2.0**-100)
        values = (weight / scale).clamp(-LARGEST[kind], LARGEST[kind])
        data = values.round().to(torch.int8) if kind == "int8" else values.to(torch.float8_e4m3fn).view(torch.uint8)
        self.register_buffer("data", data)
        self.register_buffer("scale", scale)

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [out,in] that the layer computes with."""
        return _dequantized(self.data, self.scale, dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        result: torch.Tensor = _Product.apply(input.to(dtype), self.data, self.scale)
        return result if self.bias is None else result + self.bias.to(dtype)


def _dequantized(data: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    values = data if data.dtype == torch.int8 else data.view(torch.float8_e4m3fn)
    return values.to(dtype) * scale.to(dtype)


class _Product(torch.autograd.Function):
    """input · weightᵀ, which keeps the weight's bytes for the backward pass and nothing else."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, data: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(data, scale)
        return torch.nn.functional.linear(input, _dequantized(data, scale, input.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = gradients
        data, scale = ctx.saved_tensors
        return gradient.matmul(_dequantized(data, scale, gradient.dtype)), None, None
