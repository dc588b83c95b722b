"""Views of tensors in the form [batch, heads, tokens, width], and the outputs that go with them."""

from __future__ import annotations

from torch import Tensor


def with_four_dimensions(tensor: Tensor) -> Tensor:
    """[..., tokens, width] as [batch, heads, tokens, width]: a view wherever strides allow it."""
    if tensor.dim() == 4:
        return tensor
    while tensor.dim() < 4:
        tensor = tensor.unsqueeze(0)
    return tensor.flatten(0, -4)


def as_small_as_it_is(mask: Tensor) -> Tensor:
    """A mask with those dimensions one along which it is expanded, which PyTorch and a plan would take for full."""
    for dim, stride in enumerate(mask.stride()):
        if stride == 0 and mask.shape[dim] > 1:
            mask = mask.narrow(dim, 0, 1)
    return mask


def mask_with_four_dimensions(mask: Tensor, leading: tuple[int, ...]) -> Tensor:
    """A mask that broadcasts to [*leading, queries, keys] in four dimensions, each full or one."""
    mask = mask[(None,) * (len(leading) + 2 - mask.dim())]
    if len(leading) > 2 and any(size != 1 for size in mask.shape[:-3]):
        mask = mask.expand(*leading[:-1], *mask.shape[-3:])
    return with_four_dimensions(mask)


def new_output(query: Tensor, value: Tensor) -> Tensor:
    """An empty [batch, heads, queries, value width] in value's dtype, with tokens before heads in memory where query
    has them so: a layer then reads it as [batch, tokens, channels] without a copy."""
    batch, heads, queries, _ = query.shape
    if query.stride(2) > query.stride(1):
        return value.new_empty(batch, queries, heads, value.shape[-1]).transpose(1, 2)
    return value.new_empty(batch, heads, queries, value.shape[-1])


def rows_of(mask: Tensor, rows: slice) -> Tensor:
    """The rows of a mask, where it has them."""
    return mask if mask.shape[-2] == 1 else mask[..., rows, :]
