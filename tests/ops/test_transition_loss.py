import pytest
import torch
from contract import ForwardBackward, assert_close
from modes import Modes

from tim import ops


class TestTransitionLoss(ForwardBackward, Modes):
    """Positional form with every term: derivative of the last samples, guidance, cosine."""

    name = "transition_loss"
    in_graph = ("transition_loss",)
    # (B, C, H, W, samples with a derivative)
    sizes = ((3, 4, 2, 3, 2), (1, 1, 1, 1, 1), (4, 4, 32, 32, 2), (2, 32, 5, 3, 0), (0, 4, 2, 2, 0))
    differentiable = (0,)

    @classmethod
    def op(cls, *arguments):
        return ops.transition_loss(*cls.arguments(*arguments), **cls.extra(*arguments))

    @classmethod
    def reference(cls, *arguments):
        return ops.transition_loss_reference(*cls.arguments(*arguments), **cls.extra(*arguments))

    @staticmethod
    def arguments(f, x, z, coefficients, d, *_):
        return f, x, z, coefficients, d if d.shape[0] else None

    @staticmethod
    def extra(f, x, z, coefficients, d, d_minus, cond, null, time_weight):
        return {"guidance": (cond, null), "time_weight": time_weight, "cosine": True}

    def inputs(self, size, generator):
        *shape, moving = size

        def normal(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        f, x, z, cond, null = (normal(*shape) for _ in range(5))
        d, d_minus = (normal(moving, *shape[1:]) for _ in range(2))
        return [f, x, z, normal(shape[0], 5), d, d_minus, cond, null, normal(shape[0]).exp()]

    def test_forward(self, size, dtype, path):
        device = self.skip_unless(path, dtype)
        inputs, _ = self.prepare(size, dtype, device)
        for position in (3, 8):
            inputs[position] = inputs[position].float()
        with ops.reference_only():
            exact = self.run(self.reference, inputs, wide=True)
            yardstick = self.run(self.reference, inputs)
        with self.on(path):
            actual = self.run(self.op, inputs)
        terms = ops.TransitionLossTerms._fields
        for name, a, e, y in zip(terms, actual, exact, yardstick, strict=True):
            assert a.dtype == y.dtype
            assert_close(a, e, y, 2, name)

    def test_gradcheck_of_the_reference(self):
        (f, *rest), _ = self.prepare(self.sizes[0], torch.float64)

        def denoising(f):
            loss, _, weight, _ = self.run(self.op, [f, *rest])
            return loss / weight

        with ops.reference_only():
            assert torch.autograd.gradcheck(denoising, f.requires_grad_(), atol=1e-6)


class TestDifference(TestTransitionLoss):
    """The central difference, read as two predictions, without cosine term or guidance."""

    @staticmethod
    def arguments(f, x, z, coefficients, d, d_minus, *_):
        return f, x, z, coefficients, (d, d_minus) if d.shape[0] else None

    @staticmethod
    def extra(f, x, z, coefficients, d, d_minus, cond, null, time_weight):
        return {"epsilon": 0.25, "time_weight": time_weight, "cosine": False}


def make(batch=4, channels=4):
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    f, x, z, d = (torch.randn(batch, channels, 3, 5, generator=generator) for _ in range(4))
    return f, x, z, torch.randn(batch, 5, generator=generator), d


def test_written_out():
    f, x, z, c, d = make()
    terms = ops.transition_loss(f, x, z, c, d[1:], time_weight=torch.arange(1.0, 5.0))
    rows = c[:, :, None, None, None]
    target = rows[:, 0] * x + rows[:, 1] * z
    target[1:] += rows[1:, 2] * d[1:]
    torch.testing.assert_close(terms.target, target)
    error = (f - target).square().mean((1, 2, 3))
    error = error + (1 - torch.cosine_similarity(f, target, dim=1)).mean((1, 2))
    torch.testing.assert_close(terms.denoising, error)
    torch.testing.assert_close(terms.weight, torch.arange(1.0, 5.0) / (error + 1e-5))
    torch.testing.assert_close(terms.loss, terms.weight * error)


def test_difference_of_two_predictions_equals_its_quotient():
    f, x, z, c, d = make()
    plus, minus = d + 0.01, d - 0.03
    pair = ops.transition_loss(f, x, z, c, (plus, minus), epsilon=0.02)
    quotient = ops.transition_loss(f, x, z, c, (plus - minus) / 0.04)
    torch.testing.assert_close(pair.target, quotient.target, rtol=1e-4, atol=1e-4)


def test_only_the_prediction_receives_a_gradient():
    f, x, z, c, d = (tensor.requires_grad_() for tensor in make())
    terms = ops.transition_loss(f, x, z, c, d)
    assert not terms.target.requires_grad and not terms.weight.requires_grad
    terms.loss.sum().backward()
    assert f.grad.abs().max() > 0
    assert x.grad is z.grad is c.grad is d.grad is None


def test_half_precision_prediction_beside_float32_latents():
    f, x, z, c, d = make()
    terms = ops.transition_loss(f.bfloat16().requires_grad_(), x, z, c, d.bfloat16())
    expected = ops.transition_loss_reference(f.bfloat16().float(), x, z, c, d.bfloat16().float())
    assert terms.target.dtype == torch.float32
    torch.testing.assert_close(terms.denoising, expected.denoising, rtol=1e-5, atol=1e-6)


def test_non_finite_values_stay_visible():
    f, x, z, c, d = make()
    f[2, 0, 0, 0] = float("nan")
    terms = ops.transition_loss(f, x, z, c, d)
    assert terms.loss.isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("off", [False, True], ids=["kernel", "reference"])
def test_the_mean_over_no_elements_is_nan(off):
    f, c = torch.ones(2, 0, 2, 2), torch.ones(2, 5)
    with ops.kernels("off" if off else "auto"):
        terms = ops.transition_loss(f, f, f, c, time_weight=torch.ones(2))
    assert terms.target.shape == f.shape
    for value in (terms.loss, terms.denoising, terms.weight):
        assert value.shape == (2,) and value.isnan().all()


def test_equal_prediction_and_target_have_no_error():
    f, x, z, c, d = make()
    target = ops.transition_loss(f, x, z, c, d).target
    assert ops.transition_loss(target, x, z, c, d).denoising.abs().max() < 1e-6


def test_a_tangent_is_refused():
    f, x, z, c, d = make()
    with pytest.raises(NotImplementedError, match="transition_loss has no forward-mode rule"):
        torch.func.jvp(lambda f: ops.transition_loss(f, x, z, c, d).loss, (f,), (f,))


def test_bad_input():
    f, x, z, c, d = make()
    with pytest.raises(ValueError, match=r"F must have shape \[B, C, H, W\], got \[4, 4, 15\]"):
        ops.transition_loss(f.flatten(2), x, z, c)
    with pytest.raises(ValueError, match=r"coefficients must have shape \[B, 5\] = \[4, 5\]"):
        ops.transition_loss(f, x, z, c[:, :3])
    with pytest.raises(ValueError, match=r"epsilon must be positive with .* got None"):
        ops.transition_loss(f, x, z, c, (d, d))
    with pytest.raises(ValueError, match="derivative must have shape"):
        ops.transition_loss(f, x, z, c, torch.cat((d, d)))
    with pytest.raises(ValueError, match=r"time_weight must have shape \[B\] = \[4\], got \[3\]"):
        ops.transition_loss(f, x, z, c, time_weight=torch.ones(3))
