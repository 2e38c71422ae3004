"""Block-sparse models as files: `torch.export` programs, AOTInductor packages and ONNX."""

from __future__ import annotations

from .aoti import load_package as load_package
from .aoti import package as package
from .onnx_program import export_onnx as export_onnx
from .onnx_rewrite import rewrite_onnx as rewrite_onnx
from .program import export as export
from .program import report_of as report_of
from .program import save as save
