"""Compile the kernels for GPUs that are not there, and say what the code needs: registers, spills, shared memory, mma.

A program of its own, since a process that interprets Triton cannot compile it: ``kernels_ahead.py JSON`` takes a list
of cases (see ``compile_attention`` and ``compile_move``) and prints a list of answers.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from verifiers.kernels import compaction, tree_attention

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DIVISIBLE = [["tt.divisibility", 16]]
FUSED = {"enable_fp_fusion": True}
_FLAVOURS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")


def compile_attention(
    arch: int, rows: int, dim: int, dtype: str, groups: int = 4, capped: bool = False, tile: Any = None
) -> dict[str, Any]:
    """The split kernel with the tile that a launch over ``rows`` packed rows takes, or another."""
    launch = tree_attention.Launch(*tile) if tile else tree_attention.launch_for(rows, dim, DTYPES[dtype], arch // 10)
    pointers = {name: f"*{dtype}" for name in "QKV"} | {"MASK": "*i64", "OUT": "*fp32", "LSE": "*fp32"}
    strides = {f"{tensor}_{axis}": "i32" for tensor in "qkv" for axis in ("batch", "head")}
    strides |= {"q_node": "i32", "k_slot": "i32", "v_slot": "i32"}
    free = {"mask_batch": "i32", "mask_node": "i32", "nodes": "i32", "scale": "fp32", "cap": "fp32"}
    constants: dict[str, Any] = {
        "HKV": 8,
        "G": groups,
        "D": dim,
        "BD": tree_attention.padded_dim(dim),
        "BM": launch.rows,
    }
    constants |= {"BN": launch.keys, "CAPPED": capped, "PRECISION": tree_attention.PRECISION}
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    answer = _compile(tree_attention._partial, pointers | strides, free, constants, options, arch)
    return answer | {"launch": launch._asdict()}


def compile_merge(arch: int, dim: int, dtype: str, sinks: bool = False) -> dict[str, Any]:
    """The merge of all parts that there may be."""
    pointers = {"OUT": "*fp32", "LSE": "*fp32", "SINKS": f"*{dtype}", "RESULT": f"*{dtype}"}
    constants = {"HKV": 8, "G": 4, "D": dim, "BD": tree_attention.padded_dim(dim), "BR": tree_attention._MERGED_ROWS}
    constants |= {"BS": tree_attention._PARTS, "WITH_SINKS": sinks}
    free = {"count": "i32", "parts": "i32"}
    return _compile(tree_attention._merge, pointers, free, constants, {"num_warps": 4}, arch)


def compile_move(arch: int, path: int, row: int, word: int = 4, whole: bool = True) -> dict[str, Any]:
    """The move of a path of so many slots, of ``row`` bytes each."""
    tile = compaction.tile_for(path, row // word)
    pointers = {"TABLE": "*i64", "SOURCE": "*i64", "TARGET": "*i64"}
    constants: dict[str, Any] = {"BYTES": word, "WHOLE": whole, "BM": triton.next_power_of_2(path), "BW": tile}
    return _compile(compaction._move, pointers, {"slots": "i32", "BATCH": "i32"}, constants, {"num_warps": 4}, arch)


def _compile(
    kernel: Any, aligned: dict[str, str], free: dict[str, str], constants: dict[str, Any], options: Any, arch: int
) -> dict[str, Any]:
    signature = {name: {**aligned, **free}.get(name, "constexpr") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): DIVISIBLE for name in aligned}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in constants.items()}, places)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options | FUSED)
    ptx = compiled.asm["ptx"]
    used = {
        name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", _resources(compiled.asm["cubin"]))
    }
    flavours = [flavour for flavour in _FLAVOURS if flavour in ptx]
    barrier = ptx.rfind("bar.sync")
    return {
        "registers": used["REG"],
        "spilled": used["STACK"] + used["LOCAL"],
        "shared": compiled.metadata.shared,
        "mma": flavours[0] if flavours else None,
        "whole_lines": "cp.async.cg.shared.global" in ptx or ".v4.b32" in ptx,  # 16 bytes per thread and access
        "loads_after_last_barrier": "ld.global" in ptx[barrier:],
        "stores_before_last_barrier": "st.global" in ptx[:barrier],
        "barrier": barrier >= 0,
    }


def _resources(cubin: bytes) -> str:
    """What a tool that comes with Triton reads in the machine code; it does not need the GPU."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    cases = json.loads(sys.argv[1])
    makers: dict[str, Callable[..., Any]] = {
        "attention": compile_attention,
        "merge": compile_merge,
        "move": compile_move,
    }
    json.dump([makers[case.pop("kernel")](**case) for case in cases], sys.stdout)
