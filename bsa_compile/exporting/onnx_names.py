"""Walks an ONNX graph with the graphs inside it, and tells which module of the exported model a node comes from."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir


def module_path(nodes: Sequence[ir.Node]) -> str:
    """Path of the module that a node comes from, as far as the exporter wrote it down; "" for the root or unknown."""
    for node in nodes:
        for read in (_from_scopes, _from_namespace):
            path = read(node)
            if path is not None:
                return path
    return next((path for node in nodes if (path := _from_name(node.name or ""))), "")


def module_class(nodes: Sequence[ir.Node]) -> str:
    """Qualified name of the class of that module, "" where unknown."""
    return next((name for node in nodes if (name := _innermost(node, "pkg.torch.onnx.class_hierarchy"))), "")


def _from_scopes(node: ir.Node) -> str | None:
    """The paths of the modules on the way to a node."""
    return _innermost(node, "pkg.torch.onnx.name_scopes")


def _innermost(node: ir.Node, key: str) -> str | None:
    """What torch's exporter writes of the module, in a list from the root on, whose last item is the node itself."""
    text = node.metadata_props.get(key)
    try:
        items = ast.literal_eval(text) if text else None
    except (SyntaxError, ValueError):
        return None
    return str(items[-2]) if isinstance(items, list) and len(items) >= 2 else None


def _from_namespace(node: ir.Node) -> str | None:
    """`namespace`: the same, each with its class, as `path: class/path: class/name: operator`."""
    text = node.metadata_props.get("namespace")
    parts = [part.partition(":")[0].strip() for part in text.split("/")] if text else []
    return parts[-2] if len(parts) >= 2 else None


def _from_name(name: str) -> str:
    """`/blocks.0/attn/MatMul_1`, as TorchScript's exporter names nodes."""
    return ".".join(part for part in name.split("/")[:-1] if part) if "/" in name else ""


def all_nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    """The nodes of a graph and of the graphs inside its nodes, in the order of execution."""
    for node in graph:
        for inner in subgraphs(node):
            yield from all_nodes(inner)
        yield node


def subgraphs(node: ir.Node) -> list[ir.Graph]:
    """The graphs inside a node."""
    found = []
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type.name == "GRAPH":
            found.append(attribute.as_graph())
        elif attribute.type.name == "GRAPHS":
            found.extend(attribute.as_graphs())
    return found
