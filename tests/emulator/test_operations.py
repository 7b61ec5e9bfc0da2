"""Every CUDA kernel, emulated: the cases of tests/ops, and the sizes at which kernels turn corners.

The yardstick is that of tests/ops/contract.py: error against float64 beside the reference's own.
"""

from __future__ import annotations

import importlib
import re

import pytest
import test_adaln
import test_attention
import test_interpolate
import test_qk_norm_rope
import test_swiglu
import test_transition_loss
import torch
from contract import DTYPES, OpContract
from emulated import ROOT, emulated, launched, module
from torch import Tensor

from tim.ops._dispatch import KERNEL_OPS

CONTRACTS = {
    "interpolate": test_interpolate.TestInterpolate,
    "swiglu": test_swiglu.TestSwiglu,
    "adaln": test_adaln.TestAdaln,
    "gated_adaln": test_adaln.TestGatedAdaln,
    "qk_norm_rope": test_qk_norm_rope.TestQkNormRope,
    "transition_loss": test_transition_loss.TestTransitionLoss,
    "transition_loss_difference": test_transition_loss.TestDifference,
    "attention": test_attention.TestAttention,
    "packed_attention": test_attention.TestPackedAttention,
}
DIRECTIONS = ("forward", "backward", "tangent")


def adaln_sizes() -> list[tuple]:
    """Hidden sizes up to the largest: one row per warp and several warps, odd and even packs."""
    hidden_sizes = (8, 72, 1152, 1160, 2049, 4096, 8184, 8191, 8192)
    # More samples than rows of a grid; chunks of the backward that differ by a token.
    return [*((1, 3, hidden) for hidden in hidden_sizes), (5, 2, 136), (1, 19, 24), (1, 1, 24)]


def test_every_operation_with_kernels_is_here() -> None:
    kernels = {name for name in KERNEL_OPS if (ROOT / "csrc" / "cuda" / f"{name}.cu").is_file()}
    assert {contract.name for contract in CONTRACTS.values()} == kernels != set()


#: Beside those of tests/ops.
SIZES = {
    # Pieces: a part of one, whole ones and a rest, more than warps, which then take a new row.
    "interpolate": [(3, 64), (5, 1000), (2, 7), (1, 9), (70, 1400)],
    "swiglu": [(3, 64), (5, 1000), (2, 7), (1, 9), (70, 1400)],
    "adaln": adaln_sizes(),
    "gated_adaln": adaln_sizes(),
    # Every multiple of 8, and some that are none; more tokens than one chunk of the backward holds.
    "qk_norm_rope": [
        *((1, 2, 3, head_dim) for head_dim in range(8, 257, 8)),
        (1, 2, 2, 6),
        (1, 2, 2, 90),
        (3, 37, 2, 16),
        (1, 33, 2, 6),
    ],
    # One position, a pack and some, more than a block's; channels for one group and for all.
    # More samples than rows of a grid.
    "transition_loss": [
        *((2, 3, 1, 1, 2), (2, 5, 3, 17, 1), (1, 80, 2, 4, 1), (1, 2, 90, 52, 1)),
        (5, 9, 3, 7, 2),
    ],
    "transition_loss_difference": [(2, 3, 1, 1, 2), (2, 5, 3, 17, 1), (1, 80, 2, 4, 1)],
    # Those of attention are in test_emulated_attention.py.
    "attention": [],
    "packed_attention": [((3, 0, 70, 2), (2, 5, 130, 0), 2, 64)],
}


def runs_kernel(name: str, size: tuple, dtype: torch.dtype) -> bool:
    """Whether a kernel, and not the reference, takes these inputs."""
    if CONTRACTS[name].name != "attention":
        return True
    return dtype != torch.float32 and size[-1] in (64, 72, 96, 128)


def offset(tensor: Tensor) -> Tensor:
    """The same values one element behind an address that 16-byte accesses could start at."""
    memory = tensor.new_zeros(tensor.numel() + 1)
    return memory[1:].view(tensor.shape).copy_(tensor)


def spread(tensor: Tensor) -> Tensor:
    """The same values in rows, or tokens [3, H, D], that lie twice as far apart."""
    if tensor.dim() < 2:
        return tensor
    dim = 2 if tensor.dim() == 5 else tensor.dim() - 1
    memory = torch.cat((tensor, torch.full_like(tensor, torch.nan)), dim)
    return memory.narrow(dim, 0, tensor.shape[dim])


LAYOUTS = {"offset": offset, "spread": spread}


def on_emulator(name: str, layout: str | None = None) -> OpContract:
    """The contract of one operation, with its kernels emulated and its inputs laid out so."""
    contract = CONTRACTS[name]

    class OnEmulator(contract):  # type: ignore[misc,valid-type]
        def prepare(self, size, dtype, device=None, seed=0):
            values = super().prepare(size, dtype, device, seed)
            if layout is None:
                return values
            return tuple(
                [LAYOUTS[layout](t) if isinstance(t, Tensor) else t for t in tensors]
                for tensors in values
            )

        def skip_unless(self, path: str, dtype: torch.dtype) -> str:
            return "cpu"

        @staticmethod
        def on(path: str):
            return emulated(offset) if layout == "offset" else emulated()

    return OnEmulator()


def run(contract: OpContract, direction: str, size: tuple, dtype: torch.dtype) -> None:
    launched.clear()
    getattr(contract, f"test_{direction}")(size, dtype, "emulator")
    empty = contract.prepare(size, dtype)[0][0].numel() == 0
    assert bool(launched) == (not empty), "the reference ran in place of the kernel"


def cases(sizes: dict[str, list[tuple]]) -> pytest.MarkDecorator:
    """Name, size and direction of what each operation has kernels for, in every dtype."""

    def parametrise(test):
        return pytest.mark.parametrize(
            ("dtype", "name", "size", "direction"),
            [
                pytest.param(
                    dtype, name, size, direction, id=f"{str(dtype)[6:]}-{name}-{size}-{direction}"
                )
                for dtype in DTYPES
                for name, contract in CONTRACTS.items()
                for size in sizes[name]
                for direction in DIRECTIONS
                if hasattr(contract, f"test_{direction}") and runs_kernel(name, size, dtype)
            ],
        )(test)

    return parametrise


@cases({name: list(contract.sizes) for name, contract in CONTRACTS.items()})
def test_the_cases_of_the_operation(name, size, direction, dtype) -> None:
    run(on_emulator(name), direction, size, dtype)


@cases(SIZES)
def test_sizes_of_the_kernels(name, size, direction, dtype) -> None:
    run(on_emulator(name), direction, size, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@cases({name: [contract.sizes[2]] for name, contract in CONTRACTS.items()})
def test_layouts_that_wide_accesses_cannot_take(name, size, direction, dtype, layout) -> None:
    run(on_emulator(name, layout), direction, size, dtype)


@pytest.mark.parametrize(
    "name", [n for n, c in CONTRACTS.items() if c.with_tangent and c.name != "attention"]
)
def test_absent_tangents_count_as_zero(name) -> None:
    on_emulator(name).test_tangent_of_each_input_alone("emulator")


#: Modules, whose names in their package are those of the operations.
ADALN, TRANSITION_LOSS = map(importlib.import_module, ("tim.ops.adaln", "tim.ops.transition_loss"))


@pytest.mark.parametrize("name", ["adaln", "gated_adaln"])
@pytest.mark.parametrize("chunks", [1, 2, 5, 13])
def test_adaln_adds_the_gradients_of_any_number_of_chunks(name, chunks, monkeypatch) -> None:
    monkeypatch.setattr(ADALN, "_chunks", lambda batch, tokens: chunks)
    for dtype in DTYPES:
        run(on_emulator(name), "backward", (2, 13, 136), dtype)


@pytest.mark.parametrize("chunks", [0, 14])
def test_adaln_refuses_chunks_without_tokens(chunks, monkeypatch) -> None:
    monkeypatch.setattr(ADALN, "_chunks", lambda batch, tokens: chunks)
    message = rf"adaln_backward: chunks must be 1 to 13 \(tokens\), .* got {chunks}"
    with pytest.raises(ValueError, match=message):
        run(on_emulator("adaln"), "backward", (2, 13, 8), torch.float32)


@pytest.mark.parametrize("name", ["transition_loss", "transition_loss_difference"])
@pytest.mark.parametrize("parts", [1, 3, 40])
def test_transition_loss_adds_any_number_of_parts(name, parts, monkeypatch) -> None:
    monkeypatch.setattr(TRANSITION_LOSS, "parts", lambda batch, positions: parts)
    for dtype in DTYPES:
        for shape in ((6, 7), (4, 96)):  # parts of one position, of none whole packs, of several
            run(on_emulator(name), "forward", (2, 5, *shape, 1), dtype)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda k, p: k.transition_loss(
                p, p, p, 0, 0, 0, 0, p, 0.1, p, 2, p, p, p, p, 0, 2, 1 << 31, 3, 1, True, 0, 0, 0
            ),
            r"transition_loss of shape \[2, 2147483648, 3\]: channels must be at most 1073741824",
        ),
        (
            lambda k, p: k.transition_loss(
                p, p, p, 0, 0, 0, 0, p, 0.1, p, 2, p, p, p, p, 0, 2, 4, 3, 2, True, 0, 0, 0
            ),
            r"transition_loss: parts must be 1 to 3 \(positions\), with memory .*, got 2",
        ),
        (
            lambda k, p: k.transition_loss_backward(p, p, p, p, 2, 1 << 31, 3, True, 0, 0, 0),
            "transition_loss_backward of shape .*: channels must be at most 1073741824 on a GPU",
        ),
        (
            lambda k, p: k.qk_norm_rope(*[p] * 10, 1, 2, 1 << 32, 8, 8, 8, 1e-6, 0, 0),
            r"qk_norm_rope of shape \[1, 2, 4294967296, 8\]: heads must be at most 2097152",
        ),
        (
            lambda k, p: k.qk_norm_rope_backward(*[p] * 13, 1, 2, 3, 258, 8, 8, 1e-6, 0, 0),
            r"qk_norm_rope_backward of shape \[1, 2, 3, 258\]: head_dim must be at most 256",
        ),
        (
            lambda k, p: k.qk_norm_rope_backward(*[p] * 13, 1, 2, 3, 7, 8, 8, 1e-6, 0, 0),
            "qk_norm_rope_backward: head_dim must be even, got 7",
        ),
        (
            lambda k, p: k.adaln(*[p] * 9, 1, 2, 1 << 33, 0, 0, 0, 1e-6, 0, 0),
            r"adaln of shape \[1, 2, 8589934592\]: channels must be at most 8192 on a GPU, got 85",
        ),
    ],
)
def test_sizes_beyond_what_the_kernels_count_are_refused(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call(module(), torch.zeros(1).data_ptr())


#: Tests of tests/ops that fit any kernel: dtypes that differ, views, values that are special.
CHECKS = [
    test_adaln.test_gradient_of_only_one_output_of_the_pair,
    test_adaln.test_large_mean_does_not_cancel,
    test_adaln.test_small_rows_have_a_finite_tangent_in_float16,
    test_adaln.test_strided_inputs_and_wider_residual,
    test_interpolate.test_strided_inputs,
    test_qk_norm_rope.test_half_precision_tokens_with_float32_parameters,
    test_qk_norm_rope.test_quarter_turn_maps_a_b_to_minus_b_a,
    test_qk_norm_rope.test_rotation_keeps_the_length_of_every_pair,
    test_qk_norm_rope.test_tokens_of_a_longer_sequence_are_read_in_place,
    test_swiglu.test_halves_of_one_product_are_read_in_place,
    test_swiglu.test_large_magnitudes_do_not_overflow,
    test_swiglu.test_nan_and_infinity_propagate,
    test_transition_loss.test_difference_of_two_predictions_equals_its_quotient,
    test_transition_loss.test_equal_prediction_and_target_have_no_error,
    test_transition_loss.test_half_precision_prediction_beside_float32_latents,
    test_transition_loss.test_non_finite_values_stay_visible,
    test_transition_loss.test_written_out,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_what_holds_for_any_kernel(check) -> None:
    launched.clear()
    with emulated():
        check()
    assert launched


def test_nothing_is_launched_for_empty_arrays() -> None:
    emulator = module()
    kernels = [getattr(emulator, name) for name in dir(emulator) if name.startswith(KERNEL_OPS)]
    assert len(kernels) >= 12
    for kernel in kernels:
        kinds = re.findall(r"\w+: (?:typing\.)?(\w+)", kernel.__doc__.split("->")[0])
        # A thread that ran would read at address 0.
        kernel(*[{"bool": False, "Annotated": (0, 0, 0)}.get(kind, 0) for kind in kinds])


#: Seeds that shuffle blocks and threads, beside sizes of the device.
DEVICES = [(0, 2), (1, 2), (2, 1), (3, 5)]


@cases({name: list(contract.sizes[2:4]) for name, contract in CONTRACTS.items()})
def test_results_depend_neither_on_the_order_nor_on_the_device(
    name, size, direction, dtype
) -> None:
    contract = on_emulator(name)
    inputs, tangents = contract.prepare(size, dtype)
    results = []
    for order, multiprocessors in DEVICES:
        with emulated() as emulator:
            emulator.set_device(order=order, multiprocessors=multiprocessors)
            if direction == "forward":
                results.append(contract.run(contract.op, inputs))
            elif direction == "backward":
                results.append(contract.gradients(contract.op, inputs))
            else:
                results.append(contract.jvp(contract.op, inputs, tangents)[1])
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))
