"""`tim info`."""

import pytest
import torch

import tim.info as info
from tim import _extension, ops


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


def test_operations_are_listed_with_what_runs_them(capsys, monkeypatch) -> None:
    monkeypatch.delenv("TIM_KERNELS", raising=False)
    rows = {name: backends for name, *backends in info.operations()}
    assert rows.keys() == ops.available().keys()
    for name, devices in ops.available().items():
        for device, told in zip(("cpu", "cuda"), rows[name], strict=True):
            assert (told == "kernel") == (device in devices), (name, device, told)
    assert info.main(["--ops"]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in rows) and "python" not in told


def test_kernels_that_are_turned_off_are_not_said_to_run(monkeypatch) -> None:
    monkeypatch.setenv("TIM_KERNELS", "off")
    assert {told for _, *backends in info.operations() for told in backends} == {
        "PyTorch (TIM_KERNELS=off)"
    }


def test_operations_without_the_extension(monkeypatch) -> None:
    monkeypatch.delenv("TIM_KERNELS", raising=False)
    monkeypatch.setattr(_extension, "C", None)
    monkeypatch.setattr(ops, "available", lambda: {"swiglu": ()})
    expected = [f"PyTorch ({device} kernels not built)" for device in ("cpu", "cuda")]
    assert info.operations() == [("swiglu", *expected)]


def test_memory_of_a_preset(capsys) -> None:
    assert info.main(["--preset", "digits", "--batch", "16", "--ranks", "2"]) == 0
    told = capsys.readouterr().out
    assert "16 images a step on 2 ranks" in told and "fsdp" in told and "gradients" in told
    for wrong in ("--batch=0", "--batch=15", "--ranks=0"):
        with pytest.raises(ValueError, match=r"at least 1|multiple"):
            info.main(["--preset", "digits", "--ranks", "2", wrong])
