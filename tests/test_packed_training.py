"""The objective and the sampler on packed batches: each image as if it were alone."""

import dataclasses

import pytest
import torch

from models.networks import CAPTIONS, LABELS, network
from tim import sample, transports
from tim.objective import TransitionLoss
from tim.schedule import resolution_shift, shift_within

OT_FM = transports.get("ot_fm")
GRIDS = ((3, 5), (1, 1), (9, 4), (5, 3), (1, 7), (3, 5))
KINDS = pytest.mark.parametrize("config", [LABELS, CAPTIONS], ids=["labels", "captions"])


def images(config, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    p = config.patch_size
    return [
        torch.randn(config.in_channels, p * a, p * b, generator=generator, dtype=dtype)
        for a, b in GRIDS
    ]


def conditions(config, dtype=torch.float64):
    """y and null."""
    if config.num_classes is not None:
        return torch.arange(len(GRIDS)), torch.full((len(GRIDS),), config.num_classes)
    generator = torch.Generator().manual_seed(5)
    shape = (2, len(GRIDS), 4, config.cap_feat_dim)
    return torch.randn(shape, generator=generator, dtype=dtype).unbind()


def times():
    t = torch.tensor([0.9, 0.5, 0.7, 0.95, 0.4, 0.6], dtype=torch.float64)
    r = torch.tensor([0.9, 0.5, 0.7, 0.2, 0.1, 0.0], dtype=torch.float64)
    return t, r


def gradients(model, out):
    total = out.loss + out.projection
    return torch.autograd.grad(total, list(model.parameters()))


SETTINGS = {
    "jvp": {},
    "dde": {"derivative": "dde"},
    "guided": {"guidance": {"w_gt": 0.9, "w_cond": 0.7}},
    "guided dde": {"guidance": {"w_gt": 0.9, "w_cond": 0.7}, "derivative": "dde"},
    "guided along data": {"guidance": {"along": "data"}},
    "without cosine": {"cosine": False},
}


@KINDS
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_loss_is_the_mean_of_each_image_alone(config, settings):
    model, ema = network(config, torch.float64), network(config, torch.float64, seed=3)
    x, z, (t, r), (y, null) = images(config), images(config, 1), times(), conditions(config)
    features = [torch.randn(a * b, config.z_dim, dtype=torch.float64) for a, b in GRIDS]
    loss = TransitionLoss(transport=OT_FM, consistency_ratio=0.0, **settings)
    extra = {"null": null, "ema_model": ema} if loss.guidance else {}
    out = loss(model, x, z, y, t=t, r=r, features=features, **extra)
    assert [d.abs().max() > 0 for d in out.derivative] == [False] * 3 + [True] * 3

    alone, grads = [], []
    for i in range(len(x)):
        row = slice(i, i + 1)
        single = dataclasses.replace(loss, diffusion_ratio=float(i < 3))
        own = {"null": null[row], "ema_model": ema} if loss.guidance else {}
        one = single(
            model, x[i][None], z[i][None], y[row], t=t[row], r=r[row], features=features[i][None],
            **own,
        )  # fmt: skip
        torch.testing.assert_close(out.target[i], one.target[0])
        torch.testing.assert_close(out.derivative[i], one.derivative[0])
        alone.append((one.loss, one.denoising[0], one.weight[0], one.projection))
        grads.append(gradients(model, one))
    loss_of, denoising, weight, projection = map(torch.stack, zip(*alone, strict=True))
    torch.testing.assert_close(out.loss, loss_of.mean())
    torch.testing.assert_close(out.projection, projection.mean())
    torch.testing.assert_close(out.denoising, denoising)
    torch.testing.assert_close(out.weight, weight)
    for mine, *each in zip(gradients(model, out), *grads, strict=True):
        torch.testing.assert_close(mine, torch.stack(each).mean(0), atol=1e-12, rtol=1e-9)


def test_equal_sizes_are_an_ordinary_batch_with_drawn_times():
    model = network(LABELS)
    x, z = torch.randn(2, 4, 4, 8, 6).unbind()
    y = torch.arange(4)
    loss = TransitionLoss(transport=OT_FM, shift_base=48, diffusion_ratio=0.25)
    outs = []
    for batch in ((x, z), (list(x), list(z))):
        torch.manual_seed(0)
        outs.append(loss(model, *batch, y))
    torch.testing.assert_close(outs[0].loss, outs[1].loss)
    torch.testing.assert_close(outs[0].t, outs[1].t)
    torch.testing.assert_close(outs[0].derivative, torch.stack(outs[1].derivative))


def test_networks_that_take_no_tangents():
    """As dual numbers, in a pass for the images with derivative and one for those without."""
    model = network(LABELS, torch.float64)
    x, z, (t, r), (y, _) = images(LABELS), images(LABELS, 1), times(), conditions(LABELS)
    loss = TransitionLoss(transport=OT_FM, consistency_ratio=0.0)
    given = {"t": t, "r": r}
    expected = loss(model, x, z, y, **given)
    out = loss(lambda x, t, r, y: model(x, t, r, y), x, z, y, **given)
    torch.testing.assert_close(out.loss, expected.loss)
    for mine, other in zip(out.derivative, expected.derivative, strict=True):
        torch.testing.assert_close(mine, other)
        assert not mine.requires_grad


def test_times_are_shifted_by_the_size_of_each_image():
    x = images(LABELS)
    drawn = []
    for base in (None, 64):
        torch.manual_seed(0)
        drawn.append(TransitionLoss(transport=OT_FM, shift_base=base).draw_times(x))
    shifts = [resolution_shift(i.shape[1] * i.shape[2], 64) for i in x]
    expected = shift_within(OT_FM, drawn[0][0], torch.tensor(shifts, dtype=torch.float64))
    torch.testing.assert_close(drawn[1][0], expected)
    assert len(set(shifts)) == 4


@KINDS
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("stochasticity", [0.0, 0.5])
def test_samples_are_those_of_each_image_alone(config, shifted, stochasticity):
    """Guided inside an interval, which images with shifts of their own enter at other steps."""
    model = network(config, torch.float64)
    noise, (y, null) = images(config), conditions(config)
    step_noise = None
    if stochasticity:
        step_noise = [torch.randn(3, *z.shape, dtype=z.dtype) for z in noise]
    shifts = [resolution_shift(z.shape[1] * z.shape[2], 64) for z in noise]
    options = {
        "steps": 5, "transport": OT_FM, "cfg_scale": 2.0, "cfg_interval": (0.2, 0.7),
        "stochasticity": stochasticity, "return_trajectory": True,
    }  # fmt: skip
    if shifted:
        options |= {"schedule": "shifted", "shift": shifts}
    found = sample(model, y, noise, null=null, step_noise=step_noise, **options)
    for i, z in enumerate(noise):
        row = slice(i, i + 1)
        if shifted:
            options["shift"] = shifts[i]
        own = None if step_noise is None else step_noise[i][:, None]
        expected = sample(model, y[row], z[None], null=null[row], step_noise=own, **options)
        torch.testing.assert_close(found[i], expected[:, 0])


def test_packed_samples_keep_dtype_and_draw_their_noise():
    model = network(LABELS)
    noise, (y, _) = images(LABELS, dtype=torch.float32), conditions(LABELS)
    options = {"steps": 4, "transport": OT_FM, "stochasticity": 0.3}

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return sample(model, y, noise, generator=generator, **options)

    first, again, other = draw(0), draw(0), draw(1)
    for a, b, c, z in zip(first, again, other, noise, strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)
        assert (a.dtype, a.shape) == (z.dtype, z.shape)


def test_mistakes():
    model = network(LABELS, torch.float64)
    x, z, (t, r), (y, _) = images(LABELS), images(LABELS, 1), times(), conditions(LABELS)
    loss = TransitionLoss(transport=OT_FM)
    for changes, message in (
        ({"x": []}, "x must hold at least one image"),
        ({"z": z[:5]}, r"z must match x, \[\[4, 6, 10\]"),
        ({"z": [i.float() for i in z]}, "z must match x"),
        ({"x": [*x[:5], x[5].float()]}, r"x\[5\] must be torch.float64 on cpu like x\[0\]"),
        ({"y": y[:5]}, "y must have B = 6 rows"),
        ({"features": torch.zeros(6, 3, 20)}, r"list of B = 6 tensors .* got a tensor \[6, 3, 20"),
        ({"features": [torch.zeros(3, 20)] * 6}, "shape of the projection head's output"),
    ):
        with pytest.raises(ValueError, match=message):
            loss(**{"model": model, "x": x, "z": z, "y": y, "t": t, "r": r, **changes})
    for changes, message in (
        ({"cuda_graph": True}, "cuda_graph needs noise of one size"),
        ({"schedule": "shifted", "shift": [1.0]}, "shift must be one for each of the 6 images"),
        ({"schedule": "shifted", "shift": [-1.0] * 6}, "shift must be positive"),
        ({"stochasticity": 0.5, "step_noise": z}, "step_noise must be a list of tensors of shapes"),
        ({"step_noise": z}, "step_noise needs stochasticity"),
        ({"noise": []}, "noise must hold at least one image"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(**{"model": model, "y": y, "noise": z, "transport": OT_FM, **changes})
