import copy
import math
from weakref import WeakKeyDictionary

import pytest
import torch
from torch import nn

from gaussian import GaussianTransition
from golden_files import golden, relative_error
from rehearsal import Rehearsed
from tim import sampling_graph, transports
from tim.models import TiM, TiMConfig
from tim.sampler import resolution_shift, sample, shift_time
from tim.transports import TRANSPORTS, rows

RUNS = list(golden("sample")[1]["runs"])
OT_FM = transports.get("ot_fm")


class Recorder(nn.Module):
    """Wraps a network and remembers what it was given."""

    def __init__(self, model):
        super().__init__()
        self.model, self.calls = model, []

    def forward(self, x, t, r, y):
        self.calls.append({"x": x, "t": t, "r": r, "y": y, "training": self.training})
        assert not torch.is_grad_enabled()
        return self.model(x, t, r, y)


class Toy(nn.Module):
    def forward(self, x, t, r, y):
        return torch.tanh(x) * rows(1 + t - r, x) + rows(y, x).to(x.dtype)


@pytest.fixture(scope="module")
def golden_model():
    tensors, config = golden("c2i_model")
    model = TiM(TiMConfig.from_released(config["model"]))
    model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    return model


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def toy_sample(model=None, **options):
    options = {"y": torch.tensor([1, 2]), "noise": noise(2, 1, 3, 3), "transport": OT_FM} | options
    return sample(model or Toy(), **options)


# --- against the published implementation


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("run", RUNS)
def test_golden(golden_model, run, dtype):
    tensors, config = golden("sample")
    settings = config["runs"][run]
    stochastic = settings["stochasticity_ratio"] > 0
    model = Recorder(golden_model.to(dtype))
    trajectory = sample(
        model,
        tensors["y"],
        tensors["z"].to(dtype),
        steps=settings["num_steps"],
        transport=transports.get("ot_fm", **config["transport_params"]),
        cfg_scale=settings["cfg_scale"],
        cfg_interval=(settings["cfg_low"], settings["cfg_high"]),
        null=tensors["y_null"],
        stochasticity=settings["stochasticity_ratio"],
        step_noise=tensors[f"{run}.noise"].to(dtype) if stochastic else None,
        diffusion=settings.get("sample_type") == "ddiffusion",
        return_trajectory=True,
    )
    double = dtype == torch.float64
    expected = tensors[f"{run}64" if double else run]
    assert trajectory.dtype == dtype and torch.equal(trajectory[0], tensors["z"].to(dtype))
    assert relative_error(trajectory, expected) < (5e-7 if double else 1e-5)
    steps = tensors[f"{run}.steps"].tolist()
    for call, (t, r, guided) in zip(model.calls, steps, strict=True):
        assert call["x"].dtype == dtype
        assert call["t"].tolist() == pytest.approx([t] * len(call["x"]), abs=1e-6)
        assert call["r"].tolist() == pytest.approx([r] * len(call["x"]), abs=1e-6)
        assert len(call["x"]) == (4 if guided else 2)


def test_captions():
    tensors, config = golden("t2i_model")
    model = TiM(TiMConfig.from_released(config["model"]))
    model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    y, x = tensors["y"], tensors["x"]
    out = sample(model, y, x, 2, transport=OT_FM, cfg_scale=3, cfg_interval=(0, 2), null=0 * y)
    expected, half = x.double(), torch.tensor([0.5, 0.5])
    for t, r in ((2 * half, half), (half, 0 * half)):
        state = expected.float()
        with torch.no_grad():
            F_null, F_cond = (model(state, t, r, c).double() for c in (0 * y, y))
        expected = expected - 0.5 * (F_null + 3 * (F_cond - F_null))
    assert relative_error(out, expected) < 1e-5


# --- exactness


@pytest.mark.parametrize("name", TRANSPORTS)
def test_every_number_of_steps_ends_at_the_same_point(name):
    transport = transports.get(name)
    model, x = GaussianTransition(transport, 0.7), noise(2, 1, 4, 4, dtype=torch.float64)
    y = torch.zeros(2)
    ends = [sample(model, y, x, steps, transport=transport) for steps in (1, 2, 3, 8, 64)]
    T_max, T_min = (torch.tensor(t).double() for t in (transport.T_max, transport.T_min))
    first = transport.interpolant(T_max)[1] * x
    for end in ends:
        assert relative_error(end, first * model.growth(T_min) / model.growth(T_max)) < 1e-9


def test_diffusion_stepping_needs_many_steps():
    model, x, y = (
        GaussianTransition(OT_FM, 0.7),
        noise(2, 1, 4, 4, dtype=torch.float64),
        torch.zeros(2),
    )
    exact = 0.7 * x

    def error(steps):
        end = sample(model, y, x, steps, transport=OT_FM, diffusion=True)
        return relative_error(end, exact)

    assert error(1) > 0.3 and error(64) < 0.05
    assert error(64) == pytest.approx(error(32) / 2, rel=0.1)


def test_stochastic_sampling_keeps_the_distribution():
    model, x, y = GaussianTransition(OT_FM, 0.5), noise(64, 1, 16, 16), torch.zeros(64)
    generator = torch.Generator().manual_seed(1)
    end = sample(model, y, x, 64, transport=OT_FM, stochasticity=0.5, generator=generator)
    assert end.std().item() == pytest.approx(0.5, rel=0.05)
    # Fresh noise: the end is no longer a function of the first state alone.
    assert relative_error(end, 0.5 * x) > 0.2


# --- times


def test_linear_and_shifted_times():
    model = Recorder(Toy())
    toy_sample(model, steps=4)
    assert [call["t"][0].item() for call in model.calls] == pytest.approx([1, 0.75, 0.5, 0.25])
    assert [call["r"][0].item() for call in model.calls] == pytest.approx([0.75, 0.5, 0.25, 0])
    model = Recorder(Toy())
    toy_sample(model, steps=4, schedule="shifted", shift=3.0)
    expected = [3 * u / (1 + 2 * u) for u in (1, 0.75, 0.5, 0.25)]
    assert [call["t"][0].item() for call in model.calls] == pytest.approx(expected)
    assert model.calls[-1]["r"][0] == 0
    unshifted = toy_sample(steps=4, schedule="shifted", shift=1.0)
    torch.testing.assert_close(unshifted, toy_sample(steps=4))


def test_shifted_times_of_other_ranges():
    transport = transports.get("trigflow", T_min=0.1, T_max=1.5)
    model = Recorder(Toy())
    toy_sample(model, steps=2, schedule="shifted", shift=2.0, transport=transport)
    times = [model.calls[0]["t"][0], model.calls[1]["t"][0], model.calls[1]["r"][0]]
    assert [t.item() for t in times] == pytest.approx([1.5, 0.1 + 1.4 * 2 / 3, 0.1])


def test_resolution_shift():
    assert resolution_shift(1024) == 1
    assert resolution_shift(256) == 0.5 and resolution_shift(4096) == 2
    assert resolution_shift(4096, base_tokens=4096) == 1
    assert shift_time(1.0, 2.0) == 1 and shift_time(0.0, 2.0) == 0
    assert shift_time(0.5, 2.0) == pytest.approx(2 / 3)


@pytest.mark.parametrize("container", [list, torch.tensor])
def test_explicit_times(container):
    model, times = Recorder(Toy()), [0.9, 0.4, 0.1]
    trajectory = toy_sample(model, schedule=container(times), return_trajectory=True)
    assert len(trajectory) == 3
    given = [(call["t"][0].item(), call["r"][0].item()) for call in model.calls]
    assert given == [pytest.approx((0.9, 0.4)), pytest.approx((0.4, 0.1))]


def test_diffusion_stepping_gives_the_model_equal_times():
    model = Recorder(Toy())
    toy_sample(model, steps=3, diffusion=True)
    assert all(torch.equal(call["t"], call["r"]) for call in model.calls)


def test_times_go_through_c_noise():
    transport = transports.get("edm")
    model = Recorder(Toy())
    toy_sample(model, steps=1, transport=transport)
    assert model.calls[0]["t"][0].item() == pytest.approx(math.log(80) / 4)
    assert model.calls[0]["r"][0].item() == pytest.approx(math.log(0.01) / 4)


# --- guidance


@pytest.mark.parametrize(
    ("interval", "guided"),
    [
        ((0.0, 1.0), [False, True, True, True, True, True, True, True, True, True]),
        ((0.0, 1.1), [True] * 10),
        # Steps on an edge are outside, however their time was rounded.
        ((0.3, 0.7), [False] * 4 + [True] * 3 + [False] * 3),
        ((0.1, 0.6), [False] * 5 + [True] * 4 + [False]),
    ],
)
@pytest.mark.parametrize("transport", ["ot_fm", "trigflow"])
def test_guidance_interval_is_open_and_a_share_of_T_max(interval, guided, transport):
    model = Recorder(Toy())
    y = torch.tensor([1, 2])
    toy_sample(
        model,
        steps=10,
        cfg_scale=2.0,
        cfg_interval=interval,
        null=y + 5,
        transport=transports.get(transport),
    )
    assert [len(call["x"]) == 4 for call in model.calls] == guided
    for call in model.calls:
        both = torch.equal(call["y"], torch.cat([y, y + 5]))
        assert both if len(call["x"]) == 4 else torch.equal(call["y"], y)


def test_scale_one_is_no_guidance():
    model = Recorder(Toy())
    toy_sample(model, null=torch.tensor([7, 7]))
    assert all(len(call["x"]) == 2 for call in model.calls)


def test_each_image_may_have_its_own_scale(golden_model):
    x, y = noise(3, 4, 8, 8), torch.tensor([1, 2, 3])
    options = {"transport": OT_FM, "steps": 4, "null": golden_model.null_condition(3)}
    scales = [1.0, 2.0, 3.5]
    together = sample(golden_model, y, x, cfg_scale=scales, **options)
    packed = sample(golden_model, y, list(x), cfg_scale=scales, **options)
    for i, scale in enumerate(scales):
        alone = sample(golden_model, y, x, cfg_scale=scale, **options)[i]
        assert relative_error(together[i], alone) < 1e-5
        assert relative_error(packed[i], alone) < 1e-5
        other = sample(golden_model, y, x, cfg_scale=scale + 1, **options)[i]
        assert relative_error(together[i], other) > 1e-2


# --- state, noise, modes


def test_result_is_the_last_row_and_dtypes_are_kept():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        start = noise(2, 1, 3, 3).to(dtype)
        model = Recorder(Toy())
        trajectory = toy_sample(model, noise=start, return_trajectory=True)
        assert trajectory.shape == (5, 2, 1, 3, 3) and trajectory.dtype == dtype
        assert torch.equal(trajectory[0], start)
        assert torch.equal(toy_sample(noise=start), trajectory[-1])
        wide = torch.promote_types(dtype, torch.float32)
        assert all(c["x"].dtype == dtype and c["t"].dtype == wide for c in model.calls)


def test_first_state_has_the_size_of_the_noise_at_T_max():
    transport = transports.get("ve")
    trajectory = toy_sample(transport=transport, return_trajectory=True)
    assert torch.equal(trajectory[0], 100 * noise(2, 1, 3, 3))


def test_state_is_kept_in_float64():
    """Steps of 1/4096 would be lost in a bf16 state."""

    class Constant(nn.Module):
        def forward(self, x, t, r, y):
            return torch.full_like(x, 0.25)

    start = torch.full((1, 1, 2, 2), 2.0, dtype=torch.bfloat16)
    end = sample(Constant(), torch.zeros(1), start, 4096, transport=OT_FM)
    assert torch.equal(end, torch.full_like(start, 1.75))


def test_stochastic_steps():
    start, extra = noise(2, 1, 3, 3), noise(3, 2, 1, 3, 3, seed=5)
    plain = toy_sample(steps=5, return_trajectory=True)
    given = toy_sample(steps=5, stochasticity=0.3, step_noise=extra, return_trajectory=True)
    assert torch.equal(plain[1], given[1]) and not torch.equal(plain[2], given[2])
    # Never on the last step: it is the deterministic one from its own state.
    x, t, r = given[-2].double(), torch.tensor(0.2).double(), torch.tensor(0.0).double()
    F = Toy()(given[-2], t.float().repeat(2), r.float().repeat(2), torch.tensor([1, 2]))
    assert relative_error(given[-1], OT_FM.step(x, t, r, F.double())) < 1e-6
    seeds = [
        toy_sample(
            steps=5,
            noise=start,
            stochasticity=0.3,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (0, 0, 1)
    ]
    assert torch.equal(seeds[0], seeds[1]) and not torch.equal(seeds[0], seeds[2])
    for steps in (1, 2):
        deterministic = toy_sample(steps=steps)
        assert torch.equal(toy_sample(steps=steps, stochasticity=0.3), deterministic)


def test_evaluation_mode_is_set_and_restored_and_no_gradient_is_kept():
    class Trainable(Toy):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x, t, r, y):
            return self.weight * super().forward(x, t, r, y)

    model = Recorder(Trainable())
    model.model.eval()
    out = toy_sample(model)
    assert not out.requires_grad and not any(call["training"] for call in model.calls)
    assert model.training and not model.model.training

    class Failing(nn.Module):
        def forward(self, *_):
            raise RuntimeError("out of memory")

    failing = Failing()
    with pytest.raises(RuntimeError, match="out of memory"):
        toy_sample(failing)
    assert failing.training


def test_progress_bar(capsys):
    assert torch.equal(toy_sample(progress=True), toy_sample())
    printed = capsys.readouterr()
    assert "sampling" in printed.out + printed.err
    toy_sample()
    printed = capsys.readouterr()
    assert printed.out + printed.err == ""


# --- errors


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": 2.0}, TypeError, "steps must be an integer, got 2.0"),
        ({"transport": "ot_fm"}, TypeError, "transport must be a Transport"),
        (
            {"noise": torch.zeros(2, 3)},
            ValueError,
            "noise must have shape [B, C, H, W] with B > 0, got [2, 3]",
        ),
        (
            {"noise": torch.zeros(2, 1, 3, 3).long()},
            TypeError,
            "noise must have a floating-point dtype, got torch.int64",
        ),
        ({"y": torch.zeros(3)}, ValueError, "y must have B = 2 rows, got shape [3]"),
        ({"y": [1, 2]}, TypeError, "y must be a tensor, got list"),
        ({"cfg_scale": 0.5}, ValueError, "cfg_scale must be at least 1 (no guidance), got 0.5"),
        ({"cfg_scale": 2.0}, ValueError, "cfg_scale 2.0 needs null"),
        ({"cfg_scale": [1.0, 2.0]}, ValueError, "cfg_scale [1.0, 2.0] needs null"),
        ({"cfg_scale": [2.0]}, ValueError, "cfg_scale must be one or B = 2, got 1"),
        ({"cfg_scale": [1, 0.5]}, ValueError, "cfg_scale must be at least 1 (no guidance), got 0."),
        ({"cfg_scale": [1, "2"]}, TypeError, "cfg_scale must be a number, got '2'"),
        (
            {"null": torch.zeros(1)},
            ValueError,
            "null must have the shape of y, [2], got [1]",
        ),
        ({"cfg_interval": (0.8, 0.2)}, ValueError, "cfg_interval must be (low, high)"),
        ({"schedule": "cosine"}, ValueError, "schedule must be 'linear', 'shifted' or times"),
        ({"schedule": "shifted"}, ValueError, "shift and schedule='shifted' go together"),
        ({"model": 3}, TypeError, "model must be a network, got int"),
        ({"cfg_scale": "2"}, TypeError, "cfg_scale must be a number, got '2'"),
        ({"cfg_scale": float("nan")}, ValueError, "cfg_scale must be finite, got nan"),
        ({"cfg_interval": 0.5}, TypeError, "cfg_interval must be (low, high), got 0.5"),
        ({"cfg_scale": 2.0, "null": 10}, TypeError, "null must be a tensor, got int"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator, got int"),
        ({"schedule": ["a"]}, TypeError, "schedule must be a name or times, got ['a']"),
        ({"schedule": "shifted", "shift": "2"}, TypeError, "shift must be a number, got '2'"),
        ({"shift": 2.0}, ValueError, "shift and schedule='shifted' go together"),
        ({"schedule": "shifted", "shift": 0.0}, ValueError, "shift must be positive, got 0.0"),
        ({"schedule": [1.0]}, ValueError, "schedule must have shape [steps + 1], got [1]"),
        ({"schedule": [0.5, 0.5]}, ValueError, "schedule must descend within [0, 1], got"),
        ({"schedule": [1.5, 0.5]}, ValueError, "schedule must descend within [0, 1], got"),
        ({"schedule": [1.0, 0.0], "shift": 2.0}, ValueError, "shift needs schedule='shifted'"),
        ({"stochasticity": 1.5}, ValueError, "stochasticity must be in [0, 1], got 1.5"),
        (
            {"stochasticity": 0.5, "transport": transports.get("vp")},
            ValueError,
            "stochasticity needs transport ot_fm, got vp",
        ),
        (
            {"stochasticity": 0.5, "step_noise": torch.zeros(4, 2, 1, 3, 3)},
            ValueError,
            "step_noise must have shape [2, 2, 1, 3, 3], got [4, 2, 1, 3, 3]",
        ),
        (
            {"step_noise": torch.zeros(2, 2, 1, 3, 3)},
            ValueError,
            "step_noise needs stochasticity > 0, got 0",
        ),
    ],
)
def test_errors(changes, error, message):
    with pytest.raises(error) as caught:
        toy_sample(**changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_resolution_shift_errors():
    with pytest.raises(ValueError, match="tokens and base_tokens must be positive, got 0, 1024"):
        resolution_shift(0)


# --- as a CUDA graph


GRAPHED = {
    "plain": {},
    "guided": {"cfg_scale": 2.5, "null": torch.tensor([3, 3]), "cfg_interval": (0.2, 0.7)},
    "scales": {"cfg_scale": [2.5, 1.0], "null": torch.tensor([3, 3])},
    "diffusion": {"diffusion": True},
    "noisy": {"stochasticity": 0.5, "step_noise": noise(8, 2, 1, 3, 3, seed=4)},
    "trajectory": {"return_trajectory": True, "cfg_scale": 2.0, "null": torch.tensor([0, 0])},
}


@pytest.fixture
def rehearsed(monkeypatch):
    """Graphs whose replays run the function again, so that a CPU has them."""
    monkeypatch.setattr("tim.sampling_graph.Replayed", Rehearsed)
    monkeypatch.setattr("tim.sampler.check_device", lambda device, what: None)
    monkeypatch.setattr("tim.sampling_graph._graphs", WeakKeyDictionary())


@pytest.mark.parametrize("name", GRAPHED)
def test_steps_on_static_tensors_are_the_plain_steps(rehearsed, name):
    options = GRAPHED[name] | {"steps": 10}
    expected = toy_sample(**options)
    model = Toy()
    for _ in range(2):  # the second time from graphs that are there
        actual = toy_sample(model, cuda_graph=True, **options)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_static_steps_of_every_transport(rehearsed, transport):
    options = {"transport": transports.get(transport), "steps": 7, "return_trajectory": True}
    options |= {"noise": noise(2, 1, 3, 3, dtype=torch.float64)}
    expected = toy_sample(**options)
    torch.testing.assert_close(toy_sample(cuda_graph=True, **options), expected, rtol=1e-12, atol=0)


def test_graphs_are_kept_for_a_model_and_its_shapes(rehearsed):
    model = Toy()

    def graphs() -> list:
        return [graph for kept in sampling_graph._graphs.values() for graph in kept.values()]

    for batch in (2, 3):
        y = torch.arange(batch)
        for _ in range(3):
            toy_sample(model, y=y, noise=noise(batch, 1, 3, 3), steps=5, cuda_graph=True)
    assert len(graphs()) == 2 and all(g.replayed.recordings == 1 for g in graphs())
    for batch in range(1, 2 * sampling_graph.MOST_GRAPHS):
        y = torch.arange(batch)
        toy_sample(model, y=y, noise=noise(batch, 1, 3, 3), steps=1, cuda_graph=True)
    assert len(graphs()) == sampling_graph.MOST_GRAPHS
    del model
    assert not len(sampling_graph._graphs)


def test_graphs_follow_weights_that_change_and_weights_that_move(rehearsed, golden_model):
    model = copy.deepcopy(golden_model)
    options = {"y": torch.tensor([1, 2]), "noise": noise(2, 4, 8, 8), "steps": 5}
    for change in ("none", "in place", "moved"):
        with torch.no_grad():
            for parameter in model.parameters():
                if change == "in place":
                    parameter.mul_(1.1)
                elif change == "moved":
                    parameter.data = parameter.data * 0.9
        expected = toy_sample(model, **options)
        torch.testing.assert_close(toy_sample(model, cuda_graph=True, **options), expected)


def test_a_graph_needs_a_cuda_device():
    with pytest.raises(ValueError, match=r"^cuda_graph needs a CUDA device, got cpu$"):
        toy_sample(cuda_graph=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("guided", [False, True])
def test_captured_samples_are_the_uncaptured_ones(golden_model, guided, autocast):
    model = copy.deepcopy(golden_model).cuda()
    options = {"y": torch.tensor([1, 2]).cuda(), "noise": noise(2, 4, 8, 8).cuda(), "steps": 12}
    if guided:
        options |= {"cfg_scale": 2.0, "null": model.null_condition(2), "cfg_interval": (0.1, 0.6)}
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        expected = toy_sample(model, **options)
        for _ in range(2):
            actual = toy_sample(model, cuda_graph=True, **options)
            assert relative_error(actual, expected) < (1e-2 if autocast else 1e-5)
