"""The Triton kernels, compiled for a GPU of compute capability 9.0; none is needed for that."""

import re
import subprocess

import pytest

pytest.importorskip("triton")

from triton import compile as compile_kernel
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lingua_topk.ops import triton_topk

if triton_topk.INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

HOPPER = GPUTarget("cuda", 90, 32)
TYPES = {
    "alpha_pointer": "*fp64", "bits_pointer": "*i32", "rms_pointer": "*fp32",
    "k": "i32", "width": "i32", "guess": "fp32", "unit": "fp32", "epsilon": "fp32",
}  # fmt: skip
VECTORS = {"bf16": 8, "fp32": 4, "fp64": 2}
HARD = {"HARD": True, "MASKS": 1, "WIDE": False}
ANNEALED = {"HARD": False, "MASKS": 2, "WIDE": False}
FORWARD = {"HAS_UPDATE": True, "ACTIVATION": "relu", "HAS_RMS": False}


def compiled(kernel, dtype: str, block: int, constants: dict, tmp_path) -> tuple[str, str]:
    """PTX, and what the assembler tells of it."""
    shape = {"BLOCK": block, "VECTOR": VECTORS[dtype], "IS_EVEN": True}
    constants = {**constants, **shape}
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else TYPES.get(name, f"*{dtype}") for name in names
    }
    aligned = [name.endswith("pointer") or name == "width" for name in names]
    hints = {(i,): [["tt.divisibility", 16]] for i, is_aligned in enumerate(aligned) if is_aligned}
    source = ASTSource(kernel, signature, constants, hints)
    ptx = compile_kernel(source, HOPPER, {"num_warps": max(1, block // 2048)}).asm["ptx"]
    (tmp_path / "kernel.ptx").write_text(ptx)
    command = [knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", "kernel.ptx", "-o", "kernel.cubin"]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    return ptx, told.stderr


@pytest.mark.parametrize(
    ("dtype", "block", "constants"),
    [
        ("bf16", 1024, {**FORWARD, **HARD}),
        ("bf16", 2048, {**FORWARD, **HARD, "HAS_RMS": True}),
        ("bf16", 2048, {**FORWARD, **ANNEALED}),
        ("fp32", 8192, {**FORWARD, **HARD}),
        ("fp64", 1024, {**FORWARD, **HARD, "WIDE": True}),
    ],
    ids=["1024", "2048 with rms", "2048 annealed", "8192 in fp32", "1024 in fp64"],
)
def test_forward_keeps_a_row_in_registers(dtype, block, constants, tmp_path):
    ptx, told = compiled(triton_topk._forward_kernel, dtype, block, constants, tmp_path)
    assert re.search(r"\b0 bytes spill stores, 0 bytes spill loads", told), told
    assert ".local" not in ptx
    # Rows are read and written 16 bytes a thread at a time.
    for moved in ("ld", "st"):
        assert re.search(rf"{moved}\.global\S*\.(v4\.b32|v2\.b64)", ptx)
    # Subnormal values are values.
    assert not re.search(r"setp\.\w+\.ftz|add\.\S*ftz", ptx)


def test_backward_keeps_a_row_in_registers(tmp_path):
    ptx, told = compiled(triton_topk._backward_kernel, "bf16", 2048, HARD, tmp_path)
    assert re.search(r"\b0 bytes spill stores, 0 bytes spill loads", told), told
    # The bits of a thread's values are its own, or come from its warp.
    assert "ld.shared" not in ptx


def test_a_row_in_one_warp_never_waits_for_another(tmp_path):
    ptx, _ = compiled(triton_topk._forward_kernel, "bf16", 1024, {**FORWARD, **HARD}, tmp_path)
    assert "bar.sync" not in ptx and "ld.shared" not in ptx


def test_an_argument_of_one_stays_a_number():
    """Triton makes constants of arguments that are 1, which have no dtype to be converted."""
    kernel = triton_topk._forward_kernel
    (k,) = [parameter for parameter in kernel.params if parameter.name == "k"]
    assert k.do_not_specialize
