"""`torch.export` programs: rewritten before decomposition, still runnable, saved and loaded."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim, export

from bsa_compile.passes import rewrite
from bsa_compile.policy import BSAPolicy

from .support import ALL, ATEN_SDPA, HALF, Block, Opaque, Video, count, latents, ops, outcomes, text_of

AUTO = ({2: Dim.AUTO, 3: Dim.AUTO, 4: Dim.AUTO}, None)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("strict", "dynamic"), [(True, False), (False, True)], ids=["strict", "dynamic"])
def test_rewritten_and_still_runnable(strict, dynamic):
    model, video, text = Video().eval(), latents(3, 4, 6), text_of(72)
    with torch.no_grad():
        program = export(model, (video, text), strict=strict, dynamic_shapes=AUTO if dynamic else None)
        before = str(program.graph)
        after, report = rewrite(program, ALL)
        assert outcomes(report) == [
            ("blocks.0.attn", "self", "rewritten"),
            ("blocks.0.cross", "cross", "cross_attention"),
            ("blocks.1.attn", "self", "rewritten"),
            ("blocks.1.cross", "cross", "cross_attention"),
        ]
        assert str(program.graph) == before
        assert isinstance(after, torch.export.ExportedProgram)
        assert count(after.graph_module, "bsa::attend") == count(after.graph_module, ATEN_SDPA) == 2
        assert after.state_dict.keys() == program.state_dict.keys()
        module = after.module()
        close(module(video, text), model(video, text))
        if dynamic:
            grid = next(n for n in after.graph.nodes if n.target is torch.ops.bsa.attend.default).args[5]
            assert all(isinstance(size, torch.fx.Node) for size in grid)
            other = latents(2, 6, 8)
            close(module(other, text), model(other, text))
        again, second = rewrite(after, ALL)
        assert again is after
        assert not second.rewritten


def test_saved_and_loaded():
    model, video = Video(depth=1).eval(), latents()
    with torch.no_grad():
        program, _ = rewrite(export(model, (video,)), HALF)
        expected = program.module()(video)
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        buffer.seek(0)
        close(torch.export.load(buffer).module()(video), expected)
        close(program.run_decompositions().module()(video), expected)


def test_attention_as_the_output_keeps_the_signature():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch = nn.Conv3d(4, 32, (1, 2, 2), (1, 2, 2))

        def forward(self, video):
            x = self.patch(video).flatten(2).transpose(1, 2).unflatten(-1, (2, 16)).transpose(1, 2)
            return {"out": F.scaled_dot_product_attention(x, x, x), "x": x}

    model, video = Bare().eval(), latents()
    with torch.no_grad():
        program = export(model, (video,))
        after, _ = rewrite(program, ALL)
        assert after.graph_signature.user_outputs == program.graph_signature.user_outputs
        got, expected = after.module()(video), model(video)
        close(got["out"], expected["out"])


def test_the_graph_module_alone():
    program = export(Video(depth=1), (latents(),))
    after, report = rewrite(program.graph_module, ALL)
    assert outcomes(report) == [("blocks.0.attn", "self", "rewritten")]
    assert after is not program.graph_module
    assert all("val" in n.meta for n in after.graph.nodes if n.op == "call_function")
    same, _ = rewrite(program, BSAPolicy.dense())
    assert same is program


def test_after_decomposition_it_is_too_late_and_said_so():
    with torch.no_grad():
        program = export(Video(depth=1).eval(), (latents(),)).run_decompositions()
    after, report = rewrite(program, ALL)
    assert after is program
    assert [s.reason for s in report.sites] == ["opaque"]
    assert "run_decompositions" in report.sites[0].detail


def test_regions():
    def call(block, x, text):
        with torch.autocast("cpu", torch.bfloat16):
            return block(x).float()

    model, video = Video(depth=1, call=call).eval(), latents()
    with torch.no_grad():
        program = export(model, (video,))
        assert any("wrap_with_autocast" in name for name in ops(program.graph_module))
        after, report = rewrite(program, ALL)
        assert outcomes(report) == [("blocks.0.attn", "self", "rewritten")]
        torch.testing.assert_close(after.module()(video), model(video), atol=3e-2, rtol=3e-2)


def test_multihead_attention():
    """Export looks into the module: it is opaque only where it is spelt out, to give its weights."""
    model, video = Video(Block(Opaque())).eval(), latents()
    with torch.no_grad():
        after, report = rewrite(export(model, (video,)), ALL)
        assert [s.reason for s in report.sites] == ["rewritten"]
        close(after.module()(video), model(video))
        model.blocks[0].attn.need_weights = True
        _, report = rewrite(export(model, (video,)), ALL)
    assert [(s.reason, s.op) for s in report.sites] == [("opaque", "matmul-softmax-matmul")]


def test_a_given_grid_cannot_be_guarded():
    """Nothing checks sizes when an exported block runs: a fixed grid for symbolic tokens is refused."""
    program = export(Block(), (text_of(96),), dynamic_shapes=({1: Dim.AUTO},))
    with pytest.raises(Exception, match="must hold as many tokens"):
        rewrite(program, ALL, (4, 4, 6))


def test_a_policy_that_compares_symbolic_sizes_says_so():
    program = export(Video(depth=1), (latents(),), dynamic_shapes=AUTO[:1])
    _, report = rewrite(program, BSAPolicy(min_tokens=8))
    assert [s.reason for s in report.sites] == ["rewritten"]
    assert any("sizes exported with" in note for note in report.notes)
