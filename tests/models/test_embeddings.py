import math

import pytest
import torch
import torch.nn.functional as F
from networks import LABELS, network

from tim.models.embeddings import CaptionEmbedder, PatchEmbedder, TimeEmbedder, time_features


def test_time_features_are_cosines_then_sines():
    t = torch.tensor([0.0, 0.25, 1.5], dtype=torch.float64)
    features = time_features(t)
    assert features.shape == (3, 256)
    for k in (0, 1, 77, 127):
        angle = t * 10000 ** (-k / 128)
        torch.testing.assert_close(features[:, k], angle.cos())
        torch.testing.assert_close(features[:, 128 + k], angle.sin())


@pytest.mark.parametrize(
    ("times", "features"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2],
)
def test_time_features_are_at_least_float32(times, features):
    t = torch.tensor([0.7], dtype=times)
    assert time_features(t).dtype == features
    expected = math.cos(t.item())
    assert abs(time_features(t)[0, 0].item() - expected) <= torch.finfo(features).eps


def test_times_keep_their_resolution_under_autocast():
    embedder = TimeEmbedder(16)
    t = torch.tensor([0.5, 0.5001])
    exact = embedder(t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(embedder(t), exact)


def test_time_features_have_the_exact_tangent():
    t = torch.tensor([0.3, 2.0], dtype=torch.float64)
    _, tangent = torch.func.jvp(time_features, (t,), (torch.ones_like(t),))
    frequencies = 10000 ** (-torch.arange(128, dtype=torch.float64) / 128)
    angles = t[:, None] * frequencies
    expected = torch.cat((-angles.sin() * frequencies, angles.cos() * frequencies), dim=1)
    torch.testing.assert_close(tangent, expected)


@pytest.mark.parametrize("patch", [1, 2, 4])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_patches_are_those_of_a_convolution(patch, memory_format):
    embedder = PatchEmbedder(patch, 3, 16).double()
    x = torch.randn(2, 3, 4 * patch, 3 * patch, dtype=torch.float64)
    x = x.to(memory_format=memory_format)
    expected = F.conv2d(x, embedder.proj.weight, embedder.proj.bias, stride=patch)
    torch.testing.assert_close(embedder(embedder.patches(x)), expected.flatten(2).mT)


def test_captions_are_normalised_and_converted():
    embedder = CaptionEmbedder(6, 8)
    y = torch.randn(2, 5, 6)
    torch.testing.assert_close(embedder(3 * y.double() + 2), embedder(y), atol=1e-4, rtol=1e-4)


def test_null_label_is_the_last_row():
    model = network(LABELS)
    null = model.null_condition(2)
    table = model.y_embedder.embedding_table.weight
    assert torch.equal(model.y_embedder(null), table[-1:].expand(2, -1))
