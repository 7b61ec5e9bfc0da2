"""CUDA kernels without a GPU: what was built, what a call does then, their index logic."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from tim import _extension, ops
from tim.ops import _dispatch as dispatch

ROOT = Path(__file__).parents[1]
INFO = _extension.build_info()
DTYPES = {0: torch.float32, 1: torch.bfloat16, 2: torch.float16}

with_cuda = pytest.mark.skipif(not INFO.get("cuda"), reason="the extension holds no CUDA kernels")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.mark.skipif(_extension.C is None, reason="the extension is not built")
def test_the_build_info_tells_whether_there_are_cuda_kernels() -> None:
    assert hasattr(_extension.C, "cuda") == bool(INFO["cuda"])
    assert bool(INFO["cuda_architectures"]) == bool(INFO["cuda"])
    assert ("cuda" in ops.available()["swiglu"]) == bool(INFO["cuda"])


@with_cuda
def test_both_back_ends_have_the_same_functions() -> None:
    def signatures(module) -> dict[str, str]:
        functions = {name: getattr(module, name) for name in dir(module) if name[0] != "_"}
        return {name: f.__doc__ for name, f in functions.items() if name != "isa"}

    assert signatures(_extension.C.cuda) == signatures(_extension.C.cpu)


@with_cuda
@without_gpu
def test_a_launch_without_a_gpu_names_the_operation_and_its_shape() -> None:
    x = torch.ones(4, 8)
    p = x.data_ptr()
    with pytest.raises(RuntimeError, match=r"swiglu of shape \[4, 8\]: .*CUDA error \d+"):
        _extension.C.cuda.swiglu(p, 8, p, 8, p, 4, 8, 0, 0)
    with pytest.raises(RuntimeError, match=r"transition_loss_backward of shape \[1, 4, 8\]: "):
        _extension.C.cuda.transition_loss_backward(p, p, p, p, 1, 4, 8, True, 0, 0, 0)
    assert torch.equal(x, torch.ones(4, 8))


@with_cuda
def test_nothing_is_launched_for_empty_arrays() -> None:
    assert _extension.C.cuda.swiglu(0, 0, 0, 0, 0, 0, 8, 0, 0) is None
    assert _extension.C.cuda.adaln_backward(*[0] * 13, 2, 0, 8, 0, 0, 1e-6, 0, 0) is None


@with_cuda
def test_what_python_let_through_is_refused() -> None:
    p = torch.ones(4, 8).data_ptr()
    with pytest.raises(ValueError, match=r"dtype must be 0 .*, 1 .* or 2 .* on a GPU, got 7"):
        _extension.C.cuda.swiglu(p, 8, p, 8, p, 4, 8, 7, 0)
    with pytest.raises(ValueError, match="channels must be at most 8192 on a GPU, got 8200"):
        _extension.C.cuda.adaln(p, 0, 0, p, p, 0, p, 0, 0, 1, 1, 8200, 0, 0, 0, 1e-6, 0, 0)
    with pytest.raises(ValueError, match="head_dim must be even and at most 256 on a GPU, got 258"):
        _extension.C.cuda.qk_norm_rope(*[p] * 10, 1, 1, 1, 258, 774, 774, 1e-5, 0, 0)
    with pytest.raises(ValueError, match="data_dtype must be dtype, or 0"):
        _extension.C.cuda.transition_loss_backward(p, p, p, p, 1, 4, 8, True, 0, 1, 0)


@with_cuda
@pytest.mark.parametrize(
    ("name", "shape", "limit"), [("adaln", (1, 1), 8192), ("qk_norm_rope", (1, 1, 3, 1), 256)]
)
def test_rows_too_long_for_registers_run_the_reference(name, shape, limit) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        fits, too_long = (torch.empty(*shape, n, device="cuda") for n in (limit, limit + 2))
    assert dispatch.why_not(name, fits) is None
    assert f"takes rows up to {limit}, got {limit + 2}" in dispatch.why_not(name, too_long)


@with_cuda
def test_tensors_of_a_cpu_never_reach_a_cuda_kernel(monkeypatch) -> None:
    asked = []

    def kernels(device_type: str):
        asked.append(device_type)
        return getattr(_extension.C, device_type)

    monkeypatch.setattr(_extension, "kernels", kernels)
    # An earlier test of this process may have looked the kernel up already.
    dispatch._kernel.cache_clear()
    dispatch.has_kernel.cache_clear()
    x = torch.randn(2, 8)
    torch.testing.assert_close(ops.swiglu(x, x), F.silu(x) * x)
    assert "cuda" not in asked and "cpu" in asked


@pytest.fixture(scope="module")
def host_kernel(tmp_path_factory):
    """Elementwise kernels of csrc/cuda, compiled by the host's compiler (tests/host_cuda)."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("host_cuda")
    headers = ROOT / "tests" / "host_cuda"
    sources = [ROOT / "csrc" / "cuda" / f"{name}.cu" for name in ("interpolate", "swiglu")]
    subprocess.run(
        [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", "-Wno-unknown-pragmas",
         f"-I{headers}", f"-I{ROOT / 'csrc'}", "-x", "c++", str(headers / "kernels.cpp"),
         *map(str, sources), "-o", str(folder / "kernels.so")],
        check=True,
    )  # fmt: skip
    library = ctypes.CDLL(str(folder / "kernels.so"))
    library.kernel.restype = ctypes.c_void_p

    def call(name: str, *arguments: torch.Tensor | int | None) -> None:
        values = [a.data_ptr() if isinstance(a, torch.Tensor) else a or 0 for a in arguments]
        # Pointers, sizes and strides all take a 64-bit register; the dtype, the last but one, not.
        kinds = [ctypes.c_int64] * len(values)
        kinds[-2] = ctypes.c_int
        function = ctypes.CFUNCTYPE(None, *kinds)(library.kernel(name.encode()))
        function(*values)

    return call


def array(shape: tuple[int, ...], dtype: torch.dtype, offset: int, fill: bool = True):
    """A tensor `offset` elements from a 64-byte boundary, between guards that nothing may write."""
    size = torch.Size(shape).numel()
    memory = torch.full((size + 128,), 7.0, dtype=dtype)
    start = 64 + offset - memory.data_ptr() // memory.element_size() % 32
    tensor = memory[start : start + size].view(shape)
    tensor.copy_(torch.randn(shape)) if fill else tensor.fill_(torch.nan)
    tensor.guards = (memory[:start], memory[start + size :])
    return tensor


def assert_written(tensor: torch.Tensor, expected: torch.Tensor) -> None:
    assert all((guard == 7).all() for guard in tensor.guards), "written out of bounds"
    tolerance = 4 * torch.finfo(tensor.dtype).eps
    expected = expected.double()
    torch.testing.assert_close(
        tensor.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
    )


# Aligned and not; whole packs, a remainder, more pieces than warps, which then wrap into a new row.
LAYOUTS = [(3, 64, 0), (5, 1000, 0), (2, 7, 0), (3, 64, 1), (1, 9, 3), (70, 1400, 0)]


@pytest.mark.parametrize("code", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_index_logic_of_interpolate(host_kernel, layout, code) -> None:
    *shape, offset = layout
    x, z = (array(shape, DTYPES[code], offset) for _ in range(2))
    coefficients = torch.randn(shape[0], 4)
    a, b = (array(shape, DTYPES[code], offset, fill=False) for _ in range(2))
    host_kernel("interpolate", x, z, coefficients, a, b, *shape, code, 0)
    c = coefficients.double()[:, :, None]
    assert_written(a, c[:, 0] * x.double() + c[:, 1] * z.double())
    assert_written(b, c[:, 2] * x.double() + c[:, 3] * z.double())


@pytest.mark.parametrize("code", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_index_logic_of_swiglu(host_kernel, layout, code) -> None:
    rows, cols, offset = layout
    dtype = DTYPES[code]
    packed = array((rows, 2 * cols), dtype, offset)
    gate, up = packed.double().chunk(2, dim=1)
    operands = (packed, 2 * cols, packed[:, cols:], 2 * cols)
    new = [array((rows, cols), dtype, offset, fill=False) for _ in range(5)]
    out, dgate, dup, out_again, tout = new
    grad, tgate = (array((rows, cols), dtype, offset) for _ in range(2))
    host_kernel("swiglu", *operands, out, rows, cols, code, 0)
    host_kernel("swiglu_backward", grad, *operands, dgate, dup, rows, cols, code, 0)
    # A tangent of `up` that is absent counts as zero.
    host_kernel(
        "swiglu_tangent", *operands, tgate, cols, None, 0, out_again, tout, rows, cols, code, 0
    )
    s = gate.sigmoid()
    silu, slope = gate * s, s * (1 + gate * (1 - s))
    assert_written(out, silu * up)
    assert_written(out_again, silu * up)
    assert_written(dgate, grad.double() * up * slope)
    assert_written(dup, grad.double() * silu)
    assert_written(tout, tgate.double() * up * slope)
