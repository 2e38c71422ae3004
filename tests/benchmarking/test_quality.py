"""The benchmark of quality: with a stand-in for the model, and with a tiny pipeline that stand-ins judge."""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from bsa_compile import BSAPolicy
from bsa_compile.benchmarking import model_tables, results
from bsa_compile.errors import UsageError
from bsa_compile.metrics import psnr, ssim
from tests.benchmarking.support import script

CAPTIONS = [SimpleNamespace(text=text) for text in ("a red ball rises", "a blue star falls", "a green ring spins")]
SEEDS = [0, 1]


@pytest.fixture(scope="module")
def bench():
    return script("quality")


def frames_of(text, seed, off=0):
    rng = np.random.default_rng([len(text), seed])
    video = rng.integers(20, 200, (2, 16, 16, 3), dtype=np.uint8)
    return video + np.uint8(off)


@pytest.fixture
def subject(bench):
    calls = []

    def make(text, seed, policy):
        calls.append((text, seed, policy))
        off = 0 if not policy.enabled or policy.sparsity == 0 else 5 if policy.sparsity else 7
        skipped = 0.0 if not policy.enabled else policy.sparsity
        facts = {"frames": 2, "height": 16, "width": 16, "steps": 4}
        return bench.Video(frames_of(text, seed, off), 0.5 + 0.25 * seed, skipped, facts)

    def judge(frames, caption):
        # Dense videos show everything; a block-sparse one moves the wrong way with the second seed.
        dense = any((frames == frames_of(caption.text, seed)).all() for seed in SEEDS)
        second = (frames - np.uint8(5) == frames_of(caption.text, 1)).all()
        return {"colour": True, "shape": True, "motion": bool(dense or not second)}

    made = bench.Subject(CAPTIONS, make, judge, BSAPolicy(chunk_3d_shape_q=(2, 4, 4)), {"parameters": 25_000_000})
    return SimpleNamespace(subject=made, calls=calls)


def new():
    return {
        **results.header("quality", torch.device("cpu")),
        "model": {"parameters": 25_000_000},
        "captions": [caption.text for caption in CAPTIONS],
        "seeds": SEEDS,
        "video": None,
        "other_seed": None,
        "policies": [],
    }


def test_policies_have_the_tiles_of_the_model(bench):
    made = bench.policies(BSAPolicy(chunk_3d_shape_q=(2, 4, 4), sparsity=0.9), [0.0, 0.75], [0.95])
    assert list(made) == ["dense", "sparsity 0", "sparsity 0.75", "CDF threshold 0.95"]
    assert made["dense"] == BSAPolicy.dense()
    assert made["sparsity 0.75"] == BSAPolicy(sparsity=0.75, chunk_3d_shape_q=(2, 4, 4))
    assert made["CDF threshold 0.95"] == BSAPolicy(cdf_threshold=0.95, chunk_3d_shape_q=(2, 4, 4))


def test_every_policy_is_compared_with_the_dense_videos_and_written(bench, subject, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "counted_sparsity", lambda subject, policy, jobs: 0.6)
    path, said, kept = tmp_path / "quality.json", [], []

    def say(text):
        said.append(text)
        kept.append(len(json.loads(path.read_text())["policies"]) if path.exists() else 0)

    data = new()
    chosen = bench.policies(subject.subject.base, [0.75, 0.0], [0.9])
    bench.run(data, subject.subject, chosen, path, say)
    # Each policy's first video twice: the first time it compiles.
    assert len(subject.calls) == 4 * (1 + 6)
    assert kept[-1] == 4
    assert kept[said.index("sparsity 0.75: compiling")] == 1  # the dense entry was written before

    found = {entry["name"]: entry for entry in json.loads(path.read_text())["policies"]}
    assert list(found) == ["dense", "sparsity 0", "sparsity 0.75", "CDF threshold 0.9"]
    dense, same, sparse, mass = found.values()
    assert (dense["psnr"], dense["ssim"], dense["effective_sparsity"]) == (None, None, 0.0)
    assert dense["accuracy"]["all"] == {"share": 1.0, "right": 6, "of": 6, **bounds(6, 6)}
    assert dense["seconds"] == {"mean": 0.625, "std": pytest.approx(np.std([0.5, 0.75] * 3, ddof=1)), "n": 6}
    assert (same["same_as_dense"], same["psnr"]["n"], same["ssim"]["mean"]) == (6, 0, pytest.approx(1))
    assert same["videos"]["psnr"] == [None] * 6  # infinite: no number of JSON's
    wanted = psnr(frames_of("a red ball rises", 0, 5), frames_of("a red ball rises", 0))
    assert sparse["psnr"] == {"mean": pytest.approx(wanted), "std": pytest.approx(0, abs=1e-9), "n": 6}
    alike = [ssim(frames_of(c.text, s, 5), frames_of(c.text, s)) for c in CAPTIONS for s in SEEDS]
    assert sparse["videos"]["ssim"] == pytest.approx(alike)
    assert sparse["accuracy"]["motion"] == sparse["accuracy"]["all"] == results.share(3, 6)
    assert sparse["videos"]["right"] == {"colour": "111111", "shape": "111111", "motion": "101010", "all": "101010"}
    assert (sparse["effective_sparsity"], mass["effective_sparsity"]) == (0.75, 0.6)
    assert sparse["policy"]["chunk_3d_shape_q"] == [2, 4, 4]
    across = [psnr(frames_of(c.text, 0), frames_of(c.text, 1)) for c in CAPTIONS]
    assert data["other_seed"]["psnr"] == results.spread(across)


def bounds(right, of):
    found = results.share(right, of)
    return {"low": found["low"], "high": found["high"]}


def test_one_seed_has_no_other(bench):
    assert bench.other_seed({(0, 0): frames_of("a", 0), (1, 0): frames_of("b", 0)}) is None


def test_the_table(bench, subject, monkeypatch):
    monkeypatch.setattr(bench, "counted_sparsity", lambda subject, policy, jobs: 0.6)
    data = new()
    bench.run(data, subject.subject, bench.policies(subject.subject.base, [0.75], []), None, lambda text: None)
    lines = model_tables.quality(json.loads(json.dumps(data))).splitlines()
    assert lines[0] == "| attention | skipped | PSNR, dB | SSIM | colour | shape | motion | all | s a video |"
    perfect = "100% (61–100)"
    assert lines[2] == f"| dense | 0.0% |  |  | {perfect} | {perfect} | {perfect} | {perfect} | 0.62 ± 0.14 |"
    half = "50% (19–81)"
    assert lines[3].startswith("| sparsity 0.75 | 75.0% | 34.2 ± 0.0 | 0.9")
    assert lines[3].endswith(f"| {perfect} | {perfect} | {half} | {half} | 0.62 ± 0.14 |")
    assert "3 captions with 2 seeds each: 6 videos of 2 frames of 16x16, 4 steps, 25.0 M parameters" in lines[-1]
    assert "dense videos of the same caption with two seeds: PSNR " in lines[-1]


def test_options_of_the_command_line(bench, monkeypatch):
    assert bench.option("num_frames=9") == ("num_frames", 9)
    assert bench.option("base_size=[32, 48]") == ("base_size", [32, 48])
    for text in ("num_frames", "num_frames=nine"):
        with pytest.raises(bench.argparse.ArgumentTypeError):
            bench.option(text)
    monkeypatch.setattr(sys, "argv", ["quality.py", "--captions", "0"])
    with pytest.raises(UsageError, match="--captions must be at least 1, got 0"):
        bench.main()


@pytest.fixture
def modules(monkeypatch):
    """Stand-ins for the small model's captions and judge."""
    captions, judging = (ModuleType(f"bsa_compile.pipelines.small.{name}") for name in ("captions", "judge"))
    captions.sample_captions = lambda n, seed: CAPTIONS[:n]
    verdict = SimpleNamespace(agrees=lambda caption: {"colour": True, "shape": False, "motion": True})
    judging.judge = lambda frames: verdict
    for module in (captions, judging):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    if "bsa_compile.pipelines.small" not in sys.modules:
        monkeypatch.setitem(sys.modules, "bsa_compile.pipelines.small", ModuleType("bsa_compile.pipelines.small"))


def test_a_tiny_pipeline_from_end_to_end(bench, modules, tmp_path, monkeypatch, capsys):
    for library in ("diffusers", "transformers", "av", "ftfy"):
        pytest.importorskip(library)
    from tests.pipelines.support import write_model

    folder, path = write_model(tmp_path / "model"), tmp_path / "quality.json"
    sizes = ("height=64", "width=128", "num_frames=17", "num_inference_steps=2")
    words = ["quality.py", "--folder", str(folder), "--backend", "eager", "--device", "cpu", "--json", str(path)]
    words += ["--captions", "1", "--seeds", "2", *(word for size in sizes for word in ("--option", size))]
    monkeypatch.setattr(sys, "argv", [*words, "--sparsity", "0.5"])
    bench.main()
    monkeypatch.setattr(sys, "argv", [*words, "--cdf-threshold", "0.3"])
    bench.main()
    data = json.loads(path.read_text())
    assert [entry["name"] for entry in data["policies"]] == ["dense", "sparsity 0.5", "CDF threshold 0.3"]
    assert data["video"] == {"frames": 17, "height": 64, "width": 128, "fps": 15, "steps": 2, "guidance_scale": 4.0}
    assert data["model"]["folder"] == "model"
    dense, half, mass = data["policies"]
    # 5x4x8 tokens are four tiles of 4x4x4. Where all weigh about the same, two of them have 0.3 of the mass.
    assert (dense["effective_sparsity"], half["effective_sparsity"]) == (0, 0.5)
    assert mass["effective_sparsity"] == pytest.approx(0.5, abs=0.1)
    assert 0 < half["ssim"]["mean"] < 1
    assert all(entry["seconds"]["mean"] > 0 for entry in data["policies"])
    assert dense["accuracy"]["shape"]["right"] == 0
    assert dense["accuracy"]["all"]["of"] == 2
    assert "CDF threshold 0.3: counting the tiles that it keeps" in capsys.readouterr().out


def test_tiles_that_a_threshold_keeps_are_counted(bench):
    from bsa_compile.ops import block_sparse_attention

    q, k, v = torch.randn(3, 1, 2, 128, 16, generator=torch.Generator().manual_seed(0)).unbind(0)

    def attend(implementation, **criteria):
        grids = {"grid_q": (2, 8, 8), "tile_q": (2, 4, 4)}
        return block_sparse_attention(q, k, v, implementation=implementation, **grids, **criteria)

    with bench.counting() as tiles:
        assert tiles.effective_sparsity is None
        out = attend(bench.COUNTING, sparsity=0.75)
        assert tiles.effective_sparsity == 0.75
        attend(bench.COUNTING, sparsity=0.5)
        assert tiles.effective_sparsity == 0.625
    assert torch.equal(out, attend("native", sparsity=0.75))
    with bench.counting() as tiles:
        attend(bench.COUNTING, cdf_threshold=0.6)
        assert 0 < tiles.effective_sparsity < 0.75
