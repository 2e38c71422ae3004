"""Ranks that ask for different things are told apart before anything runs, with one error that names them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ParallelError, must
from .board import Board, named

_SAMPLES = 8  # values of each tensor that tell one checkpoint from another
_SHOWN = 160


def weights_digest(model: nn.Module) -> str:
    """What tells one checkpoint from another: names, shapes, and some values of each tensor that is not sharded."""
    digest = hashlib.sha256()
    samples: list[Tensor] = []
    for name, x in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(x.shape)} {x.dtype};".encode())
        if type(x) in (Tensor, nn.Parameter) and not x.is_meta and x.numel():
            flat = x.detach().reshape(-1)
            samples.append(flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].double())
    if samples:
        digest.update(torch.cat(samples).cpu().numpy().tobytes())  # one wait for the device, not one per tensor
    return digest.hexdigest()[:16]


def agree(board: Board, topic: str, facts: Mapping[str, Any], what: str) -> None:
    """See that every rank has the same facts.

    Args:
        board: where they are shown.
        topic: under which; each one is used once.
        facts: name -> value, in JSON.
        what: what a rank that shows none has not done, for the error.

    Raises:
        ParallelError: on every rank alike: who differs from the most in what, or who showed nothing in time.
    """
    board.show(topic, json.dumps(dict(facts), sort_keys=True, default=str))
    texts = board.wait(topic, what)
    if len(set(texts.values())) == 1:
        return
    known = {rank: json.loads(text) for rank, text in texts.items()}
    for name in facts:
        values = {rank: json.dumps(said.get(name), sort_keys=True) for rank, said in known.items()}
        # The first rank's word counts where as many say the one as the other.
        usual = Counter(values[rank] for rank in board.ranks).most_common(1)[0][0]
        others: dict[str, list[int]] = {}
        for rank, value in values.items():
            if value != usual:
                others.setdefault(value, []).append(rank)
        if others:
            got = "; ".join(f"{_short(value)} on {named(ranks)}" for value, ranks in others.items())
            todo = "Start every rank with the same arguments, files and versions."
            text = must(name, "be the same on every rank", f"{got}; the others have {_short(usual)}", todo)
            raise ParallelError(text)
    raise ParallelError(must("every rank of the mesh", "state the same facts", "different ones"))


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
