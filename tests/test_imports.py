"""Importing has no side effects, and imports run one way only."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "bsa_compile"
FOLDERS = {ROOT / PACKAGE: PACKAGE, ROOT / "passes": f"{PACKAGE}.passes", ROOT / "kernels": f"{PACKAGE}.kernels"}

# From the bottom up, by the first name under `bsa_compile`: a module imports from its own layer and those before it.
LAYERS = (
    ("errors",),
    ("files", "policy", "grid", "selection", "report", "models"),
    ("gating", "reference", "cpu"),
    ("ops",),
    ("passes", "module_tree", "context", "adapters", "parallel"),
    ("backend", "plain_errors", "runtime", "api"),
    ("exporting", "pipelines", "distillation"),
    ("timing", "metrics", "capture", "structured", "viz", "benchmarking", "commands", "cli", "__main__"),
)


# The ops run the kernels; `bsa-compile info` asks them which path they would take.
REACH_KERNELS = ("bsa_compile.ops.definitions", "bsa_compile.commands.info")


def modules() -> Iterator[tuple[str, Path]]:
    for folder, prefix in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join((prefix, *(p for p in parts if p != "__init__"))), path


def imported(module: str, path: Path) -> Iterator[tuple[str, bool]]:
    """Absolute names of what a file imports, and whether on import of the file itself."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    for parent in ast.walk(tree):
        for child in ast.iter_child_nodes(parent):
            child.parent = parent  # type: ignore[attr-defined]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        if not for_typing(node):
            yield from ((name, at_import(node)) for name in names)


def at_import(node: ast.AST) -> bool:
    while (node := getattr(node, "parent", None)) is not None:  # type: ignore[assignment]
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            return False
    return True


def for_typing(node: ast.AST) -> bool:
    while (node := getattr(node, "parent", None)) is not None:  # type: ignore[assignment]
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return True
    return False


def first_name(module: str) -> str:
    """`bsa_compile.passes.match` -> `passes`; the package itself -> ""."""
    return [*module.split("."), ""][1]


def layer(name: str) -> int | None:
    return next((i for i, names in enumerate(LAYERS) if name in names), None)


ALL = dict(modules())


def test_every_module_has_its_layer():
    known = {name for names in LAYERS for name in names} | {"", "kernels"}
    unknown = {first_name(m) for m in ALL} - known
    assert not unknown, f"name the layer of {sorted(unknown)} in LAYERS"


@pytest.mark.parametrize("module", [m for m in ALL if layer(first_name(m)) is not None])
def test_imports_go_down_only(module):
    here = layer(first_name(module))
    for name, _ in imported(module, ALL[module]):
        if not name.startswith(f"{PACKAGE}."):
            continue
        there = first_name(name)
        if there == "kernels":
            # The bare package is no more than the place where the sources lie.
            reached = name != f"{PACKAGE}.kernels"
            assert not reached or module in REACH_KERNELS, f"{module} imports {name}: kernels are reached from ops"
        elif layer(there) is not None:
            assert layer(there) <= here, f"{module} imports {name}, which is further up"


@pytest.mark.parametrize("module", [m for m in ALL if first_name(m) == "kernels"])
def test_kernels_import_torch_triton_and_errors_alone(module):
    for name, _ in imported(module, ALL[module]):
        if name.startswith(PACKAGE):
            assert first_name(name) in ("kernels", "errors"), f"{module} imports {name}"
        else:
            top = name.split(".")[0]
            assert top in ("torch", "triton") or top in sys.stdlib_module_names, f"{module} imports {name}"


@pytest.mark.parametrize("module", [m for m in ALL if first_name(m) == "models"])
def test_models_know_nothing_of_passes_kernels_and_ops(module):
    for name, _ in imported(module, ALL[module]):
        if name.startswith(f"{PACKAGE}."):
            assert first_name(name) in ("models", "errors", "files", "policy", "grid"), f"{module} imports {name}"


OPTIONAL = (
    *("triton", "matplotlib", "onnx", "onnxscript", "onnxruntime", "diffusers", "transformers", "av", "ftfy"),
    *("flash_attn", "cudnn", "cutlass"),
)


# A model of diffusers' classes; imported where it is used, like those classes themselves.
ARE_OPTIONAL = ("bsa_compile.pipelines.small.autoencoder", "bsa_compile.pipelines.small.parts")


@pytest.mark.parametrize("module", [m for m in ALL if first_name(m) != "kernels" and m not in ARE_OPTIONAL])
def test_optional_dependencies_are_imported_where_they_are_used(module):
    for name, on_import in imported(module, ALL[module]):
        optional = name.split(".")[0] in OPTIONAL or name.startswith(ARE_OPTIONAL)
        assert not (on_import and optional), f"{module} imports {name} at its top"


def test_the_rules_see_what_breaks_them(tmp_path):
    path = tmp_path / "low.py"
    path.write_text("from . import backend\nfrom .ops.anchor import x\nimport triton\ndef f():\n    import onnx\n")
    found = dict(imported("bsa_compile.grid", path))
    assert found == {"bsa_compile.backend": True, "bsa_compile.ops.anchor.x": True, "triton": True, "onnx": False}
    assert layer(first_name("bsa_compile.backend")) > layer(first_name("bsa_compile.grid"))


QUIET = """
import contextlib, io, logging, os, sys, warnings

import torch
import torch._dynamo.config, torch._inductor.config, torch._functorch.config

def state():
    configs = (torch._dynamo.config, torch._inductor.config, torch._functorch.config)
    return {
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "rng": torch.get_rng_state().tolist(),
        "environment": dict(os.environ),
        "logging": (logging.root.level, list(logging.root.handlers), logging.getLogger("bsa_compile").handlers),
        "warnings": list(warnings.filters),
        "configs": [c.save_config_portable() for c in configs],
    }

optional = [m for m in OPTIONAL if m in sys.modules]
before = state()
out, err = io.StringIO(), io.StringIO()
with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
    warnings.simplefilter("error")
    import IMPORT
after = state()
for key in before:
    assert before[key] == after[key], key
assert (out.getvalue(), err.getvalue()) == ("", ""), (out.getvalue(), err.getvalue())
new = [m for m in OPTIONAL if m in sys.modules and m not in optional]
assert not new, new
"""


def test_importing_prints_nothing_and_changes_nothing():
    code = QUIET.replace("IMPORT", "bsa_compile").replace("OPTIONAL", repr(OPTIONAL))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_optional_dependencies_are_not_imported_with_the_package():
    # In a process of its own: torch.compile's settings, which the test above looks at, themselves import Triton, and
    # FlexAttention's module may.
    code = f"""if True:
        import sys
        import torch.nn.attention.flex_attention
        before = set(sys.modules)
        import bsa_compile
        print([m for m in {OPTIONAL} if m in sys.modules and m not in before])
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
