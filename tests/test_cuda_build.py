"""CUDA kernels without a GPU: what was built, and what a call does then."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from tim import _extension, ops
from tim.ops import _dispatch as dispatch
from tim.ops import _table

INFO = _extension.build_info()

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

    cpu, cuda = signatures(_extension.C.cpu), signatures(_extension.C.cuda)
    # Some operations have other kernels for some architectures, with the same arguments.
    others = {name: cuda.pop(name) for name in list(cuda) if name.endswith("_hopper")}
    assert cpu == cuda
    for name, signature in others.items():
        assert signature.replace(name, name.removesuffix("_hopper")) in cpu.values()


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
    assert _extension.C.cuda.adaln_backward(*[0] * 14, 2, 0, 8, 0, 0, 0, 1e-6, 0, 0) is None


@with_cuda
def test_what_python_let_through_is_refused() -> None:
    p = torch.ones(4, 8).data_ptr()
    with pytest.raises(ValueError, match=r"dtype must be 0 .*, 1 .* or 2 .* on a GPU, got 7"):
        _extension.C.cuda.swiglu(p, 8, p, 8, p, 4, 8, 7, 0)
    with pytest.raises(ValueError, match="channels must be at most 8192 on a GPU, got 8200"):
        _extension.C.cuda.adaln(p, 0, 0, p, p, 0, p, 0, 0, 1, 1, 8200, 0, 0, 0, 1e-6, 0, 0)
    with pytest.raises(ValueError, match="head_dim must be at most 256 on a GPU, got 258"):
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
    reason = dispatch.why_not(name, too_long)
    assert f"takes rows of up to {limit}, got {list(too_long.shape)}" in reason


@with_cuda
def test_tensors_of_a_cpu_never_reach_a_cuda_kernel(monkeypatch) -> None:
    asked = []

    def kernels(device_type: str):
        asked.append(device_type)
        return getattr(_extension.C, device_type)

    monkeypatch.setattr(_extension, "kernels", kernels)
    # An earlier test of this process may have looked the kernel up already.
    dispatch._kernel.cache_clear()
    _table.recall.cache_clear()
    x = torch.randn(2, 8)
    torch.testing.assert_close(ops.swiglu(x, x), F.silu(x) * x)
    assert "cuda" not in asked and "cpu" in asked
