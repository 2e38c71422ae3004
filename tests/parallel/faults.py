"""Jobs in which one rank differs from the others, or is lost."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

import bsa_compile
from bsa_compile.errors import ParallelError

from .jobs import POLICY, Case, inputs_of, mesh_of, model_of
from .pool import BACKEND, DEVICE

SECONDS = 4.0


def _optimized(case: Case, model: Any = None, **options: Any) -> Any:
    options = {"backend": "eager", "dynamic": False, "mesh_timeout": SECONDS, **options}
    policy = options.pop("policy", POLICY)
    return bsa_compile.optimize(model or model_of(case.heads), policy, mesh=mesh_of(case), **options)


def start(what: str, different: int) -> str:
    """The error of optimize where one rank differs in something."""
    here = dist.get_rank() == different
    model, options = model_of(4), {}
    if here and what == "policy":
        options["policy"] = bsa_compile.BSAPolicy(sparsity=0.61)
    if here and what == "checkpoint":
        with torch.no_grad():
            model.blocks[1].ffn.w2.weight[0, 0] += 1e-3
    if here and what == "configuration":
        model = model_of(2)
    if here and what == "options":
        options["dynamic"] = True
    try:
        _optimized(Case((2, 2, 2), {"context": dist.get_world_size()}), model, **options)
    except ParallelError as exc:
        return str(exc)
    return ""


def one_call(what: str, different: int) -> str:
    """The error of a call where one rank differs in something."""
    case = Case((3, 2, 2), {"context": dist.get_world_size()})
    fast, given = _optimized(case), inputs_of(case)
    if dist.get_rank() == different:
        if what == "hidden_states":
            given["hidden_states"] = given["hidden_states"][..., :-1, :]
        elif what == "policy":
            fast.disable_bsa()
        else:
            given[what] = 1
    try:
        fast(**given)
    except ParallelError as exc:
        return str(exc)
    return ""


def absent(missing: int) -> str:
    """The error where one rank makes no call."""
    case = Case((3, 2, 2), {"context": dist.get_world_size()})
    fast = _optimized(case, mesh_timeout=1.5)
    if dist.get_rank() == missing:
        dist.barrier()
        return "absent"
    try:
        fast(**inputs_of(case))
    except ParallelError as exc:
        return str(exc)
    finally:
        dist.barrier()
    return ""


def lose(fault: str, where: str, store: str, rank: int) -> None:
    """Two ranks, of which the second is lost in its second call or backward pass, in block 1."""
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(BACKEND, init_method=f"file://{store}", rank=rank, world_size=2)
    case = Case((3, 2, 2), {"context": 2})
    fast, given = _optimized(case, mesh_timeout=60.0), inputs_of(case)  # on a busy machine the first call takes long
    board = fast._bsa_runtime.context._board

    def lower_timeout() -> None:
        board.timeout = SECONDS
        time.sleep(1.5)  # until the watches of both ranks look as often as that asks for

    loses = {"hang": _hang, "kill": _kill, "stop": _stop}[fault]
    if where == "backward":
        fast(**given).square().mean().backward()
        lower_timeout()
        if rank == 1:
            fast.blocks[1].ffn.w2.weight.register_hook(loses)
        fast(**given).square().mean().backward()
    else:
        with torch.no_grad():
            fast(**given)
            lower_timeout()
            if rank == 1:
                fast.blocks[1].forward = loses
            fast(**given)
    if DEVICE == "cuda":
        torch.cuda.synchronize()  # like whoever reads what came out: the calls have only been given to the GPU


def _hang(*args: Any, **kwargs: Any) -> None:
    time.sleep(100)


def _kill(*args: Any, **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop(*args: Any, **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


if __name__ == "__main__":
    lose(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
