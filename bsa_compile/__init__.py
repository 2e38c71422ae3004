"""Block-sparse attention for video diffusion transformers, as a compiler pass.

`optimize` is the one call most users need; see the README.
"""

from __future__ import annotations

from pathlib import Path as _Path

# In a checkout that is not installed, `passes/` and `kernels/` stand beside this folder instead of inside it.
_root = _Path(__file__).resolve().parent
if not (_root / "passes").is_dir() and (_root.parent / "passes").is_dir():
    __path__.append(str(_root.parent))

__version__ = "0.1.0"

from . import errors  # noqa: E402
from .api import OptimizedModel, optimize  # noqa: E402
from .backend import last_report  # noqa: E402
from .context import latent_grid, step  # noqa: E402
from .errors import BSACompileError  # noqa: E402
from .exporting import export, export_onnx, load_package, package, report_of, rewrite_onnx  # noqa: E402
from .grid import TokenGrid  # noqa: E402
from .ops import attention, block_sparse_attention, register_attend  # noqa: E402
from .passes.rewrite import rewrite  # noqa: E402
from .policy import BSAPolicy, Rule  # noqa: E402
from .report import Report, Site  # noqa: E402
from .selection import BlockSelection  # noqa: E402

__all__ = [
    "BSACompileError",
    "BSAPolicy",
    "BlockSelection",
    "OptimizedModel",
    "Report",
    "Rule",
    "Site",
    "TokenGrid",
    "attention",
    "block_sparse_attention",
    "errors",
    "export",
    "export_onnx",
    "last_report",
    "latent_grid",
    "load_package",
    "optimize",
    "package",
    "register_attend",
    "report_of",
    "rewrite",
    "rewrite_onnx",
    "step",
]
