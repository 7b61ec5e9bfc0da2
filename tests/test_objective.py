import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gaussian import INVERSE_C_NOISE, GaussianGuide, GaussianTransition
from golden_files import golden, relative_error
from tim import transports
from tim.derivative import takes_tangents
from tim.models import TiM, TiMConfig
from tim.objective import TIME_WEIGHTS, Guidance, TransitionLoss
from tim.transports import TRANSPORTS, rows

GUIDANCE = {"w_gt": 0.9, "w_cond": 0.7, "w_start": 0.3, "w_end": 0.8}
GOLDEN_GRADIENTS = (
    "x_embedder.proj.weight",
    "blocks.1.attn.qkv.weight",
    "final_layer.linear.weight",
)


def golden_model(dtype=torch.float32):
    tensors, config = golden("c2i_model")
    model = TiM(TiMConfig.from_released(config["model"]))
    prefix = "model."
    weights = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
    model.load_state_dict(weights)
    return model.to(dtype)


def golden_loss(derivative="jvp", **changes):
    _, config = golden("loss")
    settings = {
        "transport": transports.get("ot_fm", **config["transport_params"]),
        "derivative": derivative,
        "epsilon": config["schedule"]["differential_epsilon"],
        "diffusion_ratio": config["schedule"]["diffusion_ratio"],
        "consistency_ratio": config["schedule"]["consistency_ratio"],
    }
    return TransitionLoss(**(settings | changes))


def golden_batch(dtype=torch.float32):
    tensors, _ = golden("loss")
    batch = {name: tensors[name].to(dtype) for name in ("x", "z")} | {"y": tensors["y"]}
    suffix = "64" if dtype == torch.float64 else ""
    return batch | {"t": tensors["t" + suffix], "r": tensors["r" + suffix]}


def weight_gradients(model, out):
    model.zero_grad()
    (out.loss + out.projection).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class Recorder(nn.Module):
    """Wraps a network and remembers its calls."""

    def __init__(self, model, takes_tangents=False):
        super().__init__()
        self.model, self.calls, self.takes_tangents = model, [], takes_tangents

    def forward(self, x, t, r, y, **options):
        grad = torch.is_grad_enabled()
        self.calls.append({"batch": len(x), "t": t, "r": r, "y": y, "grad": grad} | options)
        self.calls[-1] |= {"training": self.training, "cache": torch.is_autocast_cache_enabled()}
        return self.model(x, t, r, y, **options)


class Small(nn.Module):
    """A smooth network of (x, t, r, y) with parameters, for speed."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.mix = nn.Conv2d(2, 2, 1, dtype=dtype)
        self.classes = nn.Embedding(4, 2, dtype=dtype)

    def forward(self, x, t, r, y):
        c = self.classes(y)[:, :, None, None] + rows(t, x) * 0.5 - rows(r, x) ** 2
        return torch.tanh(self.mix(x) + c) * (1 + rows(t, x))


def small_batch(batch=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, z = torch.randn(2, batch, 2, 4, 4, generator=generator, dtype=dtype)
    return {"x": x, "z": z, "y": torch.arange(batch) % 3}


def with_guidance(batch, ema_model, **changes):
    null = torch.full_like(batch["y"], 3)
    return batch | {"null": null, "ema_model": ema_model} | changes


# --- against the published implementation


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("derivative", ["dde", "jvp"])
def test_golden(derivative, dtype):
    expected, _ = golden("loss")
    double = dtype == torch.float64
    model = golden_model(dtype)
    out = golden_loss(derivative)(
        model, **golden_batch(dtype), features=expected["h_target"].to(dtype)
    )
    gradients = weight_gradients(model, out)
    if derivative == "jvp":
        limits = dict.fromkeys(("dF", "target", "error", "grad"), 1e-6 if double else 2e-5)
    elif double:
        limits = {"dF": 3e-5, "target": 1e-5, "error": 1e-5, "grad": 1e-5}
    else:
        limits = {"dF": 1e-3, "target": 3e-4, "error": 1e-4, "grad": 3e-4}

    def check(value, name, limit):
        reference = expected[name + ("64" if double else "")]
        assert value.dtype == dtype
        assert relative_error(value, reference) < limit, name

    check(out.derivative, f"{derivative}.dF_dv_dt", limits["dF"])
    check(out.target, f"{derivative}.F_target", limits["target"])
    check(out.denoising, f"{derivative}.denoising_loss", limits["error"])
    check(out.weight, f"{derivative}.weight", limits["error"])
    check(out.projection, "proj_loss", 1e-6 if double else 1e-5)
    check(out.loss, f"{derivative}.weighted_loss", limits["error"])
    for name in GOLDEN_GRADIENTS:
        check(gradients[name], f"{derivative}.grad.{name}", limits["grad"])
    without_cosine = golden_loss(derivative, cosine=False)(model, **golden_batch(dtype))
    check(without_cosine.denoising, f"{derivative}.mse", limits["error"])
    adaptive = 1 / (out.denoising.detach() + 1e-5)
    check(adaptive, f"{derivative}.weight_adaptive", limits["error"])
    check(out.weight / adaptive, "weight_time", 1e-6 if double else 1e-5)


@pytest.mark.parametrize(
    ("name", "published"),
    # Not EDM, whose published target differs: see test_transports.py.
    [("ot_fm", "OT_FM"), ("trigflow", "TrigFlow"), ("vp", "VP_SDE"), ("ve", "VE_SDE")],
)
def test_guidance_along_data_is_the_published_target(name, published):
    tensors, config = golden(f"transport_{published}")
    keys = ("w_gt", "w_cond", "w_start", "w_end")
    guidance = {key: config["enhanced_params"][key] for key in keys} | {"along": "data"}
    loss = TransitionLoss(
        transport=transports.get(name), diffusion_ratio=0, guidance=guidance, time_weight_map=None
    )
    t, r, x, z = (tensors[key].double() for key in ("t", "r", "x", "z"))

    class WithDerivative(nn.Module):
        """F whose dF along any path is the golden one."""

        def forward(self, x, t, r, y):
            return tensors["dF_dv_dt"].double() * rows(INVERSE_C_NOISE[name](t), x)

    class Guide(nn.Module):
        def forward(self, x, t, r, y):
            assert torch.equal(t, r)
            return torch.cat([tensors["F_t_cond"], tensors["F_t_uncond"]]).double()

    y = torch.zeros(len(t), dtype=torch.long)
    out = loss(WithDerivative(), x, z, y, t=t, r=r, null=y, ema_model=Guide())
    assert relative_error(out.derivative, tensors["dF_dv_dt"]) < 1e-6
    assert relative_error(out.target, tensors["F_target_enhanced64"]) < 1e-6


# --- exactness


def expected_pair(transport, s_c, t, x_t):
    """x and z replaced by their expectations given x_t: all results are then expectations too."""
    alpha, sigma, _, _ = (rows(value, x_t) for value in transport.interpolant(t))
    variance = alpha**2 * s_c**2 + sigma**2
    return alpha * s_c**2 / variance * x_t, sigma / variance * x_t


def gaussian_target(name, derivative, guidance=None, w=1.0):
    transport = transports.get(name)
    s_c, s_n = 0.6, 1.4
    t = torch.tensor([0.4, 0.5, 0.6, 0.75], dtype=torch.float64)
    r = torch.tensor([0.1, 0.3, 0.05, 0.2], dtype=torch.float64)
    x_t = torch.linspace(-2, 2, 32, dtype=torch.float64).reshape(4, 2, 2, 2)
    x, z = expected_pair(transport, s_c, t, x_t)
    model = GaussianTransition(transport, s_c, s_n, w)
    loss = TransitionLoss(
        transport=transport,
        derivative=derivative,
        epsilon=1e-4,
        diffusion_ratio=0,
        time_weight_map=None,
        guidance=guidance,
    )
    y = torch.zeros(4, dtype=torch.long)
    guide = GaussianGuide(transport, s_c, s_n, w)
    out = loss(model, x, z, y, t=t, r=r, null=y + 1, ema_model=guide)
    return out, rows(model.factor(t, r), x_t) * x_t


@pytest.mark.parametrize("derivative", ["jvp", "dde"])
@pytest.mark.parametrize("name", TRANSPORTS)
def test_exact_transition_is_a_fixed_point(name, derivative):
    out, F = gaussian_target(name, derivative)
    limit = 1e-9 if derivative == "jvp" else 1e-5
    assert relative_error(out.target, F) < limit
    assert out.derivative.abs().max() > 0.01


@pytest.mark.parametrize("derivative", ["jvp", "dde"])
@pytest.mark.parametrize("name", TRANSPORTS)
def test_guided_target_is_consistent_along_the_guided_velocity_only(name, derivative):
    w_gt, w_cond = 1.0, 0.75
    guidance = {"w_gt": w_gt, "w_cond": w_cond, "w_start": 0.0, "w_end": 1.0}
    out, F = gaussian_target(name, derivative, guidance, w=w_gt + w_cond)
    assert relative_error(out.target, F) < (1e-9 if derivative == "jvp" else 1e-5)
    out, F = gaussian_target(name, derivative, guidance | {"along": "data"}, w=w_gt + w_cond)
    assert relative_error(out.target, F) > 0.01


@pytest.mark.parametrize("along", ["guided", "data"])
@pytest.mark.parametrize(
    "transport", [transports.get("ot_fm"), transports.get("vp", num_timesteps=2)]
)
def test_difference_converges_to_the_exact_derivative(transport, along):
    model, guide = Small(torch.float64), Small(torch.float64)
    batch = with_guidance(small_batch(dtype=torch.float64), guide)
    t = torch.linspace(0.1, 0.95, 8, dtype=torch.float64)
    batch |= {"t": t, "r": torch.cat([t[:2], t[2:] / 3])}

    def derivative(kind, epsilon):
        loss = TransitionLoss(
            transport=transport,
            derivative=kind,
            epsilon=epsilon,
            diffusion_ratio=0.25,
            guidance=GUIDANCE | {"along": along},
        )
        return loss(model, **batch)

    exact, fine, coarse = derivative("jvp", 1), derivative("dde", 1e-4), derivative("dde", 1e-2)
    assert (exact.derivative[:2] == 0).all() and (exact.derivative[2:] != 0).all()
    error = relative_error(fine.derivative, exact.derivative)
    assert error < 1e-3 and error < 1e-2 * relative_error(coarse.derivative, exact.derivative)
    assert relative_error(fine.target, exact.target) < 1e-4


def test_difference_stays_inside_the_range_of_singular_transports():
    transport = transports.get("vp")
    batch = small_batch(4)
    t = torch.tensor([0.001, 0.002, 0.004, 0.5])
    batch |= {"t": t, "r": torch.full_like(t, 1e-5)}
    outs = [
        TransitionLoss(transport=transport, derivative=kind, diffusion_ratio=0)(
            lambda x, t, r, y: x * rows(t, x).sin() * 1e-2, **batch
        )
        for kind in ("dde", "jvp")
    ]
    assert torch.isfinite(outs[0].derivative).all() and torch.isfinite(outs[0].loss)
    assert relative_error(outs[0].derivative[:2], outs[1].derivative[:2]) < 0.2


# --- what the passes cost and keep


@pytest.mark.parametrize(
    ("derivative", "takes_tangents", "batches", "grads"),
    [
        ("jvp", True, [8], [True]),
        ("jvp", False, [4, 4], [True, True]),
        ("dde", True, [8, 8], [True, False]),
    ],
)
def test_number_of_passes(derivative, takes_tangents, batches, grads):
    model = Recorder(golden_model(), takes_tangents)
    golden_loss(derivative)(model, **golden_batch())
    assert sorted(call["batch"] for call in model.calls) == batches
    assert sorted((call["grad"] for call in model.calls), reverse=True) == grads


def test_all_diffusion_is_one_pass_without_derivative():
    model = Recorder(Small())
    loss = golden_loss("jvp", diffusion_ratio=1.0, consistency_ratio=0.0)
    out = loss(model, **small_batch())
    assert [call["batch"] for call in model.calls] == [8]
    assert torch.equal(out.t, out.r) and not out.derivative.any()
    batch = small_batch()
    torch.testing.assert_close(out.target, batch["z"] - batch["x"])


@pytest.mark.parametrize("name", TRANSPORTS)
@pytest.mark.parametrize("guided", [False, True])
def test_tangents_as_an_argument_give_what_dual_numbers_give(name, guided):
    transport = transports.get(name)
    guidance = GUIDANCE if guided else None
    loss = golden_loss("jvp", guidance=guidance, transport=transport, time_weight_map=None)
    torch.manual_seed(0)
    batch = golden_batch(torch.float64)
    batch["t"], batch["r"] = loss.draw_times(batch["x"])
    outs, gradients = [], []
    for taking in (False, True):
        model = golden_model(torch.float64)
        recorder = Recorder(model, taking)
        null = {"null": torch.full_like(batch["y"], 10), "ema_model": model} if guided else {}
        outs.append(loss(recorder, **batch, **null))
        gradients.append(weight_gradients(model, outs[-1]))
        assert len(recorder.calls) == (1 if taking else 2)
    assert outs[0].derivative[4:].abs().max() > 0
    for field in ("loss", "denoising", "target", "derivative"):
        assert relative_error(getattr(outs[1], field), getattr(outs[0], field)) < 1e-10, field
    for key, gradient in gradients[0].items():
        assert relative_error(gradients[1][key], gradient) < 1e-9, key


def test_wrapped_networks_that_take_tangents_are_recognised():
    model = golden_model()
    wrapper = nn.Module()
    wrapper.module = model  # as DistributedDataParallel has it
    assert takes_tangents(model) and takes_tangents(wrapper)
    assert takes_tangents(torch.compile(model)) and takes_tangents(torch.compile(wrapper))
    assert not takes_tangents(Small()) and not takes_tangents(lambda x, t, r, y: x)
    assert not takes_tangents(Recorder(model))


@pytest.mark.parametrize("diffusion_ratio", [0.0, 0.5])
def test_checkpointing_gives_the_same_gradients(diffusion_ratio):
    loss = golden_loss("jvp", diffusion_ratio=diffusion_ratio)
    features = golden("loss")[0]["h_target"]
    plain, checkpointed = golden_model(), golden_model()
    checkpointed.gradient_checkpointing = True
    wrapped = Recorder(checkpointed)
    reference_out = loss(plain, **golden_batch(), features=features)
    out = loss(wrapped, **golden_batch(), features=features)
    assert len(wrapped.calls) == 2 and not wrapped.calls[0]["grad"]
    torch.testing.assert_close(out.derivative, reference_out.derivative)
    reference = weight_gradients(plain, reference_out)
    for name, gradient in weight_gradients(checkpointed, out).items():
        torch.testing.assert_close(gradient, reference[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("derivative", ["jvp", "dde"])
def test_gradients_under_autocast(derivative, checkpointing, guided):
    """Casts of weights made in a pass without gradient must not reach the pass with gradient.

    Releases of PyTorch differ in whether they would, so the switch is looked at too.
    """
    # A wide difference, or the noise of bf16 in it would hide what is tested.
    loss = golden_loss(derivative, guidance=GUIDANCE if guided else None, epsilon=0.1)
    model = golden_model()
    batch = golden_batch() | {"features": golden("loss")[0]["h_target"]}
    # The network guides itself: the case in which the two passes share their weights.
    batch |= {"null": torch.full_like(batch["y"], 10), "ema_model": model}
    reference = weight_gradients(model, loss(model, **batch))
    model.gradient_checkpointing = checkpointing
    watched = Recorder(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = loss(watched, **(batch | {"ema_model": watched}))
    assert len(watched.calls) == 2 + guided
    assert all(call["cache"] == call["grad"] for call in watched.calls)
    gradients = weight_gradients(model, out)
    assert out.loss.dtype == out.denoising.dtype == torch.float32
    assert gradients.keys() == reference.keys()
    for name, gradient in gradients.items():
        assert relative_error(gradient, reference[name]) < 0.25, name


def test_exact_derivative_in_bf16_is_closer_than_the_difference():
    exact = golden_loss("jvp")(golden_model(torch.float64), **golden_batch(torch.float64))
    error = {}
    for kind in ("jvp", "dde"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = golden_loss(kind)(golden_model(), **golden_batch())
        error[kind] = relative_error(out.derivative, exact.derivative)
    assert error["jvp"] < 0.05 and error["dde"] > 5 * error["jvp"]


class NoSync(TorchDispatchMode):
    """Fails on operations that make the host wait for the device."""

    forbidden = ("_local_scalar_dense", "nonzero", "is_nonzero", "unique", "masked_select")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.forbidden, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("derivative", ["jvp", "dde"])
@pytest.mark.parametrize("guided", [False, True])
def test_step_does_not_wait_for_the_device(derivative, guided):
    guidance = GUIDANCE if guided else None
    loss = golden_loss(derivative, guidance=guidance, transport=transports.get("vp"))
    batch = with_guidance(small_batch(), Small())
    with NoSync():
        loss(Small(), **batch).loss.backward()
    with pytest.raises(AssertionError, match="waits"), NoSync():
        batch["x"].sum().item()


def test_backward_reaches_the_model_only():
    batch = with_guidance(small_batch(), Small())
    for name in ("x", "z"):
        batch[name].requires_grad_()
    model = Small()
    loss = golden_loss("jvp", guidance=GUIDANCE)
    loss(model, **batch).loss.backward()
    assert batch["x"].grad is None and batch["z"].grad is None
    assert all(p.grad is None for p in batch["ema_model"].parameters())
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


# --- times


def test_drawn_times_and_their_blocks():
    loss, model = golden_loss("jvp", diffusion_ratio=0.4, consistency_ratio=0.2), Small()
    torch.manual_seed(3)
    out = loss(model, **small_batch(10))
    t, r = out.t, out.r
    assert torch.equal(t[:4], r[:4])
    assert (r[4:8] < t[4:8]).all() and (r[4:8] > 0).all()
    assert (r[8:] == 0).all()
    torch.manual_seed(3)
    again = loss(model, **small_batch(10))
    assert torch.equal(again.t, t) and torch.equal(again.r, r)
    torch.manual_seed(3)
    a, b = (loss.transport.sample_t(10) for _ in range(2))
    assert torch.equal(t, torch.maximum(a, b))
    assert torch.equal(r[4:8], torch.minimum(a, b)[4:8])


def test_consistency_block_never_reaches_into_the_diffusion_block():
    # Both shares round up: 2 + 2 samples of 3.
    out = golden_loss("jvp", diffusion_ratio=0.5, consistency_ratio=0.5)(Small(), **small_batch(3))
    assert torch.equal(out.t[:2], out.r[:2]) and out.r[2] == 0


def test_given_times_are_used_as_they_are():
    batch = golden_batch()
    t, r = batch["t"].clone(), batch["r"].clone()
    r[-1] = 0.1
    model = Recorder(golden_model())
    out = golden_loss("jvp")(model, **(batch | {"r": r}))
    assert torch.equal(out.t, t) and torch.equal(out.r, r)
    assert torch.equal(torch.cat([call["r"] for call in model.calls]).sort()[0], r.sort()[0])


@pytest.mark.parametrize("time_map", [None, "tangent", "sigmoid"])
@pytest.mark.parametrize("kind", [*TIME_WEIGHTS, "Soft-Min-SNR"])
def test_time_weights(kind, time_map):
    sigma_d = 0.7
    loss = golden_loss(
        "dde",
        transport=transports.get("ot_fm", sigma_d=sigma_d),
        time_weight=kind,
        time_weight_map=time_map,
    )
    batch = golden_batch()
    out = loss(lambda x, t, r, y: x, **batch)
    mapping = {None: lambda t: t, "tangent": math.tan, "sigmoid": lambda t: t / (1 - t)}[time_map]
    for i, (t, r) in enumerate(zip(batch["t"].tolist(), batch["r"].tolist(), strict=True)):
        delta = mapping(t) - mapping(r)
        expected = {
            "constant": 1.0,
            "reciprocal": 1 / (delta + sigma_d),
            "sqrt": 1 / math.sqrt(delta + sigma_d),
            "square": 1 / (delta + sigma_d) ** 2,
            "soft-min-snr": 1 / (delta**2 + sigma_d**2),
        }[kind.lower()]
        weight = out.weight[i] * (out.denoising[i] + 1e-5)
        assert weight.item() == pytest.approx(1.0 if i < 4 else expected, rel=1e-5)


def test_sigmoid_map_at_one():
    t = torch.tensor([1.0, 1.0])
    batch = small_batch(2) | {"t": t, "r": torch.tensor([1.0, 0.5])}
    loss = golden_loss("dde", time_weight_map="sigmoid", diffusion_ratio=0.0)
    out = loss(lambda x, t, r, y: x, **batch)
    assert torch.isfinite(out.weight).all() and out.weight[1] == 0


# --- guidance and features


def test_guidance_passes():
    guide = Recorder(Small())
    guide.train()
    guide.model.eval()
    model, batch = Small(), with_guidance(small_batch(), guide)
    dropped = torch.full_like(batch["y"], 3)
    loss = golden_loss("jvp", guidance=GUIDANCE)
    loss(model, **(batch | {"y": dropped, "y_guidance": batch["y"]}))
    (call,) = guide.calls
    assert call["batch"] == 16 and not call["grad"] and not call["training"]
    assert torch.equal(call["t"], call["r"])
    assert torch.equal(call["y"], torch.cat([batch["y"], batch["null"]]))
    assert guide.training and not guide.model.training
    loss(model, **batch)
    assert torch.equal(guide.calls[1]["y"], torch.cat([batch["y"], batch["null"]]))


@pytest.mark.parametrize("along", ["guided", "data"])
def test_guidance_leaves_samples_outside_the_window(along):
    t = torch.tensor([0.29, 0.3, 0.5, 0.8, 0.81, 0.1, 0.9, 0.6])
    batch = with_guidance(small_batch(), Small()) | {"t": t, "r": 0.5 * t}
    loss = golden_loss("jvp", diffusion_ratio=0, guidance=GUIDANCE | {"along": along})
    model = Small()
    guided, plain = loss(model, **batch), golden_loss("jvp", diffusion_ratio=0)(model, **batch)
    changed = (guided.target - plain.target).abs().amax((1, 2, 3)) > 1e-6
    assert changed.tolist() == [False, True, True, True, False, False, False, True]


def test_unit_guidance_changes_nothing():
    batch = with_guidance(golden_batch(), golden_model())
    model = golden_model()
    guided = golden_loss("jvp", guidance=Guidance(w_gt=1.0, w_cond=0.0))(model, **batch)
    plain = golden_loss("jvp")(model, **batch)
    torch.testing.assert_close(guided.target, plain.target)
    torch.testing.assert_close(guided.derivative, plain.derivative)


def test_projection_loss():
    model, features = golden_model(), golden("loss")[0]["h_target"]
    without = golden_loss("jvp")(model, **golden_batch())
    assert without.projection == 0 and without.projection.shape == ()
    for kind in ("jvp", "dde"):
        out = golden_loss(kind)(model, **golden_batch(), features=features)
        cosine = torch.nn.functional.cosine_similarity
        h = golden("loss")[0]["h_proj"]
        expected = (1 - cosine(h, features, dim=-1)).mean()
        torch.testing.assert_close(out.projection.detach(), expected)
        torch.testing.assert_close(
            out.denoising, golden_loss(kind)(model, **golden_batch()).denoising
        )


def test_captions():
    config = TiMConfig.from_released(golden("t2i_model")[1]["model"])
    model = TiM(config)
    generator = torch.Generator().manual_seed(0)
    x, z = torch.randn(2, 4, 8, 4, 6, generator=generator)
    y = torch.randn(4, 7, 20, generator=generator)
    for kind in ("jvp", "dde"):
        loss = golden_loss(kind, guidance=GUIDANCE)
        out = loss(model, x, z, y, null=torch.zeros_like(y), ema_model=model)
        out.loss.backward()
        assert torch.isfinite(out.target).all()


# --- errors


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"transport": "ot_fm"}, TypeError, "transport must be a Transport (tim.transports.get)"),
        ({"derivative": "fd"}, ValueError, "derivative must be 'jvp' or 'dde', got 'fd'"),
        ({"epsilon": 0}, ValueError, "epsilon must be positive, got 0"),
        ({"epsilon": float("nan")}, ValueError, "epsilon must be finite, got nan"),
        ({"diffusion_ratio": "half"}, TypeError, "diffusion_ratio must be a number, got 'half'"),
        ({"diffusion_ratio": 1.5}, ValueError, "diffusion_ratio must be in [0, 1], got 1.5"),
        (
            {"diffusion_ratio": 0.8, "consistency_ratio": 0.3},
            ValueError,
            "diffusion_ratio + consistency_ratio must be at most 1, got 0.8 + 0.3",
        ),
        ({"time_weight": "snr"}, ValueError, "time_weight must be one of 'constant', "),
        ({"time_weight_map": "log"}, ValueError, "time_weight_map must be one of None, 'tangent'"),
        (
            {"transport": transports.get("edm")},
            ValueError,
            "time_weight_map 'tangent' needs times below 1.5708, got T_max = 80 of edm: "
            "use time_weight_map=None",
        ),
        ({"guidance": 0.5}, TypeError, "guidance must be a mapping or Guidance, got float"),
        ({"guidance": {"w_gt": None}}, TypeError, "guidance w_gt must be a number, got None"),
        ({"guidance": {"w": 1}}, ValueError, "guidance has no field 'w', only w_gt, w_cond"),
        ({"guidance": {"along": "x"}}, ValueError, "along must be 'guided' or 'data', got 'x'"),
        ({"guidance": {"w_start": 0.9}}, ValueError, "guidance needs w_start <= w_end"),
    ],
)
def test_constructor_errors(changes, error, message):
    with pytest.raises(error) as caught:
        golden_loss(**changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": 1.0}, TypeError, "x must be a tensor, got float"),
        ({"model": None}, TypeError, "model must be a network, got NoneType"),
        ({"ema_model": "ema"}, TypeError, "ema_model must be a network, got str"),
        ({"x": [1.0]}, TypeError, "x[0] must be a tensor, got float"),
        ({"t": 0.5, "r": 0.1}, TypeError, "t must be a tensor, got float"),
        ({"null": 10}, TypeError, "null must be a tensor, got int"),
        ({"y_guidance": [1] * 8}, TypeError, "y_guidance must be a tensor, got list"),
        ({"features": [1.0]}, TypeError, "features must be a tensor, got list"),
        ({"x": torch.zeros(8, 3)}, ValueError, "x must have shape [B, C, H, W] with B > 0"),
        ({"x": torch.zeros(8, 2, 4, 4).long()}, TypeError, "x must have a floating-point dtype"),
        ({"z": torch.zeros(8, 2, 4, 5)}, ValueError, "z must match x, [8, 2, 4, 4]"),
        ({"y": torch.zeros(7).long()}, ValueError, "y must have B = 8 rows, got shape [7]"),
        ({"t": torch.zeros(8)}, ValueError, "t and r must be given together"),
        (
            {"t": torch.zeros(8), "r": torch.zeros(8, 1)},
            ValueError,
            "r must have shape [B] = [8], got [8, 1]",
        ),
        (
            {"t": torch.zeros(8), "r": torch.zeros(8).long()},
            TypeError,
            "r must have a floating-point dtype, got torch.int64",
        ),
        ({"null": None}, ValueError, "guidance needs ema_model and null"),
        (
            {"null": torch.zeros(1).long()},
            ValueError,
            "null must have the shape of y, [8], got [1]",
        ),
        (
            {"features": torch.zeros(8, 4)},
            ValueError,
            "features must have shape [B, N, z_dim] with B = 8, got [8, 4]",
        ),
    ],
)
def test_call_errors(changes, error, message):
    loss = golden_loss("jvp", guidance=GUIDANCE)
    with pytest.raises(error) as caught:
        loss(**({"model": Small()} | with_guidance(small_batch(), Small()) | changes))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_features_of_the_wrong_shape():
    with pytest.raises(ValueError, match=r"projection head's output, \[8, 16, 32\], got"):
        golden_loss("jvp")(golden_model(), **golden_batch(), features=torch.zeros(8, 16, 31))
