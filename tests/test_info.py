"""`tim info`."""

import pytest
import torch

import tim.info as info
from tim import _extension, ops
from tim.ops import _dispatch as dispatch
from tim.ops import _table


def test_facts_name_versions_threads_and_the_extension(capsys) -> None:
    assert info.main([]) == 0
    told = capsys.readouterr().out
    assert torch.__version__ in told and "safetensors" in told and "processors" in told
    assert ("built by" in told) == (_extension.C is not None)
    for name, *backends in info.operations():
        assert all(word in told for word in (name, *backends))


def test_a_missing_extension_is_explained(monkeypatch) -> None:
    monkeypatch.setattr(_extension, "C", None)
    monkeypatch.setattr(_extension, "REASON", "no such module")
    monkeypatch.setattr(
        _extension, "build_info", lambda: {"reason": "no C++ compiler", "remedy": "install g++"}
    )
    facts = dict(info.facts())
    assert facts["extension"] == "not built: no C++ compiler"
    assert facts["to get it"] == "install g++"
    monkeypatch.setattr(_extension, "build_info", dict)
    facts = dict(info.facts())
    assert facts["extension"] == "not built: no such module"
    assert "pip install ." in facts["to get it"]
    monkeypatch.setattr(_extension, "build_info", lambda: {"compiler": "GNU 12", "reason": None})
    facts = dict(info.facts())
    assert facts["extension"] == "built, but not loaded: no such module"
    assert "compiler" not in facts["to get it"]


def rows_of(name: str, device: str) -> dict[str, ops.Entry]:
    """What the table says of one operation on one device, by direction."""
    entries = [e for e in ops.overview() if (e.operation, e.device) == (name, device)]
    rows = {direction: entry for entry in entries for direction in entry.directions}
    assert len(rows) == sum(len(entry.directions) for entry in entries), "a direction twice"
    return rows


@pytest.fixture
def every_kernel(monkeypatch) -> None:
    """As if the extension held all kernels of both devices."""
    monkeypatch.setattr(_table, "has_kernel", lambda name, device: True)


def test_operations_are_listed_with_what_runs_them(capsys) -> None:
    rows = {name: backends for name, *backends in info.operations()}
    assert rows.keys() == ops.available().keys()
    for name, devices in ops.available().items():
        for device, told in zip(ops.DEVICES, rows[name], strict=True):
            assert (told == "kernel") == (device in devices), (name, device, told)
    assert info.main(["--ops"]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in rows) and "torch " not in told
    assert str(ops.MEASURED["cpu"]) in told


@pytest.mark.parametrize("name", ops.KERNEL_OPS)
def test_the_table_is_what_calls_go_by(name) -> None:
    rows = rows_of(name, "cpu")
    assert rows.keys() == set(_table.DIRECTIONS)
    runs = {dtype for entry in rows.values() for dtype in entry.kernel}
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        x = torch.ones(2, 8, dtype=dtype)
        assert (dispatch.why_not(name, x) is None) == (_table.dtype_name(dtype) in runs)


def test_limits_stand_beside_the_dtypes(every_kernel) -> None:
    adaln = rows_of("adaln", "cuda")["tangent"]
    assert adaln.kernel == ("float32", "bfloat16", "float16")
    assert "last dimension from 8193 (the kernel takes rows of up to 8192)" in adaln.otherwise
    attention = rows_of("attention", "cuda")["forward"]
    assert attention.kernel == ("bfloat16", "float16")
    assert "the kernel takes bfloat16 and float16, got float32" in attention.otherwise
    assert "last dimension not 64, 72, 96, 128" in attention.otherwise
    assert dispatch.why_not("attention", torch.ones(1, 1, 1, 80)) is None, "limits of a GPU"


def test_directions_without_a_rule_are_told(every_kernel) -> None:
    assert rows_of("interpolate", "cpu")["backward"].kernel == ()
    assert "raises" in rows_of("transition_loss", "cpu")["tangent"].otherwise
    assert "tangents of q_weight" in rows_of("qk_norm_rope", "cpu")["tangent"].otherwise


def test_what_was_measured_to_be_slower_is_told_with_its_range(every_kernel, monkeypatch) -> None:
    rule = _table.Rule(
        "swiglu", "cpu", "0.9x of its reference", directions=("backward",),
        dtypes=(torch.bfloat16,), elements=(0, 64),
    )  # fmt: skip
    monkeypatch.setattr(_table, "SLOWER", (rule,))
    rows = rows_of("swiglu", "cpu")
    assert "elements up to 64 and bfloat16 (0.9x of its reference)" in rows["backward"].otherwise
    assert rows["forward"].otherwise == "other dtypes"
    with ops.kernels("on"):
        assert rows_of("swiglu", "cpu")["backward"].otherwise == "other dtypes"


def test_the_environment_variable_is_told(capsys, every_kernel) -> None:
    with ops.kernels("on,swiglu:off"):
        assert rows_of("swiglu", "cpu")["forward"].kernel == ()
        assert rows_of("adaln", "cpu")["forward"].kernel == ("float32", "bfloat16")
        assert ("swiglu", "PyTorch", "PyTorch") in info.operations()
        assert info.main(["--ops"]) == 0
    told = capsys.readouterr().out
    assert "everything: TIM_KERNELS=on,swiglu:off is in force" in told


def test_an_empty_choice_and_a_last_comma_are_the_table(every_kernel) -> None:
    with ops.kernels(""):
        assert rows_of("swiglu", "cpu")["forward"].kernel == ("float32", "bfloat16")
    with ops.kernels("swiglu:off,"):
        assert rows_of("swiglu", "cpu")["forward"].kernel == ()
        assert rows_of("adaln", "cpu")["forward"].kernel == ("float32", "bfloat16")
    with pytest.raises(ValueError, match="got 'fast'"), ops.kernels("fast"):
        pass


def test_operations_without_the_extension(monkeypatch) -> None:
    monkeypatch.setattr(_extension, "C", None)
    monkeypatch.setattr(_extension, "REASON", "no such module")
    assert {told for _, *backends in info.operations() for told in backends} == {"PyTorch"}
    assert rows_of("swiglu", "cpu")["forward"].otherwise == "everything: no such module"


def test_memory_of_a_preset(capsys) -> None:
    assert info.main(["--preset", "digits", "--batch", "16", "--ranks", "2"]) == 0
    told = capsys.readouterr().out
    assert "16 images a step on 2 ranks" in told and "fsdp" in told and "gradients" in told
    for wrong in ("--batch=0", "--batch=15", "--ranks=0"):
        with pytest.raises(ValueError, match=r"at least 1|multiple"):
            info.main(["--preset", "digits", "--ranks", "2", wrong])
