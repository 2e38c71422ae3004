"""Meshes and models that optimize refuses."""

from __future__ import annotations

import torch

import bsa_compile
from bsa_compile.errors import BSACompileError

from .jobs import Case, mesh_of, model_of


def messages() -> dict[str, str]:
    good = mesh_of(Case((1, 1, 1), {"context": 2}))
    cases = {
        "no mesh": (model_of(2), {"mesh": "context"}),
        "unknown name": (model_of(2), {"mesh": mesh_of(Case((1, 1, 1), {"rows": 2}))}),
        "too few heads": (model_of(1), {"mesh": mesh_of(Case((1, 1, 1), {"ulysses": 2}))}),
        "timeout": (model_of(2), {"mesh": good, "mesh_timeout": 0}),
        "another model": (torch.nn.Linear(2, 2), {"mesh": good}),
    }
    said = {}
    for name, (model, options) in cases.items():
        try:
            bsa_compile.optimize(model, backend="eager", **options)
        except BSACompileError as exc:
            said[name] = str(exc)
    return said
