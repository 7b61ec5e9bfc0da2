"""Calls recognised as earlier ones: nothing that changes what an operation has to do is missed."""

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap

from tim import ops
from tim.ops import _seen, attention, qk_norm_rope
from tim.ops._seen import Seen


@pytest.fixture
def seen() -> Seen:
    result = Seen()
    result.note("cpu", torch.zeros(2, 3), torch.zeros(3))
    return result


def arguments() -> list[Tensor]:
    return [torch.ones(2, 3), torch.ones(3)]


def test_tensors_like_those_are_recognised(seen):
    assert _seen._Guards is not None, "the guards of this PyTorch are not what we need"
    assert seen.recall(*arguments()) == "cpu"
    assert seen.recall(torch.ones(6)[:6].view(2, 3), torch.ones(4)[1:]) == "cpu"


class Labelled(Tensor):
    pass


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.double(),
        lambda x: x.bfloat16(),
        lambda x: x[:1],
        lambda x: x.new_ones(3, 2).mT,
        lambda x: x[None],
        lambda x: torch.nn.Parameter(x),
        lambda x: x.requires_grad_(),
        lambda x: torch._neg_view(x),
        lambda x: torch._efficientzerotensor(x.shape),
        lambda x: x.to("meta"),
        lambda x: x.to_sparse(),
        lambda x: x.as_subclass(Labelled),
        lambda x: torch._to_functional_tensor(x),
        lambda x: FakeTensorMode().from_tensor(x),
        lambda x: None,
        lambda x: x.tolist(),
    ],
)
def test_other_arguments_are_not(seen, change):
    first, second = arguments()
    assert seen.recall(change(first), second) is None


def test_two_of_the_same_are_not_noted():
    """Guards do not take one tensor twice, and a list of them must not fill with such calls."""
    seen, x = Seen(), torch.ones(2)
    seen.note("cpu", x, x)
    assert not seen._kinds


def test_newest_kinds_are_kept():
    seen = Seen()
    for length in range(2 * Seen.LIMIT):
        seen.note("cpu", torch.ones(length))
    found = [seen.recall(torch.ones(length)) for length in range(2 * Seen.LIMIT)]
    assert found == [None] * Seen.LIMIT + ["cpu"] * Seen.LIMIT


class Watching(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "context",
    [
        Watching,
        FakeTensorMode,
        forward_ad.dual_level,
        lambda: torch.autocast("cpu", torch.bfloat16),
        torch.inference_mode,
        torch.profiler.profile,
    ],
)
def test_nothing_is_recalled_while_something_watches(seen, context):
    given = arguments()
    with context():
        assert seen.recall(*given) is None
    assert seen.recall(*given) == "cpu"


@pytest.mark.parametrize("transform", ["jvp", "vmap", "grad"])
def test_nothing_is_recalled_under_a_transform(seen, transform):
    given, found = arguments(), []

    def function(x: Tensor) -> Tensor:
        found.append(seen.recall(x, given[1]))
        found.append(seen.recall(*given))
        return x.sum()

    if transform == "jvp":
        jvp(function, (given[0],), (given[0],))
    elif transform == "vmap":
        vmap(function)(torch.ones(4, 2, 3))
    else:
        grad(function)(given[0])
    assert found == [None, None]


def qkv_and_tables() -> list[Tensor]:
    return [torch.randn(1, 4, 3, 2, 8), *(torch.randn(8) for _ in range(4)),
            *(torch.randn(4, 8) for _ in range(2))]  # fmt: skip


def test_wrong_shapes_are_named_after_right_ones():
    right = qkv_and_tables()
    qk_norm_rope(*right)
    qk_norm_rope(*right)
    with pytest.raises(ValueError, match=r"cos must have shape \[N, D\] = \[4, 8\]"):
        qk_norm_rope(*right[:5], torch.randn(5, 8), right[6])


def test_kernels_are_chosen_anew():
    """What is remembered of arguments is no choice between kernel and reference."""
    q, k, v = (torch.randn(1, 4, 2, 8) for _ in range(3))
    for _ in range(2):
        by_kernel = attention(q, k, v)
    with ops.reference_only():
        by_pytorch = attention(q, k, v)
        with pytest.raises(ValueError, match="TIM_KERNELS=off is in force"):
            attention(q, k, v, backend="kernel")
    torch.testing.assert_close(by_kernel, by_pytorch)


def test_autocast_to_another_dtype_is_seen():
    """Guards tell that autocast is on, not to which dtype."""
    q, k, v = (torch.randn(1, 4, 2, 8, dtype=torch.bfloat16) for _ in range(3))
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert attention(q, k, v).dtype == dtype


def test_gradients_are_recorded_or_not_as_the_mode_says():
    """Guards compare requires_grad, not whether gradients are recorded at all."""
    given = qkv_and_tables()
    given[0].requires_grad_()
    for _ in range(2):
        assert qk_norm_rope(*given)[0].requires_grad
        with torch.no_grad():
            assert not qk_norm_rope(*given)[0].requires_grad


def test_a_constant_that_begins_to_require_gradients():
    F, x, z = (torch.randn(2, 4, 2, 2) for _ in range(3))
    F.requires_grad_()
    table = torch.randn(2, 5)
    for _ in range(2):
        ops.transition_loss(F, x, z, table).loss.sum().backward()
    first, F.grad = F.grad / 2, None
    x.requires_grad_()
    ops.transition_loss(F, x, z, table).loss.sum().backward()
    assert x.grad is None
    torch.testing.assert_close(F.grad, first)


def test_terms_of_one_loss_are_not_those_of_another():
    """The same tensors may be (F_plus, F_minus) or the guidance."""
    F, x, z, a, b = (torch.randn(2, 4, 2, 2) for _ in range(5))
    table = torch.randn(2, 5)
    for _ in range(2):
        ahead = ops.transition_loss(F, x, z, table, (a, b), epsilon=0.1).target
        guided = ops.transition_loss(F, x, z, table, guidance=(a, b)).target
    assert not torch.equal(ahead, guided)
    with pytest.raises(ValueError, match="epsilon must be positive"):
        ops.transition_loss(F, x, z, table, (a, b))
