"""A workflow as a graph: nodes by id, whose inputs are values or links to other nodes' outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeGuard

from chromarpc.comfyui.problems import Problem, Unmapped, cut

_REROUTES: Final = frozenset({"Reroute", "Reroute (rgthree)"})
"""Nodes that hand on what their one input gets."""
_PRIMITIVES: Final[Mapping[str, str]] = {
    # Nodes that hold one value, and under which input.
    "PrimitiveNode": "value",
    "PrimitiveInt": "value",
    "PrimitiveFloat": "value",
    "PrimitiveString": "value",
    "PrimitiveStringMultiline": "value",
    "PrimitiveBoolean": "value",
    "INTConstant": "value",
    "FloatConstant": "value",
    "StringConstant": "string",
    "Seed (rgthree)": "seed",
}
_LARGEST: Final = 1e300
_LARGEST_WHOLE: Final = 2**53
"""Up to here a float is the whole number that it shows."""


@dataclass(frozen=True)
class Node:
    """One node."""

    id: str
    class_type: str
    inputs: Mapping[str, Any] = field(repr=False)

    @property
    def label(self) -> str:
        """What people are told it is."""
        return f"node {cut(self.id)} ({cut(self.class_type)})"

    def problem(self, input_name: str, reason: str) -> Problem:
        """Something of it that cannot be mapped."""
        return Problem(self.id, self.class_type, input_name, reason)

    def unmapped(self, input_name: str, reason: str) -> Unmapped:
        """The same, to be raised."""
        return Unmapped(self.problem(input_name, reason))


@dataclass(frozen=True)
class Output:
    """What a link leads to: one of a node's outputs, by its index."""

    node: Node
    index: int


@dataclass(frozen=True)
class Graph:
    """The nodes of one workflow."""

    nodes: Mapping[str, Node] = field(repr=False)

    def source(self, node: Node, name: str) -> Output:
        """The output that an input is linked to, behind all reroutes.

        Raises:
            Unmapped: it is not linked, or its link leads nowhere or in a circle.
        """
        if name not in node.inputs:
            raise node.unmapped(name, "is missing")
        output = self._linked(node, name)
        if output is None:
            raise node.unmapped(name, "is no link to another node")
        return output

    def is_linked(self, node: Node, name: str) -> bool:
        """Whether an input comes from another node."""
        return is_link(node.inputs.get(name))

    def text(self, node: Node, name: str) -> str:
        """An input's text.

        Raises:
            Unmapped: it has none.
        """
        value = self._value(node, name)
        if not isinstance(value, str):
            raise node.unmapped(name, f"must be text, is {_shown(value)}")
        return value

    def whole(self, node: Node, name: str) -> int:
        """An input's whole number.

        Raises:
            Unmapped: it has none.
        """
        value = self._value(node, name)
        if isinstance(value, float) and value.is_integer() and abs(value) <= _LARGEST_WHOLE:
            return int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise node.unmapped(name, f"must be a whole number, is {_shown(value)}")
        return value

    def number(self, node: Node, name: str) -> float:
        """An input's finite number.

        Raises:
            Unmapped: it has none.
        """
        value = self._value(node, name)
        if not is_number(value):
            raise node.unmapped(name, f"must be a number, is {_shown(value)}")
        return float(value)

    def flag(self, node: Node, name: str) -> bool:
        """An input's true or false.

        Raises:
            Unmapped: it has none.
        """
        value = self._value(node, name)
        if not isinstance(value, bool):
            raise node.unmapped(name, f"must be true or false, is {_shown(value)}")
        return value

    def _value(self, node: Node, name: str) -> Any:
        if name not in node.inputs:
            raise node.unmapped(name, "is missing")
        at, held = node, name
        seen: set[str] = set()
        while (output := self._linked(at, held)) is not None:
            at = output.node
            if at.id in seen:
                raise node.unmapped(name, "its links lead in a circle")
            seen.add(at.id)
            if at.class_type not in _PRIMITIVES:
                raise node.unmapped(name, f"comes from {at.label}, whose value is not known here")
            held = _PRIMITIVES[at.class_type]
        return at.inputs.get(held)

    def _linked(self, node: Node, name: str) -> Output | None:
        """What an input is linked to; None where it is a value."""
        value = node.inputs.get(name)
        seen: set[str] = set()
        while is_link(value):
            node_id, index = f"{value[0]}", value[1]
            found = self.nodes.get(node_id)
            if found is None:
                raise node.unmapped(name, f"is linked to node {cut(node_id)}, which is not there")
            if found.class_type not in _REROUTES:
                return Output(found, index)
            if node_id in seen:
                raise node.unmapped(name, "its links lead in a circle")
            seen.add(node_id)
            value = next((each for each in found.inputs.values() if is_link(each)), None)
            if value is None:
                raise node.unmapped(name, f"is linked to {found.label}, which has no input")
        return None


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value is a finite number, and none that no float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST


def is_link(value: Any) -> TypeGuard[list[Any]]:
    """Whether an input's value is a link: a node's id and the index of one of its outputs."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], str | int)
        and isinstance(value[1], int)
        and not isinstance(value[0], bool)
        and not isinstance(value[1], bool)
    )


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, str | bool | float):
        return cut(f"{value!r}")
    return "a number" if isinstance(value, int) else f"a {type(value).__name__}"
