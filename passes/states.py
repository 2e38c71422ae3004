"""What the analysis knows: origins of tokens, the state of a tensor, and the attention calls found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from torch import fx

from .calls import qualified_name
from .match import Match
from .modulepath import source_line
from .sizes import Size
from .tracks import Track


@dataclass(frozen=True)
class Origin:
    """Where tokens come from.

    Attributes:
        name: the node, with the path of the subgraph it is in.
        dim: dimension of a graph input; -1 for a patch embedding.
        extent: number of tokens.
        grid: (T, H, W) of a patch embedding, None for an input.
    """

    name: str
    dim: int
    extent: Size
    grid: tuple[Size, Size, Size] | None = None

    def __str__(self) -> str:
        return f"patch embedding {self.name}" if self.grid else f"input {self.name}, dimension {self.dim}"


@dataclass(frozen=True)
class State:
    """What is known of one tensor.

    Attributes:
        tokens: origin -> where its tokens lie.
        lost: origin -> the operator at which their order became unknown.
        projected: whether a linear map, convolution or attention lies between the graph's inputs and this tensor.
    """

    tokens: dict[Origin, Track] = field(default_factory=dict)
    lost: dict[Origin, str] = field(default_factory=dict)
    projected: bool = False

    @property
    def constant(self) -> bool:
        """Whether no origin had any influence."""
        return not self.tokens and not self.lost


EMPTY = State()
States: TypeAlias = State | tuple[State, ...]


@dataclass(frozen=True)
class Found:
    """An attention call and what is known of its operands.

    Attributes:
        path: names of the calls that lead to the subgraph the node is in.
        node: the attention call.
        match: how it was called.
        q, k: states of the operands.
        q_changed, k_changed: where the operand's token order last stopped being the raster order, "" if it did not.
        sealed: whether it lies in a region that must not change.
    """

    path: tuple[str, ...]
    node: fx.Node
    match: Match
    q: State
    k: State
    q_changed: str = ""
    k_changed: str = ""
    sealed: bool = False


def where(node: fx.Node) -> str:
    """An operator and its source line, for messages."""
    name = str(node.target) if node.op != "call_function" else qualified_name(node.target)
    line = source_line(node)
    return f"{name.rpartition('::' if '::' in name else '.')[2]}" + (f" ({line})" if line else "")
