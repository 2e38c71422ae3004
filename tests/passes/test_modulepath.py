import pytest
import torch
from torch import nn

from bsa_compile.passes.modulepath import clean, module_class, module_path, source_line

from .support import SDPA, Block, SelfAttention, Video, capture, latents, qualified_name


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        ("L['self']", ""),
        ("L['fn']", ""),
        ("G['model'].blocks.3", "blocks.3"),
        ("", ""),
        ("L['self'].blocks.0.attn", "blocks.0.attn"),
        ("L['self'].__dict__['_modules']['blocks'].0.attn", "blocks.0.attn"),
        ("L['self']._modules['blocks']._modules['0'].attn", "blocks.0.attn"),
        ("L['self']._modules['blocks']['0'].attn", "blocks.0.attn"),
        ("L['self'].blocks[0].attn", "blocks.0.attn"),
        ("L['self']._orig_mod.blocks.0.attn", "blocks.0.attn"),
        ("L['self'].blocks.0._checkpoint_wrapped_module.attn", "blocks.0.attn"),
        ("blocks.0.attn", "blocks.0.attn"),
    ],
)
def test_clean(spelling, expected):
    assert clean(spelling) == expected


def attention_nodes(module):
    return [n for n in module.graph.nodes if n.op == "call_function" and qualified_name(n.target) == SDPA]


def test_path_class_and_line_of_a_submodule():
    (node, *_) = attention_nodes(capture(Video(), latents()))
    assert module_path(node) == "blocks.0.attn"
    assert module_path(node, "transformer") == "transformer.blocks.0.attn"
    assert module_class(node).endswith("support.SelfAttention")
    file, _, line = source_line(node).rpartition(":")
    assert file.endswith("support.py")
    assert int(line) > 0


def test_the_root_itself_attends():
    """nn_module_stack is absent when the compiled root calls attention."""
    (node,) = attention_nodes(capture(SelfAttention(), torch.randn(1, 8, 32)))
    assert "nn_module_stack" not in node.meta
    assert module_path(node) == ""
    assert module_path(node, "blocks.2.attn") == "blocks.2.attn"
    assert module_class(node) == ""


def test_a_block_compiled_on_its_own_is_relative():
    (node,) = attention_nodes(capture(Block(), torch.randn(1, 8, 32)))
    assert module_path(node, "blocks.3") == "blocks.3.attn"


def test_a_wrapped_module():
    model = nn.Module()
    model._orig_mod = Block()
    model.forward = model._orig_mod.forward
    (node,) = attention_nodes(capture(model, torch.randn(1, 8, 32)))
    assert module_path(node) == "attn"
