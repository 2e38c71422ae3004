"""Which attention is self-attention over the video, and which is not: by where tokens come from, never by sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from bsa_compile.passes import rewrite
from bsa_compile.policy import BSAPolicy

from .support import (
    ALL,
    HEADS,
    WIDTH,
    SelfAttention,
    Video,
    latents,
    outcomes,
    reasons,
    report_of,
    text_of,
)


def test_a_text_as_long_as_the_video_is_not_the_video():
    report = report_of(Video(), latents(), text_of(96))
    assert outcomes(report) == [
        ("blocks.0.attn", "self", "rewritten"),
        ("blocks.0.cross", "cross", "cross_attention"),
        ("blocks.1.attn", "self", "rewritten"),
        ("blocks.1.cross", "cross", "cross_attention"),
    ]
    assert "input l_text_" in report.sites[1].detail


def test_another_video_of_the_same_size_is_not_the_video():
    class Two(Video):
        def __init__(self):
            super().__init__(depth=1)
            self.other = nn.Conv3d(4, WIDTH, (1, 2, 2), (1, 2, 2))

        def forward(self, video, control):
            x, y = (conv(z).flatten(2).transpose(1, 2) for conv, z in ((self.patch, video), (self.other, control)))
            return self.blocks[0](x, y) + self.blocks[0](x + y)

    report = report_of(Two(), latents(), latents())
    assert reasons(report) == ["rewritten", "cross_attention", "rewritten"]


def test_text_tokens_that_attend_to_themselves_beside_a_video():
    class Refined(Video):
        def __init__(self):
            super().__init__(depth=1)
            self.refine = SelfAttention()

        def forward(self, video, text):
            return super().forward(video, self.refine(text))

    report = report_of(Refined(), latents(), text_of(96))
    assert outcomes(report) == [
        ("refine", "self", "not_video"),
        ("blocks.0.attn", "self", "rewritten"),
        ("blocks.0.cross", "cross", "cross_attention"),
    ]
    policy = BSAPolicy(sparsity=0.0, on_unsupported="error")
    assert reasons(report_of(Refined(), latents(), text_of(96), policy=policy)) == reasons(report)


def test_text_and_video_in_one_sequence():
    class Joint(Video):
        def forward(self, video, text):
            x = torch.cat([text, self.patch(video).flatten(2).transpose(1, 2)], dim=1)
            x = self.blocks[0](x)
            return self.blocks[1](x[:, text.shape[1] :])

    report = report_of(Joint(), latents(), text_of(7))
    assert reasons(report) == ["mixed_sequence", "rewritten"]
    assert "7 + 96" in report.sites[0].detail


def test_joint_attention_of_two_streams():
    class Streams(SelfAttention):
        def forward(self, x, text):
            n = text.shape[1]
            qkv = torch.cat([self.qkv(text), self.qkv(x)], dim=1).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            out = F.scaled_dot_product_attention(*qkv.unbind(0)).transpose(1, 2).flatten(2)
            return self.proj(out[:, n:]), out[:, :n]

    class Model(Video):
        def __init__(self):
            super().__init__(SelfAttention())
            self.joint = Streams()

        def forward(self, video, text):
            x = self.patch(video).flatten(2).transpose(1, 2)
            x, text = self.joint(x, text)
            return self.blocks[0](x) + text.mean()

    report = report_of(Model(), latents(), text_of(7))
    assert outcomes(report) == [("joint", "self", "mixed_sequence"), ("blocks.0", "self", "rewritten")]


# -- token order ------------------------------------------------------------------------------------------------------


def rolled(x):
    return x.roll(5, 1)


def flipped(x):
    return x.flip(1)


def windowed(x):
    return x.view(1, 4, 2, 2, 6, WIDTH).transpose(1, 2).reshape(2, 48, WIDTH)


def framewise(x):
    return x.reshape(4, 24, WIDTH)


def over_time(x):
    return x.view(4, 24, WIDTH).transpose(0, 1)


def sorted_by_score(x):
    return x[:, x.mean(-1)[0].argsort()]


def padded(x):
    return F.pad(x, (0, 0, 0, 4))


def every_other(x):
    return x[:, ::2]


ORDERS = {
    "roll": (rolled, "roll"),
    "flip": (flipped, "flip"),
    "windows": (windowed, "transpose"),
    "frames": (framewise, ""),
    "time": (over_time, "transpose"),
    "sort": (sorted_by_score, "argsort"),
    "pad": (padded, "pad"),
    "stride": (every_other, "getitem"),
}


@pytest.mark.parametrize(("order", "named"), ORDERS.values(), ids=ORDERS)
def test_other_orders_are_not_the_raster_order(order, named):
    class Reordered(Video):
        def forward(self, video):
            return self.blocks[0](order(self.patch(video).flatten(2).transpose(1, 2)))

    report = report_of(Reordered(SelfAttention()), latents())
    (site,) = report.sites
    assert site.reason == "unknown_grid"
    if named:
        assert f"token order of the queries is lost at {named} (" in site.detail
        assert "test_sequences.py" in site.detail
    else:
        assert site.detail == "each row attends to a part of the tokens"


def test_an_order_that_is_undone():
    """Windows around the MLP, raster order around attention; and a residual that was never out of order."""

    class Windowed(Video):
        def forward(self, video):
            x = self.patch(video).flatten(2).transpose(1, 2)
            y = self.blocks[0].mlp(windowed(x)).view(1, 2, 4, 2, 6, WIDTH).transpose(1, 2).reshape(x.shape)
            x = self.blocks[0](y)
            return self.blocks[1](x + rolled(x))

    report = report_of(Windowed(), latents())
    assert reasons(report) == ["rewritten", "rewritten"]


def test_modulation_by_frame():
    """View to [B, T, HW, C] and back, as LongCat does around its modulation."""

    class Modulated(Video):
        def forward(self, video, scale):
            x = self.patch(video)
            b, c, t = x.shape[:3]
            x = x.flatten(2).transpose(1, 2)
            x = (x.view(b, t, -1, c) * (scale.unsqueeze(2) + 1)).view(b, -1, c)
            return self.blocks[0](x)

    report = report_of(Modulated(depth=1), latents(), torch.randn(1, 4, WIDTH))
    assert reasons(report) == ["rewritten"]


def test_a_convolution_over_the_tokens_keeps_them():
    class Depthwise(Video):
        def __init__(self):
            super().__init__(depth=1)
            self.mix = nn.Conv3d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)

        def forward(self, video):
            x = self.patch(video)
            return self.blocks[0]((x + self.mix(x)).flatten(2).transpose(1, 2))

    report = report_of(Depthwise(), latents())
    assert reasons(report) == ["rewritten"]


@pytest.mark.parametrize("value", ["tokens", "text", "number"])
def test_writing_into_a_tensor(value):
    class Writing(Video):
        def forward(self, video, text):
            x = self.patch(video).flatten(2).transpose(1, 2)
            y = torch.empty_like(x)
            y[..., 0::2] = x[..., 1::2]
            y[..., 1::2] = x[..., 0::2]
            if value == "text":
                y[:, :7] = text
            elif value == "number":
                y[:, :7] = 0.0
            return self.blocks[0](y)

    report = report_of(Writing(SelfAttention()), latents(), text_of(7))
    (site,) = report.sites
    assert site.reason == ("unknown_grid" if value == "text" else "rewritten")
    if value == "text":
        assert "setitem" in site.detail


def test_writing_through_a_view_reaches_the_whole_tensor():
    class Writing(Video):
        def forward(self, video, text):
            x = self.patch(video).flatten(2).transpose(1, 2) + 0
            x[:, :7].copy_(text)
            return self.blocks[0](x)

    (site,) = report_of(Writing(depth=1), latents(), text_of(7)).sites
    assert site.reason == "unknown_grid"
    assert "copy_" in site.detail


def test_leaf_modules():
    """`fx.symbolic_trace` keeps modules of torch.nn as nodes of their own."""
    video = latents()
    graph = fx.symbolic_trace(Plain())
    with torch.no_grad():
        FakeTensorProp(graph, FakeTensorMode(allow_non_fake_inputs=True)).propagate(video)
    after, report = rewrite(graph, ALL)
    assert [(s.role, s.reason, s.grid_q) for s in report.sites] == [("self", "rewritten", (4, 4, 6))]
    assert {n.target for n in after.graph.nodes if n.op == "call_module"} == {"patch", "norm", "qkv", "mix", "proj"}
    with torch.no_grad():
        torch.testing.assert_close(after(video), graph(video), atol=1e-5, rtol=1e-5)


class Plain(nn.Module):
    """One block without control flow or sizes read."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv3d(4, WIDTH, (1, 2, 2), (1, 2, 2))
        self.norm, self.mix = nn.LayerNorm(WIDTH), nn.SiLU()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, video):
        x = self.patch(video).flatten(2).transpose(1, 2)
        qkv = self.qkv(self.norm(x)).chunk(3, -1)
        q, k, v = (qkv[i].unflatten(-1, (HEADS, 16)).transpose(1, 2) for i in range(3))
        return x + self.proj(self.mix(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))
