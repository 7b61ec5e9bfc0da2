import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from golden_files import golden, relative_error
from tim import transports
from tim.transports import TRANSPORTS, rows

PUBLISHED = {
    "ot_fm": "OT_FM",
    "trigflow": "TrigFlow",
    "edm": "EDM",
    "vp": "VP_SDE",
    "ve": "VE_SDE",
}
all_transports = pytest.mark.parametrize("name", TRANSPORTS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def tolerance(dtype):
    return 1e-5 if dtype == torch.float32 else 1e-10


def from_golden(name):
    tensors, config = golden(f"transport_{PUBLISHED[name]}")
    published = config["params"]
    renamed = {"T": "num_timesteps", "epsilon_t": "T_min", "sigma_min": "T_min"}
    renamed["sigma_max"] = "T_max"
    guidance = ("enhance_target", "w_gt", "w_cond", "w_start", "w_end")
    params = {renamed.get(k, k): v for k, v in published.items() if k not in guidance}
    return transports.get(name, **params), tensors, config


def golden_inputs(tensors, dtype):
    names = ("t", "r", "x", "z", "F", "dF_dv_dt", "F_t_cond", "F_t_uncond")
    return [tensors[name].to(dtype) for name in names]


def golden_output(tensors, name, dtype):
    return tensors[name if dtype == torch.float32 else name + "64"]


@st.composite
def times(draw, name, gap=0.0):
    """A transport (sigma_d drawn too) and float64 times r <= t, apart by a share ``gap``."""
    transport = transports.get(name, sigma_d=draw(st.floats(0.2, 3.0)))
    low = max(transport.T_min, 1e-3)
    high = min(transport.T_max, 1.5 if name == "trigflow" else 20.0)
    t = draw(st.floats(low + gap * (high - low), high))
    r = draw(st.floats(low, t - gap * (t - low)))
    return transport, torch.tensor(t, dtype=torch.float64), torch.tensor(r, dtype=torch.float64)


def derivative(function, t):
    t = t.clone().requires_grad_()
    return torch.autograd.grad(function(t), t)[0]


# --- against the published implementation


@all_transports
def test_defaults_are_the_published_ones(name):
    transport, _, _ = from_golden(name)
    assert transport == transports.get(name)


@all_transports
@dtypes
def test_interpolant_and_c_noise_match_golden(name, dtype):
    transport, tensors, _ = from_golden(name)
    t, _, x, z, *_ = golden_inputs(tensors, dtype)
    interpolant = transport.interpolant(t)
    for value, key in zip(
        interpolant, ("alpha_t", "sigma_t", "d_alpha_t", "d_sigma_t"), strict=True
    ):
        expected = golden_output(tensors, key, dtype)
        assert value.dtype == dtype and value.shape == t.shape
        if expected.norm() == 0:
            assert value.norm() == 0
        else:
            assert relative_error(value, expected) < tolerance(dtype)
    alpha, sigma, d_alpha, d_sigma = (rows(value, x) for value in interpolant)
    for value, key in ((alpha * x + sigma * z, "x_t"), (d_alpha * x + d_sigma * z, "v_t")):
        assert relative_error(value, golden_output(tensors, key, dtype)) < tolerance(dtype)
    expected = golden_output(tensors, "c_noise_t", dtype)
    assert relative_error(transport.c_noise(t), expected) < tolerance(dtype)


def combine(coefficients, *tensors):
    return sum(rows(c, tensor) * tensor for c, tensor in zip(coefficients, tensors, strict=True))


def targets(transport, tensors, config, dtype):
    """Our target without and with guidance (published form: derivative along the data)."""
    t, r, x, z, _, dF, F_cond, F_null = golden_inputs(tensors, dtype)
    p = config["enhanced_params"]
    inside = ((p["w_start"] <= t) & (t <= p["w_end"])).to(dtype)
    assert 0 < inside.sum() < len(t)
    plain = combine(transport.coefficients(t, r), x, z, dF)
    guided = transport.guided_coefficients(t, r, 1 + inside * (p["w_gt"] - 1), inside * p["w_cond"])
    return plain, combine(guided, x, z, dF, F_cond, F_null)


@pytest.mark.parametrize("name", TRANSPORTS)
def test_the_derivative_of_c_noise(name):
    transport = transports.get(name)
    t = torch.linspace(transport.T_min + 0.01, transport.T_max, 9, dtype=torch.float64)
    expected = torch.func.jvp(transport.c_noise, (t,), (torch.ones_like(t),))[1]
    torch.testing.assert_close(transport.c_noise_derivative(t), expected)
    # Of a transport that does not give it, it is computed.
    generic = transports.Transport.c_noise_derivative(transport, t)
    torch.testing.assert_close(generic, expected)


@pytest.mark.parametrize("name", [name for name in TRANSPORTS if name != "edm"])
@dtypes
def test_step_and_targets_match_golden(name, dtype):
    transport, tensors, config = from_golden(name)
    plain, guided = targets(transport, tensors, config, dtype)
    t, r, _, _, F, *_ = golden_inputs(tensors, dtype)
    x_r = transport.step(golden_output(tensors, "x_t", dtype), t, r, F)
    for value, key in ((plain, "F_target"), (guided, "F_target_enhanced"), (x_r, "x_r")):
        assert relative_error(value, golden_output(tensors, key, dtype)) < tolerance(dtype)


@dtypes
def test_edm_relation_to_the_published_step_and_targets(dtype):
    """What the published EDM code computes, expressed through our consistent transition.

    Its step is ours for sigma_d = s^(3/2) with F scaled by sqrt(s), times k(t) / k(r), where
    k(t) = q(t; s) / q(t; s^(3/2)); so its B is sqrt(s) k(t) / k(r) times ours for s^(3/2).
    Its target keeps the consistent form F_0 + (B / B') (F_0' - dF) but with that B, so its
    distance to F_0 is ours times a ratio.
    """
    transport, tensors, config = from_golden("edm")
    s = transport.sigma_d
    other = transports.get("edm", sigma_d=s**1.5)
    t, r, x, z, F, *_ = golden_inputs(tensors, torch.float64)

    def k(time):
        return ((time**2 + s**2) / (time**2 + s**3)).sqrt()

    x_t = golden_output(tensors, "x_t", dtype).double()
    x_r = rows(k(t) / k(r), x) * other.step(x_t, t, r, s**0.5 * F)
    assert relative_error(x_r, golden_output(tensors, "x_r", dtype)) < tolerance(dtype)
    consistent = transport.step(x_t, t, r, F)
    assert relative_error(consistent, golden_output(tensors, "x_r", dtype)) > 0.1

    def published_B(time):
        return s**0.5 * k(time) / k(r) * other.transition(time, r)[1]

    time = t.clone().requires_grad_()
    slope = torch.autograd.grad(published_B(time).sum(), time)[0]
    B, B_prime = transport.transition(t, r)[1], transport.transition_derivative(t, r)[1]
    apart = t > r
    ratio = torch.where(apart, published_B(t) / slope / (B / B_prime), torch.ones_like(t))
    plain, guided = targets(transport, tensors, config, torch.float64)
    F_0 = combine(transport.coefficients(t, t)[:2], x, z)
    target = F_0 + rows(ratio, x) * (plain - F_0)
    expected = golden_output(tensors, "F_target", dtype)
    expected_guided = golden_output(tensors, "F_target_enhanced", dtype)
    assert relative_error(target, expected) < tolerance(dtype)
    assert relative_error(target + guided - plain, expected_guided) < tolerance(dtype)


@dtypes
def test_stochastic_step_matches_golden(dtype):
    transport, tensors, config = from_golden("ot_fm")
    t, r, _, _, F, *_ = golden_inputs(tensors, dtype)
    x_t, noise = golden_output(tensors, "x_t", dtype), tensors["eps"].to(dtype)
    x_r = transport.stochastic_step(x_t, t, r, F, config["s_ratio"], noise)
    expected = golden_output(tensors, "x_r_stochastic", dtype)
    assert relative_error(x_r, expected) < tolerance(dtype)
    assert torch.equal(
        transport.stochastic_step(x_t, t, r, F, 0.0, noise), transport.step(x_t, t, r, F)
    )


# --- the identity of the module text


@all_transports
@given(st.data())
@settings(deadline=None, max_examples=50)
def test_derivatives_equal_autograd(name, data):
    transport, t, r = data.draw(times(name))
    alpha, sigma, d_alpha, d_sigma = transport.interpolant(t)
    A_prime, B_prime = transport.transition_derivative(t, r)
    for value, function in (
        (d_alpha, lambda t: transport.interpolant(t)[0] + 0 * t),
        (d_sigma, lambda t: transport.interpolant(t)[1] + 0 * t),
        (A_prime, lambda t: transport.transition(t, r)[0] + 0 * t),
        (B_prime, lambda t: transport.transition(t, r)[1] + 0 * t),
    ):
        torch.testing.assert_close(value, derivative(function, t), rtol=1e-9, atol=1e-12)
    assert alpha >= 0 and sigma >= 0 and B_prime != 0


@all_transports
@given(st.data())
@settings(deadline=None, max_examples=50)
def test_coefficients_follow_the_identity(name, data):
    transport, t, r = data.draw(times(name))
    alpha, sigma, d_alpha, d_sigma = transport.interpolant(t)
    A, B = transport.transition(t, r)
    A_prime, B_prime = transport.transition_derivative(t, r)
    expected = (
        -(A_prime * alpha + A * d_alpha) / B_prime,
        -(A_prime * sigma + A * d_sigma) / B_prime,
        -B / B_prime,
    )
    scale = (A.abs() * (d_alpha.abs() + d_sigma.abs()) / B_prime.abs()).item()
    for value, reference in zip(transport.coefficients(t, r), expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-9, atol=1e-12 * (1 + scale))
    # The step lands on the same line: with F_0 as prediction x_r is the interpolant at r.
    a_0, b_0, c_0 = transport.coefficients(t, t)
    alpha_r, sigma_r, _, _ = transport.interpolant(r)
    torch.testing.assert_close(A * alpha + B * a_0, alpha_r, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(A * sigma + B * b_0, sigma_r, rtol=1e-9, atol=1e-10 * (1 + scale))
    assert c_0 == 0
    # What guided_coefficients rests on.
    torch.testing.assert_close(A * transport.transition_derivative(t, t)[1], B_prime)


@all_transports
@dtypes
def test_coefficients_are_finite_and_continuous_at_equal_times(name, dtype):
    transport = transports.get(name)
    t = torch.linspace(transport.T_min, transport.T_max, 101, dtype=dtype)
    A, B = transport.transition(t, t)
    torch.testing.assert_close(A, torch.ones_like(A))
    torch.testing.assert_close(B, torch.zeros_like(B), atol=1e-6, rtol=0)
    here = transport.coefficients(t, t)
    near = transport.coefficients(t, t * (1 - 4 * torch.finfo(dtype).eps))
    for value, limit in zip(here, near, strict=True):
        assert value.dtype == dtype and torch.isfinite(value).all()
        torch.testing.assert_close(value, limit, rtol=1e-3, atol=1e-3)
    assert (here[2] == 0).all()


@all_transports
@given(st.data())
@settings(deadline=None, max_examples=50)
def test_gaussian_data(name, data):
    """For x ~ N(0, s_0^2) the exact transition is x_r = x_t std(r) / std(t), a linear F = f x_t."""
    transport, t, r = data.draw(times(name, gap=0.05))
    s_0 = data.draw(st.floats(0.3, 3.0))

    def std(time):
        alpha, sigma, _, _ = transport.interpolant(time)
        return (alpha**2 * s_0**2 + sigma**2).sqrt()

    def f(time):
        A, B = transport.transition(time, r)
        return (std(r) / std(time) - A) / B

    alpha, sigma, _, _ = transport.interpolant(t)
    E_x, E_z = alpha * s_0**2 / std(t) ** 2, sigma / std(t) ** 2
    E_v = derivative(std, t) / std(t)
    c_x, c_z, c_d = transport.coefficients(t, r)
    dF = derivative(f, t) + f(t) * E_v
    size = abs(c_x * E_x) + abs(c_z * E_z) + abs(c_d * derivative(f, t))
    target = c_x * E_x + c_z * E_z + c_d * dF
    assert abs(target - f(t)) < 1e-8 * (1 + size)
    # The instantaneous prediction stands for the marginal velocity.
    F_0 = combine(transport.coefficients(t, t)[:2], E_x, E_z)
    torch.testing.assert_close(transport.velocity(torch.ones_like(t), t, F_0), E_v)


@all_transports
def test_step_composes_for_gaussian_data(name):
    transport = transports.get(name)
    times = torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64)

    def std(time):
        alpha, sigma, _, _ = transport.interpolant(time)
        return (alpha**2 * 0.49 + sigma**2).sqrt()

    def jump(x, t, r):
        A, B = transport.transition(t, r)
        return transport.step(x, t, r, (std(r) / std(t) - A) / B * x)

    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    direct = jump(x, times[0], times[2])
    torch.testing.assert_close(jump(jump(x, times[0], times[1]), times[1], times[2]), direct)
    torch.testing.assert_close(direct, x * std(times[2]) / std(times[0]))


# --- guidance


@all_transports
def test_guidance_replaces_the_velocity(name):
    """The five-number target is the identity with v_t replaced by the guided velocity."""
    transport = transports.get(name)
    generator = torch.Generator().manual_seed(0)
    x, z, dF, F_cond, F_null = torch.randn(5, 4, 2, 3, 3, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.3, 0.5, 0.9, 0.7], dtype=torch.float64)
    r = torch.tensor([0.1, 0.5, 0.2, 0.3], dtype=torch.float64)
    w_gt, w_cond = torch.full_like(t, 0.8), torch.full_like(t, 0.7)
    alpha, sigma, d_alpha, d_sigma = (rows(value, x) for value in transport.interpolant(t))
    x_t, v_t = alpha * x + sigma * z, d_alpha * x + d_sigma * z
    v_g = 0.8 * v_t + 0.7 * transport.velocity(x_t, t, F_cond)
    v_g = v_g - 0.5 * transport.velocity(x_t, t, F_null)
    A, B = (rows(value, x) for value in transport.transition(t, r))
    A_prime, B_prime = (rows(value, x) for value in transport.transition_derivative(t, r))
    expected = -(A_prime * x_t + A * v_g + B * dF) / B_prime
    target = combine(transport.guided_coefficients(t, r, w_gt, w_cond), x, z, dF, F_cond, F_null)
    torch.testing.assert_close(target, expected)
    none = transport.guided_coefficients(t, r, torch.ones_like(t), torch.zeros_like(t))
    plain = transport.coefficients(t, r)
    for value, reference in zip(none[:3], plain, strict=True):
        torch.testing.assert_close(value, reference)
    assert not none[3].any() and not none[4].any()


# --- random times


@all_transports
def test_sample_t(name):
    transport = transports.get(name)
    t = transport.sample_t(20000, torch.Generator().manual_seed(1), dtype=torch.float64)
    assert t.shape == (20000,) and t.dtype == torch.float64
    assert (t >= transport.T_min).all() and (t <= transport.T_max).all()
    again = transport.sample_t(20000, torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.equal(t, again)
    if name == "vp":
        value, mean, std = t, 0.5, 12**-0.5
    elif name == "ve":
        value = t.log()
        span = math.log(transport.T_max / transport.T_min)
        mean, std = math.log(transport.T_min) + span / 2, span * 12**-0.5
    else:
        alpha, sigma, _, _ = transport.interpolant(t)
        value, mean, std = (sigma / alpha).log(), transport.P_mean, transport.P_std
    assert abs(value.mean() - mean) < 4 * std / 20000**0.5
    assert abs(value.std() - std) < 4 * std / 20000**0.5


def test_sample_t_is_clipped_and_float32_by_default():
    transport = transports.get("edm", T_min=0.2, T_max=0.4)
    t = transport.sample_t(100)
    assert t.dtype == torch.float32 and t.min() == 0.2 and t.max() == 0.4


# --- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("flow", {}), "transport must be one of ot_fm, trigflow, edm, vp, ve, got 'flow'"),
        (("vp", {"P_mean": 0.0}), "vp has no parameter 'P_mean'"),
        (("ot_fm", {"T_max": 2.0}), "ot_fm needs 0 <= T_min < T_max <= 1, got T_min=0, T_max=2"),
        (("trigflow", {"T_min": 1.57}), "trigflow needs 0 <= T_min < T_max"),
        (("edm", {"T_min": 0.0}), "edm needs T_min > 0, got 0"),
        (("edm", {"sigma_d": -1.0}), "sigma_d must be positive, got -1"),
        (("ot_fm", {"P_std": 0.0}), "P_std must be positive, got 0"),
        (("vp", {"beta_min": 0.0}), "vp needs beta_min > 0"),
        (("vp", {"num_timesteps": 1}), "num_timesteps must be at least 2, got 1"),
    ],
)
def test_errors(arguments, message):
    name, params = arguments
    with pytest.raises(ValueError) as error:
        transports.get(name, **params)
    assert message in str(error.value)


@pytest.mark.parametrize("name", transports.TRANSPORTS)
def test_parameters_must_be_finite_numbers(name):
    for field in dataclasses.fields(transports.TRANSPORTS[name]):
        with pytest.raises(TypeError, match=f"^{field.name} must be a number, got '1'$"):
            transports.get(name, **{field.name: "1"})
        for value in (float("nan"), float("inf")):
            with pytest.raises(ValueError, match=f"^{field.name} must be finite, got {value}$"):
                transports.get(name, **{field.name: value})


def test_transports_are_immutable_values():
    transport = transports.get("ot_fm", P_mean=-0.4)
    assert transport == transports.get("ot_fm", P_mean=-0.4) != transports.get("ot_fm")
    with pytest.raises(AttributeError):
        transport.P_mean = 0.0
