"""Shapes at which a model's operations are compared and timed, and what one of them is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch
    from torch import Tensor

    Implementation = Callable[..., Any]


@dataclass(frozen=True)
class Shape:
    """Rows of packed documents under a recipe's model."""

    name: str
    recipe: str
    rows: tuple[tuple[int, ...], ...]
    """Document lengths of each row; all rows are equally long."""
    padding: int = 0
    """Tokens at a row's end that are no document's."""

    @property
    def row_tokens(self) -> int:
        return sum(self.rows[0]) + self.padding

    @property
    def tokens(self) -> int:
        return len(self.rows) * self.row_tokens


SHAPES = (
    Shape("8b_4k", "zaya1_8b", ((4096,),) * 8),
    Shape("8b_packed", "zaya1_8b", ((1, 63, 1000, 2047, 4099, 9001, 16557),)),
    Shape("8b_131k", "zaya1_8b", ((131_072,),)),
    Shape("8b_odd", "zaya1_8b", ((1, 2, 1000, 3003),)),
    Shape("smoke", "smoke_cpu", ((128,),) * 8),
    Shape("smoke_odd", "smoke_cpu", ((1, 40, 63, 21),)),
)
_CHECKED = ((1, 63, 1000, 984),)


def to_check(shape: Shape) -> Shape:
    """The shape at which back ends are compared with the reference in float64, whose scores and
    logits would not fit for many tokens."""
    few = shape.tokens <= sum(_CHECKED[0])
    return shape if few else Shape(shape.name, shape.recipe, _CHECKED)


@dataclass(frozen=True)
class Timed:
    """One operation at one shape."""

    op: str
    """Its key in `kernels`, and which part of it where there are several."""
    backends: Mapping[str, Implementation]
    call: Callable[[Implementation, Mapping[str, Tensor]], Sequence[Tensor]]
    """A back end on the inputs -> outputs."""
    inputs: Mapping[str, Tensor]
    """fp32; all of them get gradients."""
    operations: int
    """Of the forward pass: two for each multiply-add of its products, of an elementwise operation
    each sum, product and root. The fewest there can be, the same for every back end."""
    backward_factor: float = 2.0
    """Operations of the backward pass over those of the forward: the gradient of either factor of
    a product costs as much as the product."""
    wide: frozenset[str] = frozenset()
    """Inputs that are fp32 whatever the rest is."""
    differentiable: bool = True
    context_bytes: int = 0
    """Of what every pass reads besides: positions, rotation."""
    between: int = 0
    """Numbers of the compute type that every pass writes and reads besides, because something else
    happens to them in between."""
    handed_on: int = 0
    """Outputs, the first ones, that are inputs as they are: nobody writes them."""
    by_tokens: bool = True
    """Whether the shape's rows make a difference."""

    def rounded(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The inputs in the compute type."""
        return {name: x if name in self.wide else x.to(dtype) for name, x in self.inputs.items()}

    def work(self, inputs: Mapping[str, Tensor], outputs: Sequence[Tensor]) -> dict[str, Work]:
        """By pass: every tensor read or written once, and the operations."""
        read, written = bytes_of(inputs.values()), bytes_of(outputs)
        narrow = next(x for name, x in inputs.items() if name not in self.wide)
        besides = self.context_bytes + 2 * self.between * narrow.element_size()
        own = bytes_of(outputs[self.handed_on :])
        forward = Work(self.operations, read + own + besides)
        if not self.differentiable:
            return {"forward": forward}
        # Inputs and the outputs' gradients are read, the inputs' gradients written.
        operations = round(self.backward_factor * self.operations)
        backward = Work(operations, 2 * read + written + besides)
        both = Work(forward.operations + operations, forward.bytes + backward.bytes)
        return {"forward": forward, "backward": backward, "both": both}


@dataclass(frozen=True)
class Work:
    """The least that a pass has to do."""

    operations: int
    bytes: int


def bytes_of(tensors: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)
