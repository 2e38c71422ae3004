"""What the policy decides, and what it complains about."""

from __future__ import annotations

import pytest
import torch.nn.functional as F

from bsa_compile.errors import SiteError
from bsa_compile.passes import rewrite
from bsa_compile.policy import BSAPolicy, Step
from bsa_compile.report import REASONS

from .support import Block, SelfAttention, Video, capture, count, latents, text_of

STRICT = BSAPolicy(on_unsupported="error")


def masked(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, q.new_zeros(1, 1, 1, k.shape[2]))


@pytest.fixture(scope="module")
def graph():
    return capture(Video(), latents(), text_of(5))


def reasons(graph, policy, **options):
    report = rewrite(graph, policy, **options)[1]
    return {s.module: s.reason for s in report.sites if s.reason != "cross_attention"}


def test_disabled(graph):
    after, report = rewrite(graph, BSAPolicy.dense())
    assert after is graph
    assert [s.reason for s in report.sites] == ["disabled", "cross_attention"] * 2


def test_rules_by_path(graph):
    policy = BSAPolicy(rules=({"module": "blocks.0.*", "dense": True, "name": "first"},))
    after, report = rewrite(graph, policy)
    assert count(after, "bsa::attend") == 1
    first, _, second, _ = report.sites
    assert (first.module, first.reason, first.detail) == ("blocks.0.attn", "rule", "first")
    assert second.reason == "rewritten"


def test_rules_by_path_under_a_prefix(graph):
    policy = BSAPolicy(rules=({"module": "dit.blocks.1.attn", "dense": True},))
    assert reasons(graph, policy) == {"blocks.0.attn": "rewritten", "blocks.1.attn": "rewritten"}
    assert reasons(graph, policy, module_prefix="dit") == {
        "dit.blocks.0.attn": "rewritten",
        "dit.blocks.1.attn": "rule",
    }


def test_min_tokens(graph):
    assert set(reasons(graph, BSAPolicy(min_tokens=97)).values()) == {"min_tokens"}
    assert set(reasons(graph, BSAPolicy(min_tokens=96)).values()) == {"rewritten"}


def test_resolution(graph):
    low = BSAPolicy(rules=({"resolution": (None, 65), "dense": True},))
    assert set(reasons(graph, low).values()) == {"rule"}  # 4 rows of 16 pixels
    high = BSAPolicy(rules=({"resolution": (65, None), "dense": True},))
    assert set(reasons(graph, high).values()) == {"rewritten"}


def test_steps(graph):
    policy = BSAPolicy(dense_steps=2, rules=({"steps": (5, None), "dense": True},))
    note = "dense_steps and rules with steps did not apply: no denoising step was given"
    assert rewrite(graph, policy)[1].notes == [note]
    assert rewrite(graph, BSAPolicy())[1].notes == []
    found = {i: set(reasons(graph, policy, step=Step(i)).values()) for i in (1, 3, 5)}
    assert found == {1: {"dense_step"}, 3: {"rewritten"}, 5: {"rule"}}
    assert rewrite(graph, policy, step=Step(3))[1].notes == []


def test_the_report_names_the_policy(graph):
    policy = BSAPolicy(sparsity=0.5)
    report = rewrite(graph, policy)[1]
    assert (report.policy, report.digest, report.graphs) == (policy.describe(), policy.digest, 1)
    assert all(s.reason in REASONS for s in report.sites)
    assert "2 of 4 attention sites block-sparse" in str(report)


def test_nothing_to_complain_about(graph):
    assert set(reasons(graph, STRICT).values()) == {"rewritten"}
    for policy in (
        BSAPolicy(on_unsupported="error", min_tokens=1000),
        BSAPolicy(on_unsupported="error", enabled=False),
        BSAPolicy(on_unsupported="error", rules=({"role": "self", "dense": True},)),
    ):
        rewrite(graph, policy)
    rewrite(capture(Video(depth=1), latents(1)), STRICT)


def test_a_complaint_names_path_line_and_reason():
    graph = capture(Video(Block(SelfAttention(masked)), Block()), latents(), text_of(5))
    with pytest.raises(SiteError) as error:
        rewrite(graph, STRICT)
    text = str(error.value)
    assert "blocks.0.attn [sdpa] at " in text
    assert "test_policies.py:" in text
    assert REASONS["mask"] in text
    assert "blocks.1.attn" not in text
    assert "cross" not in text


def test_a_complaint_about_an_unknown_grid():
    with pytest.raises(SiteError, match=r"the .T, H, W. of the tokens is not known .*give grid="):
        rewrite(capture(Block(), text_of(96)), STRICT)


def test_masked_cross_attention_is_no_complaint():
    class Masked(Block):
        def forward(self, x, text):
            q, k = (z.unflatten(-1, (2, 16)).transpose(1, 2) for z in (self.cross.q(x), self.cross.q(text)))
            return x + masked(q, k, k).transpose(1, 2).flatten(2)

    _, report = rewrite(capture(Video(Masked()), latents(), text_of(96)), STRICT)
    assert [s.reason for s in report.sites] == ["cross_attention"]
