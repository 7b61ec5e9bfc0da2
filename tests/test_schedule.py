import dataclasses
import math

import pytest
import torch

from tim import transports
from tim.config import ObjectiveConfig
from tim.models import TiM
from tim.objective import TransitionLoss
from tim.sampler import sample
from tim.schedule import resolution_shift, shift_time, shift_within
from tim.trainer import sample_rows
from tim.transports import TRANSPORTS
from tiny_runs import config


def test_multiplies_the_ratio_of_noise_to_data():
    t = torch.linspace(0, 0.99, 50, dtype=torch.float64)
    for s in (0.25, 1.0, 4.0):
        shifted = shift_time(t, s)
        torch.testing.assert_close(shifted / (1 - shifted), s * t / (1 - t))
        torch.testing.assert_close(shift_time(shifted, 1 / s), t)
    per_sample = torch.tensor([1.0, 2.0])
    assert shift_time(torch.tensor([0.5, 0.5]), per_sample).tolist() == pytest.approx([0.5, 2 / 3])


@pytest.mark.parametrize("name", TRANSPORTS)
def test_stays_within_the_times_of_a_transport(name):
    transport = transports.get(name)
    ends = torch.tensor([transport.T_min, transport.T_max], dtype=torch.float64)
    torch.testing.assert_close(shift_within(transport, ends, 3.0), ends)
    middle = ends.mean()
    assert middle < shift_within(transport, middle, 3.0) < ends[1]


def drawn(shape, **settings):
    transport = transports.get("ot_fm", **settings.pop("transport", {}))
    torch.manual_seed(7)
    return TransitionLoss(transport=transport, diffusion_ratio=0.0, **settings).draw_times(
        torch.zeros(shape, dtype=torch.float64)
    )


@pytest.mark.parametrize(("side", "s"), [(16, 0.5), (32, 1.0), (128, 4.0)])
def test_training_times_of_a_resolution(side, s):
    """For log-normal noise levels a shift by s is a mean that is larger by log s."""
    shape = (64, 2, side, side)
    t, r = drawn(shape, shift_base=1024, transport={"P_mean": -0.4})
    moved = {"P_mean": -0.4 + math.log(s)}
    expected_t, expected_r = drawn(shape, transport=moved)
    torch.testing.assert_close(t, expected_t)
    torch.testing.assert_close(r, expected_r)
    plain = drawn(shape, transport={"P_mean": -0.4})[0]
    assert torch.equal(t, plain) == (s == 1)


def test_samples_of_a_run_follow_its_shift():
    run = config(ObjectiveConfig(shift_base=16))
    torch.manual_seed(0)
    model = TiM(run.model)
    torch.nn.init.normal_(model.final_layer.linear.weight)
    noise = torch.randn((1, 1, 8, 8), generator=torch.Generator().manual_seed(run.sample.seed))
    label = torch.tensor([3])
    for shift, objective in ((2.0, run.objective), (None, ObjectiveConfig())):
        asked = dataclasses.replace(run, objective=objective)
        _, two = sample_rows(model, asked, [3], torch.device("cpu"))
        schedule = {} if shift is None else {"schedule": "shifted", "shift": shift}
        expected = sample(model, label, noise, 2, transport=run.transport.build(), **schedule)
        assert torch.equal(two, expected)


def test_off_by_default_and_checked():
    assert ObjectiveConfig().schedule(32, 32) == {"schedule": "linear"}
    assert ObjectiveConfig(shift_base=1024).schedule(32, 64)["shift"] == pytest.approx(2**0.5)
    assert resolution_shift(16384) == 4
    transport = transports.get("ot_fm")
    assert TransitionLoss(transport=transport).shift_base is None
    with pytest.raises(ValueError, match="shift_base must be at least 1, got 0"):
        TransitionLoss(transport=transport, shift_base=0)
    with pytest.raises(TypeError, match="shift_base must be a number, got '32'"):
        TransitionLoss(transport=transport, shift_base="32")
