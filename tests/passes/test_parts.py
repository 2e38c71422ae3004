"""Parts of the video that attend to each other, KV caches, and graphs that begin after the patch embedding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from .support import (
    HEADS,
    WIDTH,
    Block,
    Recorder,
    SelfAttention,
    Video,
    latents,
    reasons,
    report_of,
    text_of,
)

# -- parts of the video -----------------------------------------------------------------------------------------------


class Split(SelfAttention):
    """Attends cond x cond and noise x all, as LongCat does; `cut` may be anything."""

    def __init__(self, cut: int, noise_keys: str = "all") -> None:
        super().__init__()
        self.cut = cut
        self.noise_keys = noise_keys

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        n = self.cut
        cond = self.attend(q[:, :, :n].contiguous(), k[:, :, :n].contiguous(), v[:, :, :n].contiguous())
        if self.noise_keys == "noise":
            k, v = k[:, :, n:], v[:, :, n:]
        elif self.noise_keys == "cond":
            k, v = k[:, :, :n], v[:, :, :n]
        noise = self.attend(q[:, :, n:].contiguous(), k, v)
        return self.proj(torch.cat([cond, noise], dim=2).transpose(1, 2).reshape(x.shape))


def test_cond_and_noise_frames():
    model, video = Video(Split(24), SelfAttention()).eval(), latents()
    recorder = Recorder()
    with torch.no_grad():
        torch.testing.assert_close(recorder.run(model, video), model(video), atol=1e-5, rtol=1e-5)
    cond, noise, after = recorder.reports[0].sites
    assert (cond.role, cond.grid_q, cond.grid_k) == ("cond", (1, 4, 6), (1, 4, 6))
    assert (noise.role, noise.grid_q, noise.grid_k) == ("noise", (3, 4, 6), (4, 4, 6))
    assert (after.role, after.grid_q) == ("self", (4, 4, 6))
    assert all(s.rewritten for s in (cond, noise, after))


def test_cond_and_noise_frames_of_symbolic_sizes():
    class Framed(Split):
        def forward(self, x, t, h, w):
            self.cut = h * w
            return super().forward(x)

    class Model(Video):
        def forward(self, video):
            x = self.patch(video)
            _, _, t, h, w = x.shape
            return self.blocks[0](x.flatten(2).transpose(1, 2), t, h, w)

    model, video = Model(Framed(0)).eval(), latents(5, 4, 6)
    recorder = Recorder()
    with torch.no_grad():
        torch.testing.assert_close(recorder.run(model, video, dynamic=True), model(video), atol=1e-5, rtol=1e-5)
    cond, noise = recorder.reports[0].sites
    assert (cond.role, noise.role) == ("cond", "noise")
    assert cond.grid_q[0] == 1
    assert noise.grid_q[1:] == noise.grid_k[1:]


@pytest.mark.parametrize(
    ("cut", "keys", "expected"),
    [
        (30, "all", [("self", "frame_range"), ("self", "frame_range")]),
        (24, "noise", [("cond", "rewritten"), ("self", "rewritten")]),
        (24, "cond", [("cond", "rewritten"), ("self", "frame_range")]),
    ],
)
def test_other_parts(cut, keys, expected):
    report = report_of(Video(Split(cut, keys)), latents())
    assert [(s.role, s.reason) for s in report.sites] == expected


@pytest.mark.parametrize("frames", [1, 2])
def test_a_single_frame_is_an_image(frames):
    (site,) = report_of(Video(depth=1), latents(frames)).sites
    assert site.reason == ("image" if frames == 1 else "rewritten")


def test_a_single_noise_frame_is_no_image():
    sites = report_of(Video(Split(72)), latents()).sites
    assert [(s.role, s.reason, s.grid_q) for s in sites] == [
        ("cond", "rewritten", (3, 4, 6)),
        ("noise", "rewritten", (1, 4, 6)),
    ]


class Cached(SelfAttention):
    """Puts other keys in front of its own."""

    def forward(self, x, keys):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        k, v = (torch.cat([keys.repeat(x.shape[0], 1, 1, 1), z], dim=2) for z in (k, v))
        return self.proj(self.attend(q, k, v).transpose(1, 2).reshape(x.shape))


def test_other_keys_in_front_mix_the_sequence():
    model = Video(Cached(), call=lambda block, x, text: block(x, text))
    (site,) = report_of(model, latents(), torch.randn(1, HEADS, 24, 16)).sites
    assert site.reason == "mixed_sequence"
    assert "24 + 96" in site.detail


@pytest.mark.parametrize(("tokens", "reason"), [(24, "rewritten"), (48, "rewritten"), (30, "frame_range")])
def test_a_class_whose_cache_holds_frames(monkeypatch, tokens, reason):
    monkeypatch.setattr("bsa_compile.passes.known_models._CACHED_FRAMES", (f"{__name__}.Cached",))
    model = Video(Cached(), call=lambda block, x, text: block(x, text)).eval()
    video, keys = latents(batch=2), torch.randn(1, HEADS, tokens, 16)
    recorder = Recorder()
    with torch.no_grad():
        torch.testing.assert_close(recorder.run(model, video, keys), model(video, keys), atol=1e-5, rtol=1e-5)
    (site,) = recorder.reports[0].sites
    assert site.reason == reason
    if reason == "rewritten":
        assert (site.role, site.grid_q, site.grid_k) == ("cached", (4, 4, 6), (4 + tokens // 24, 4, 6))


def test_queries_padded_like_the_keys_and_cut_off(monkeypatch):
    """The public LongCat code rotates queries behind an empty cache, and takes the last of them."""

    class Padded(SelfAttention):
        def forward(self, x, keys):
            n = x.shape[1]
            q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            k, v = (torch.cat([keys, z], dim=2).contiguous() for z in (k, v))
            q = torch.cat([torch.empty_like(keys), q], dim=2).contiguous()
            cos = torch.arange(float(q.shape[2])).cos()[:, None]
            q, k = (torch.stack((z[..., 0::2] * cos, z[..., 1::2] * cos), dim=-1).flatten(-2) for z in (q, k))
            return self.proj(self.attend(q[:, :, -n:].contiguous(), k, v).transpose(1, 2).reshape(x.shape))

    monkeypatch.setattr("bsa_compile.passes.known_models._CACHED_FRAMES", ("Padded",))
    (site,) = report_of(Video(Padded()), latents(), torch.randn(1, HEADS, 24, 16)).sites
    assert (site.role, site.reason, site.grid_q, site.grid_k) == ("cached", "rewritten", (4, 4, 6), (5, 4, 6))


# -- graphs that begin after the patch embedding ----------------------------------------------------------------------


GRID = (4, 4, 6)


def test_a_block_of_its_own_needs_a_grid():
    (site, cross) = report_of(Block(), text_of(96), text_of(96)).sites
    assert (site.reason, cross.reason) == ("unknown_grid", "cross_attention")
    assert "give grid=" in site.detail


@pytest.mark.parametrize("source", ["grid", "context_grid"])
def test_a_block_of_its_own_with_a_grid(source):
    block, x, text = Block().eval(), text_of(96), text_of(96)
    recorder = Recorder(**{source: GRID}, module_prefix="blocks.3")
    with torch.no_grad():
        torch.testing.assert_close(recorder.run(block, x, text), block(x, text), atol=1e-5, rtol=1e-5)
    site, cross = recorder.reports[0].sites
    assert (site.module, site.role, site.reason, site.grid_q) == ("blocks.3.attn", "self", "rewritten", GRID)
    assert site.grid_source == {"grid": "argument", "context_grid": "context"}[source]
    assert (cross.module, cross.role, cross.reason) == ("blocks.3.cross", "cross", "cross_attention")


def test_a_block_with_rope_tables_and_modulation_as_inputs():
    class Modulated(Block):
        def forward(self, x, text, scale, cos):
            b, n, c = x.shape
            t = scale.shape[1]
            y = (self.norm(x).view(b, t, -1, c) * scale.unsqueeze(2)).view(b, n, c)
            q, k, v = self.attn.qkv(y).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            q, k = q * cos, k * cos
            x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
            keys = self.cross.kv(text).unflatten(-1, (2, HEADS, -1)).permute(2, 0, 3, 1, 4)
            return x + F.scaled_dot_product_attention(q, keys[0] * cos, keys[1]).transpose(1, 2).reshape(x.shape)

    args = (text_of(96), text_of(96), torch.randn(1, 4, WIDTH), torch.randn(96, 16))
    assert reasons(report_of(Modulated(), *args, grid=GRID)) == ["rewritten", "cross_attention"]


def test_parts_of_a_given_grid():
    sites = report_of(Block(Split(24)), text_of(96), grid=GRID).sites
    assert [(s.role, s.reason, s.grid_q, s.grid_k) for s in sites] == [
        ("cond", "rewritten", (1, 4, 6), (1, 4, 6)),
        ("noise", "rewritten", (3, 4, 6), (4, 4, 6)),
    ]


def test_a_graph_that_begins_at_q_k_and_v():
    q, k, v = (torch.randn(1, 2, 96, 16) for _ in range(3))
    (site,) = report_of(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), q, k, v, grid=GRID).sites
    assert site.reason == "unknown_grid"
    assert "bsa_compile.attention" in site.detail


def test_two_sequences_that_fit_the_grid():
    def both(block, x, y):
        return block(x) + block(y)

    block = Block()
    sites = report_of(lambda x, y: both(block, x, y), text_of(96), text_of(96), grid=GRID).sites
    assert [s.reason for s in sites] == ["unknown_grid"] * 2
    sites = report_of(lambda x, y: block(x).mean() + block(y).mean(), text_of(96), text_of(8), grid=GRID).sites
    assert [s.reason for s in sites] == ["rewritten", "not_video"]
