"""What a model's folder says of the videos that it was trained for."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bsa_compile.errors import CheckpointError, UsageError, must
from bsa_compile.models.longcat.config import read_json_object
from bsa_compile.policy import refuse_unknown

DEFAULTS_NAME = "generation_defaults.json"


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """Values of a call's arguments where the call leaves them out; the released LongCat-Video's by default.

    Attributes:
        height, width: pixels; None: from the areas that LongCat-Video was trained at.
        num_frames, num_inference_steps, guidance_scale, refine_steps: as in `LongCatPipeline.prepare`.
        distilled_steps: `num_inference_steps` of the distilled model.
    """

    height: int | None = None
    width: int | None = None
    num_frames: int = 93
    num_inference_steps: int = 50
    distilled_steps: int = 16
    guidance_scale: float = 4.0
    refine_steps: int = 50

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width."""
        return None if self.height is None or self.width is None else (self.height, self.width)

    def to_dict(self) -> dict[str, Any]:
        """JSON object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_folder(cls, folder: Path) -> GenerationDefaults:
        """Read the folder's file; LongCat-Video's own folder has none.

        Raises:
            CheckpointError: the file is malformed.
        """
        path = folder / DEFAULTS_NAME
        if not path.is_file():
            return cls()
        fields = read_json_object(path)
        try:
            refuse_unknown(str(path), fields, [f.name for f in dataclasses.fields(cls)], UsageError)
        except UsageError as exc:
            raise CheckpointError(str(exc)) from None
        for name, value in fields.items():
            kinds, want = ((int, float), "number") if name == "guidance_scale" else (int, "integer")
            fine = isinstance(value, kinds) and not isinstance(value, bool) and value > 0
            if not (fine or (value is None and name in ("height", "width"))):
                raise CheckpointError(must(f"{path}: {name}", f"be a positive {want}", json.dumps(value)))
        if (fields.get("height") is None) != (fields.get("width") is None):
            got = f"{fields.get('height')} and {fields.get('width')}"
            raise CheckpointError(must(f"{path}: height and width", "be given both or not at all", got))
        return cls(**fields)
