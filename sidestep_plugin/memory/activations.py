"""Memory of a decoder's activations: what autograd saves in a forward pass for the backward pass, in bytes.

The terms were read from the model's code and PEFT's, LyCORIS' and torch's forward functions, and agree with what
autograd really saves (tests/benchmarks/activation_memory.py; docs/memory.md has the error). They are for attention by
torch's scaled_dot_product_attention, which never keeps the matrix of scores on a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ..adapters.kinds import BY_NAME
from .sizes import DecoderSize

if TYPE_CHECKING:
    from .estimate import Settings

_OF_CONDITIONS: Final = frozenset({"cross_attn.k_proj", "cross_attn.v_proj"})
"""Linear layers whose inputs are the conditions, which need no gradient."""


def activation_bytes(size: DecoderSize, how: Settings, mask_bytes: int = 1) -> int:
    """Bytes that wait for the backward pass at the end of a forward pass, or, with checkpointing, that and the layer
    that is computed again.

    Args:
        mask_bytes: bytes of an entry of a dropout mask: 1 on a GPU, 4 on a CPU.
    """
    rows = how.batch_size * _positions(size, how)
    layer = _layer(size, how, mask_bytes)
    if how.checkpointing:
        # Each layer's input, and the time embedding that all of them share.
        return size.layers * rows * size.width * _width_of(how) + layer + _outside(size, how)
    return size.layers * layer + _outside(size, how)


def working_bytes(size: DecoderSize, how: Settings) -> int:
    """Bytes of the intermediate results that exist at once in the backward pass of a layer, beside what was saved."""
    rows = how.batch_size * _positions(size, how)
    # Gradients of the MLP's three intermediates, and fp32 ones of the hidden states around a norm.
    gradients = rows * (3 * size.feed_forward * _width_of(how) + 8 * size.width)
    if not BY_NAME[how.kind].whole_difference:
        return gradients
    # The fp32 product of a LoKr's factors, and its gradient.
    return max(gradients, 8 * max((one * other for one, other in size.targets(how.targets).values()), default=0))


def _width_of(how: Settings) -> int:
    """Bytes of a number that a linear layer returns."""
    return 2 if how.mixed else 4


def _copies_weights(how: Settings) -> bool:
    """Whether autocast keeps a bf16 copy of each frozen weight for the backward pass."""
    return how.mixed and how.frozen == "fp32"


def _positions(size: DecoderSize, how: Settings) -> int:
    """Length of the sequence that the layers see."""
    return -(-how.trained_frames // size.patch)


def _layer(size: DecoderSize, how: Settings, mask_bytes: int) -> int:
    rows, tokens, e = how.batch_size * _positions(size, how), how.batch_size * how.tokens, _width_of(how)
    norms = 4 * (3 * rows * size.width + 2 * rows * size.queries + rows * size.keys + tokens * size.keys)
    # Queries, keys, values and the result of the self attention; queries and result, keys and values of the other one.
    # Keys and values are repeated for each head of the queries.
    attention = e * (4 * rows + 2 * rows + 2 * tokens) * size.queries + 4 * 2 * rows * size.heads
    feed_forward = 3 * rows * size.feed_forward * e
    weights = 0
    if _copies_weights(how):
        # Weights whose whole difference is computed are counted with the adapter.
        adapted = size.targets(how.targets) if BY_NAME[how.kind].whole_difference else {}
        weights = 2 * sum(
            outputs * inputs
            for name, (outputs, inputs) in size.layer_linears.items()
            if name not in adapted and name not in _OF_CONDITIONS
        )
    return norms + attention + feed_forward + weights + _adapter(size, rows, tokens, how, mask_bytes)


def _adapter(size: DecoderSize, rows: int, tokens: int, how: Settings, mask_bytes: int) -> int:
    """What the adapter of one layer saves."""
    e, saved = _width_of(how), 0
    dropout = how.dropout and BY_NAME[how.kind].dropout
    targets = size.targets(how.targets)
    if BY_NAME[how.kind].whole_difference:
        # The difference in the type of the product, autocast's copy of the base weight, which stays fp32 for LyCORIS,
        # and the inputs, which layers with the same input share.
        for name, (outputs, inputs) in targets.items():
            copy = 2 if how.mixed and name not in _OF_CONDITIONS else 0
            saved += (e + copy) * outputs * inputs
        return saved + e * sum(_rows(name, rows, tokens) * inputs for name, inputs in _inputs(size, how).items())
    for name, (outputs, inputs) in targets.items():
        length = _rows(name, rows, tokens)
        # PEFT casts the input to the adapter's type, and autocast casts it back: a copy for each adapted layer.
        if how.mixed or dropout:
            saved += length * inputs * e
        if dropout and name not in _OF_CONDITIONS:
            saved += length * inputs * mask_bytes
        saved += length * how.rank * e
        if how.mixed:
            saved += 2 * how.rank * (outputs + inputs)  # bf16 copies of the adapter's own weights
    if not how.mixed and not dropout:
        saved += e * sum(_rows(name, rows, tokens) * inputs for name, inputs in _inputs(size, how).items())
    return saved


def _inputs(size: DecoderSize, how: Settings) -> dict[str, int]:
    """One adapted layer for each different input that adapted layers have, with its width.

    The conditions are the same tensor in every layer, and are counted outside; what o_proj gets is the result of the
    attention, which is counted there.
    """
    same = {f"self_attn.{name}_proj": "self_attn.q_proj" for name in "kv"} | {"mlp.up_proj": "mlp.gate_proj"}
    return {
        same.get(name, name): inputs
        for name, (_, inputs) in size.targets(how.targets).items()
        if name not in _OF_CONDITIONS and not name.endswith("o_proj")
    }


def _rows(name: str, rows: int, tokens: int) -> int:
    """How many vectors go through a linear layer."""
    return tokens if name in _OF_CONDITIONS else rows


def _outside(size: DecoderSize, how: Settings) -> int:
    positions, e = _positions(size, how), _width_of(how)
    rows = how.batch_size * positions
    longest = max(positions, how.tokens)
    masks = e * (2 * positions * positions + longest * longest)
    ends = e * rows * (size.patch * (size.channels + size.audio) + size.width)
    conditions = e * how.batch_size * how.tokens * size.width if _OF_CONDITIONS & set(size.targets(how.targets)) else 0
    weights = 2 * size.patch * size.width * (size.channels + size.audio) if _copies_weights(how) else 0
    return masks + ends + 4 * rows * size.width + conditions + weights + 2 * e * positions * size.head_dim
