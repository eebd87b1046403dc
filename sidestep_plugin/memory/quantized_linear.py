"""A linear layer whose frozen weight is stored in one byte per value. Imports torch, so it is imported when needed.

Each row of the weight has a scale of its own (symmetric, weight only). The layer computes in the type of its input, or
in autocast's. Only the bytes are kept for the backward pass, which multiplies them out again: torchao and
optimum-quanto keep a copy in bf16 for it, or fail where ACE-Step's loop casts the decoder (docs/memory.md).
"""

from __future__ import annotations

from typing import Any, Final

import torch

LARGEST: Final = {"int8": 127.0}
"""The largest number that each type holds."""


class QuantizedLinear(torch.nn.Linear):
    """A frozen ``torch.nn.Linear`` with its weight in one byte per value. It has no weight that could be trained.

    Args:
        layer: the layer to take the place of; it is left as it is. Weight [out,in], bias [out] or none.
        kind: "int8".

    Attributes:
        data: the quantized weight [out,in], int8, which no cast of a whole model changes.
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
        self.data: torch.Tensor
        self.scale: torch.Tensor
        self.register_buffer("data", values.round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        product: Any = _Product.apply  # torch has no types for it
        result: torch.Tensor = product(input.to(dtype), self.data, self.scale)
        return result if self.bias is None else result + self.bias.to(dtype)


def dequantized(data: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight [out,in] that a layer computes with."""
    return data.to(dtype) * scale.to(dtype)


class _Product(torch.autograd.Function):
    """input · weightᵀ, which keeps the weight's bytes for the backward pass and nothing else."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, data: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(data, scale)
        return torch.nn.functional.linear(input, dequantized(data, scale, input.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = gradients
        data, scale = ctx.saved_tensors
        return gradient.matmul(dequantized(data, scale, gradient.dtype)), None, None
