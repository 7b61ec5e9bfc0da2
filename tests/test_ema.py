"""Averaged weights."""

import pytest
import torch
from torch import nn

from tim.ema import EMA, ema_weight


def test_weight_of_a_constant_decay() -> None:
    assert ema_weight(10, 10, decay=0.999, rampup=0) == pytest.approx(0.001)


def test_halflife_in_images_does_not_depend_on_the_batch_size() -> None:
    for batch_size in (1, 10, 100):
        left = 1.0
        for _ in range(1000 // batch_size):
            left *= 1 - ema_weight(10**9, batch_size, decay=0.0, halflife_images=1000, rampup=0.05)
        assert left == pytest.approx(0.5)


def test_rampup_limits_the_halflife_to_a_share_of_the_images_seen() -> None:
    weight = ema_weight(1000, 10, decay=0.9999, rampup=0.05)
    assert weight == pytest.approx(1 - 0.5 ** (10 / 50))
    late = ema_weight(10**9, 10, decay=0.9999, rampup=0.05)
    assert late == pytest.approx(1e-4)


def test_first_step_nearly_replaces_the_random_weights() -> None:
    assert ema_weight(10, 10, decay=0.9999, rampup=0.05) > 0.999


def test_average_follows_the_formula_in_every_parameter() -> None:
    torch.manual_seed(0)
    source = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    ema = EMA(source)
    expected = {k: v.clone().double() for k, v in source.named_parameters()}
    for _ in range(5):
        with torch.no_grad():
            for p in source.parameters():
                p.add_(torch.randn_like(p))
            source[1].running_mean.add_(1)
        ema.update(source, 0.25)
        for name, p in source.named_parameters():
            expected[name] = 0.75 * expected[name] + 0.25 * p.double()
    for name, p in ema.model.named_parameters():
        torch.testing.assert_close(p.double(), expected[name], rtol=1e-6, atol=1e-6)
    assert ema.model[1].running_mean.equal(source[1].running_mean)


def test_average_is_a_frozen_copy_in_evaluation_mode() -> None:
    source = nn.Linear(2, 2)
    ema = EMA(source)
    assert not ema.model.training
    assert not any(p.requires_grad for p in ema.model.parameters())
    before = [p.clone() for p in source.parameters()]
    ema.update(source, 0.5)
    assert all(a.equal(b) for a, b in zip(before, source.parameters(), strict=True))
    assert all(p.requires_grad for p in source.parameters())


def test_the_weight_and_whether_to_skip_may_be_tensors() -> None:
    source = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    ema = EMA(source)
    with torch.no_grad():
        for tensor in (*source.parameters(), source[1].running_mean):
            tensor.fill_(torch.nan)
    before = [tensor.clone() for tensor in ema.model.state_dict().values()]
    ema.update(source, torch.tensor(0.5), skip=torch.tensor(1.0))
    after = ema.model.state_dict().values()
    assert all(a.equal(b) for a, b in zip(before, after, strict=True))
    with torch.no_grad():
        for tensor in (*source.parameters(), source[1].running_mean):
            tensor.fill_(3.0)
    ema.update(source, torch.tensor(0.5), skip=torch.tensor(0.0))
    torch.testing.assert_close(ema.model[0].bias, 0.5 * (before[1] + 3))
    assert ema.model[1].running_mean.equal(source[1].running_mean)
