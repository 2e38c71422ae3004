"""Distilling a dense teacher into a block-sparse student, against the fp64 reference inside the same model."""

from __future__ import annotations

import copy
import logging

import pytest
import torch

import bsa_compile
from bsa_compile.distillation import distillation_loss
from bsa_compile.errors import InputError, UsageError
from bsa_compile.policy import BSAPolicy

from .support import CountCompiles, make_inputs, make_longcat, relative_error, run_reference

POLICY = BSAPolicy(sparsity=0.6, chunk_3d_shape_q=(2, 3, 4), chunk_3d_shape_k=(2, 2, 4))
CLEAN, _, TEXT = make_inputs(batch=2)
NEGATIVE = make_inputs(batch=2, seed=2)[2]
MASK = torch.tensor([[1] * 7, [1] * 3 + [0] * 4])
NOISE = torch.randn(CLEAN.shape, generator=torch.Generator().manual_seed(3))
SIGMA = torch.tensor([0.3, 0.8])
GIVEN = {"noise": NOISE, "sigma": SIGMA}


def expected_loss(model, dense, policy=POLICY, *, cond=0, scale=1.0):
    """From the definitions: flow matching, CFG-zero*, mean squared error."""
    level = SIGMA[:, None].repeat(1, CLEAN.shape[2])
    level[:, :cond] = 0
    mix = level.view(2, 1, -1, 1, 1)
    noisy, timestep = CLEAN + mix * (NOISE - CLEAN), 1000 * level
    with torch.no_grad():
        target = dense(noisy, timestep, TEXT, MASK, cond)[:, :, cond:].double()
        if scale > 1:
            away = dense(noisy, timestep, NEGATIVE, None, cond)[:, :, cond:].double()
            star = torch.stack([(t * a).sum() / (a * a).sum() for t, a in zip(target, away, strict=True)])
            away = away * star.view(-1, 1, 1, 1, 1)
            target = away + scale * (target - away)
    flow = run_reference(model, policy, noisy, timestep, TEXT, MASK, cond)[:, :, cond:]
    return torch.stack([(f - t).square().mean() for f, t in zip(flow, target, strict=True)])


def gradients(parameters, loss):
    parameters = list(parameters)
    for p in parameters:
        p.grad = None
    loss.backward()
    return [None if p.grad is None else p.grad.clone() for p in parameters]


def check_gradients(got, want):
    assert [g is None for g in got] == [g is None for g in want]
    assert any(g is not None and g.abs().max() > 0 for g in want)
    for g, w in zip(got, want, strict=True):
        if g is not None and w.abs().max() > 0:
            assert relative_error(g, w) < 1e-4


def student_with_lora(model, backend="eager", **options):
    """An optimized student that trains a LoRA, and its parameters, which are no longer those of a new one."""
    model.requires_grad_(False)
    student = bsa_compile.optimize(model, POLICY, backend=backend, **options)
    generator = torch.Generator().manual_seed(4)
    student.add_lora("sparse", 3, generator=generator)
    student.enable_loras(["sparse"])
    parameters = student.lora_parameters("sparse")
    with torch.no_grad():
        for p in parameters:
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return student, parameters


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("cond", [0, 2], ids=["text", "given frames"])
@pytest.mark.parametrize("scale", [1.0, 4.0], ids=["plain", "guided"])
def test_loss_and_gradients_are_those_of_the_reference(backend, cond, scale):
    model = make_longcat()
    teacher = copy.deepcopy(model)
    want_loss = expected_loss(model, teacher, cond=cond, scale=scale)
    want = gradients(model.parameters(), want_loss.mean())
    student = bsa_compile.optimize(model, POLICY, backend=backend)
    guidance = {"guidance_scale": scale, "negative_text": NEGATIVE} if scale > 1 else {}
    options = {**GIVEN, **guidance, "teacher": teacher, "num_cond_latents": cond}
    loss = distillation_loss(student, CLEAN, TEXT, MASK, **options, reduction="none")
    torch.testing.assert_close(loss.double(), want_loss.double(), rtol=1e-4, atol=0)
    check_gradients(gradients(student.parameters(), loss.mean()), want)
    assert torch.equal(distillation_loss(student, CLEAN, TEXT, MASK, **options), loss.mean())
    assert all(p.grad is None for p in teacher.parameters())
    assert {site.role for site in student.report.rewritten} == ({"cond", "noise"} if cond else {"self"})


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_lora_alone_is_trained_against_the_model_without_it(backend):
    model, teacher = make_longcat(), make_longcat()
    student, parameters = student_with_lora(model, backend)
    own = None
    if (
        backend == "inductor"
    ):  # which compiles slowly: the dense model is left out, and no block differs in what is given
        own = teacher
        model.x_embedder.requires_grad_(True)
    got = gradients(parameters, distillation_loss(student, CLEAN, TEXT, MASK, **GIVEN, teacher=own))
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("x_embedder"))
    model.enable_loras(["sparse"])
    check_gradients(got, gradients(parameters, expected_loss(model, teacher).mean()))
    assert len(student.report.rewritten) == 2


@pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])
def test_checkpointing_keeps_less_and_gives_the_same_gradients(regional):
    student, parameters = student_with_lora(make_longcat(), "aot_eager" if regional else "eager", regional=regional)
    kept, results = [], []
    for student.gradient_checkpointing in (False, True):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: s.append(x.numel()) or x, lambda x: x):
            loss = distillation_loss(student, CLEAN, TEXT, MASK, **GIVEN)
        kept.append(sum(sizes))
        results.append(gradients(parameters, loss))
    assert kept[1] < 0.5 * kept[0]
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("what", ["lora", "all"])
def test_training_lowers_the_loss_and_compiles_nothing_after_the_first_step(what, caplog):
    model = make_longcat()
    teacher = None
    if what == "lora":
        student, parameters = student_with_lora(model)
    else:
        teacher = bsa_compile.optimize(copy.deepcopy(model), POLICY, backend="eager")
        student = bsa_compile.optimize(model, POLICY, backend="eager")
        parameters = list(student.parameters())
    optimizer = torch.optim.Adam(parameters, lr=3e-3 if what == "lora" else 3e-4)
    losses = []

    def train(steps):
        for _ in range(steps):
            loss = distillation_loss(student, CLEAN, TEXT, MASK, teacher=teacher, **GIVEN)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())

    with caplog.at_level(logging.INFO, "bsa_compile"), CountCompiles() as first:
        train(1)
    with CountCompiles() as later:
        train(7)
    assert losses[-1] < 0.7 * losses[0]
    assert first.count > 0
    assert later.count == 0
    assert "BSA" not in caplog.text  # a line or two per step would bury what matters


def test_an_optimized_teacher_runs_dense_and_is_left_as_it_was():
    model = make_longcat()
    teacher = bsa_compile.optimize(copy.deepcopy(model), POLICY, backend="eager")
    student = bsa_compile.optimize(model, POLICY, backend="eager")
    losses = [distillation_loss(student, CLEAN, TEXT, MASK, **GIVEN, teacher=t) for t in (teacher, make_longcat())]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    assert losses[0] > 1e-4
    with torch.no_grad():
        args = (CLEAN, 1000 * SIGMA, TEXT, MASK)
        assert relative_error(teacher(*args), run_reference(make_longcat(), POLICY, *args)) < 1e-5


def test_the_student_is_its_own_teacher_where_none_is_given():
    student = bsa_compile.optimize(make_longcat(), POLICY, backend="eager")
    own = distillation_loss(student, CLEAN, TEXT, MASK, **GIVEN)
    other = distillation_loss(student, CLEAN, TEXT, MASK, **GIVEN, teacher=make_longcat())
    torch.testing.assert_close(own, other, rtol=1e-5, atol=0)
    assert student.policy == POLICY
    all_kept = bsa_compile.optimize(make_longcat(), BSAPolicy(sparsity=0.0), backend="eager")
    assert distillation_loss(all_kept, CLEAN, TEXT, MASK, **GIVEN) < 1e-9


def test_draws_come_from_the_generator():
    student = bsa_compile.optimize(make_longcat(), POLICY, backend="eager")

    def loss(seed, **given):
        with torch.no_grad():
            return distillation_loss(student, CLEAN, TEXT, generator=torch.Generator().manual_seed(seed), **given)

    assert torch.equal(loss(0), loss(0))
    assert not torch.equal(loss(0), loss(1))
    assert not torch.equal(loss(0, sigma=SIGMA), loss(1, sigma=SIGMA))
    assert torch.equal(loss(0, **GIVEN), loss(1, **GIVEN))


def test_a_trained_lora_runs_the_same_from_its_file(tmp_path):
    student, _ = student_with_lora(make_longcat())
    distillation_loss(student, CLEAN, TEXT, MASK, **GIVEN).backward()
    student.save_lora(tmp_path / "sparse.safetensors", "sparse")
    fresh = bsa_compile.optimize(make_longcat(), POLICY, backend="eager")
    fresh.load_lora(tmp_path / "sparse.safetensors", "sparse")
    args = (CLEAN, 1000 * SIGMA, TEXT, MASK)
    with torch.no_grad():
        plain = fresh(*args)
        fresh.enable_loras(["sparse"])
        assert torch.equal(fresh(*args), student(*args))
        assert relative_error(fresh(*args), plain) > 1e-3


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"reduction": "sum"}, UsageError, "reduction must be mean or none, got 'sum'"),
        ({"sigma": torch.tensor([300.0, 800.0])}, UsageError, r"sigma must lie in \[0, 1\].*1000 times as large"),
        ({"sigma": torch.tensor([float("nan"), 0.5])}, UsageError, r"sigma must lie in \[0, 1\]"),
        ({"sigma": torch.tensor(0.5)}, InputError, r"sigma must have shape \[2\], one level per sample, got \[\]"),
        ({"noise": NOISE[:1]}, InputError, "noise must have the shape of clean"),
        ({"clean": CLEAN[0]}, InputError, r"clean must be float latents \[B, C, T, H, W\]"),
        ({"clean": CLEAN.int()}, InputError, r"clean must be float latents .*got torch.int32"),
        ({"num_cond_latents": 4}, UsageError, r"num_cond_latents must be an integer in 0\.\.3"),
        ({"guidance_scale": 4.0}, UsageError, r"negative_text must be given with guidance_scale 4, got none"),
        ({"negative_text": NEGATIVE}, UsageError, r"negative_text must be left out with guidance_scale 1, got one"),
        ({"guidance_scale": float("inf")}, UsageError, "guidance_scale must be a finite number >= 0"),
        ({"student": make_longcat()}, UsageError, "teacher must be given for a student of LongCatVideo"),
        ({"teacher": lambda x, *a, **k: x[:, :, :1]}, InputError, "teacher must predict what the student does"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_bad_input_is_refused(changes, error, text):
    student = bsa_compile.optimize(make_longcat(), POLICY, backend="eager")
    arguments = {"student": student, "clean": CLEAN, "text": TEXT, **changes}
    with pytest.raises(error, match=text):
        distillation_loss(**arguments)


@pytest.mark.parametrize("how", ["policy", "switch"])
def test_a_student_that_runs_dense_is_refused(how):
    student = bsa_compile.optimize(make_longcat(), BSAPolicy.dense() if how == "policy" else POLICY, backend="eager")
    if how == "switch":
        student.disable_bsa()
    with pytest.raises(UsageError, match=r"student must run block-sparse, got one that runs dense\. .*enable_bsa"):
        distillation_loss(student, CLEAN, TEXT)
