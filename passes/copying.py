"""Copies of graph modules that share parameters and buffers with the original and keep every node's metadata."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import fx


def copy_graph(module: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """A graph module with a graph of its own, and the new node of each old one.

    Parameters, buffers and submodules are the original's own objects. Whatever tracers attach to a graph module
    (`meta`, `shape_env`, `_param_name_to_source`, ...) is carried along.
    """
    nodes: dict[fx.Node, fx.Node] = {}
    graph = fx.Graph(tracer_cls=module.graph._tracer_cls)
    copied = graph.graph_copy(module.graph, nodes, return_output_node=True)
    if copied is not None:
        value, old = cast(tuple[Any, fx.Node], copied)
        new = graph.output(value, type_expr=old.type)
        new.meta = copy.copy(old.meta)
        nodes[old] = new
    for old, new in nodes.items():
        # AOTAutograd reads where each input comes from off the node itself, which Graph.graph_copy leaves behind.
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source  # type: ignore[attr-defined]
    graph.set_codegen(copy.copy(module.graph._codegen))
    result = fx.GraphModule(module, graph, class_name=module._get_name())
    for kind in ("_parameters", "_buffers", "_modules"):
        own = getattr(result, kind)
        for name, value in getattr(module, kind).items():
            own.setdefault(name, value)
    for name, value in module.__dict__.items():
        if name not in result.__dict__:
            result.__dict__[name] = value
    result.meta = dict(module.meta)
    return result, nodes


def set_submodule(module: torch.nn.Module, target: str, value: torch.nn.Module) -> None:
    """Put `value` at `target` without touching containers that the original module shares."""
    first, _, rest = target.partition(".")
    if rest:
        container = module._modules.get(first)
        shallow = torch.nn.Module() if container is None else copy.copy(container)
        shallow._modules = dict(shallow._modules)
        set_submodule(shallow, rest, value)
        value = shallow
    module._modules[first] = value


def with_module(program: torch.export.ExportedProgram, module: fx.GraphModule) -> torch.export.ExportedProgram:
    """The program with another graph module, whose inputs and outputs bear the same names."""
    with no_copy_warnings():
        return program._update(module, program.graph_signature)


@contextmanager
def no_copy_warnings() -> Iterator[None]:
    """Without what torch 2.13 warns of when it copies programs of its own, in the block."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        yield
