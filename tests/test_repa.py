import json
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tim.repa import FeatureEncoder

SMALL = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4,
    "image_size": 16,
}  # fmt: skip


def pictures(height: int = 24, width: int = 32) -> torch.Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def saved(kind: str, folder):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "dinov2":
        model = transformers.Dinov2Model(transformers.Dinov2Config(**SMALL))
    elif kind == "vit":
        model = transformers.ViTModel(transformers.ViTConfig(intermediate_size=16, **SMALL))
    else:
        vision = {**SMALL, "intermediate_size": 16}
        text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                "intermediate_size": 16, "vocab_size": 32}  # fmt: skip
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
        model = transformers.CLIPModel(config)
    model.eval().save_pretrained(folder)
    settings = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return getattr(model, "vision_model", model)


@pytest.mark.parametrize("kind", ["dinov2", "vit", "clip"])
def test_encoders_of_transformers(kind, tmp_path):
    model = saved(kind, tmp_path)
    encoder = FeatureEncoder.load(str(tmp_path))
    x = pictures()
    features = encoder(x, 3, 5)
    assert features.shape == (2, 15, 16)
    pixels = F.interpolate(x / 2 + 0.5, (12, 20), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4]))
    options = {} if kind == "dinov2" else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        states = model(pixel_values=(pixels - mean) / std, **options).last_hidden_state
    torch.testing.assert_close(features, states[:, 1:])  # one class token in front
    assert encoder.module.training is False
    half = FeatureEncoder.load(str(tmp_path), dtype=torch.bfloat16)(x, 3, 5)
    assert half.dtype == torch.float32


class Patches(nn.Module):
    """Answers like RADIO: a summary, and one state for each patch."""

    patch_size = 2

    def forward(self, x):
        assert x.min() >= 0 and x.max() <= 1
        return x.mean((2, 3)), F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)


class Map(nn.Module):
    def forward(self, x):
        return F.avg_pool2d(x, 8)


def wrong():
    return "no module"


def narrow():
    return Few()


class Few(nn.Module):
    def forward(self, x):
        return torch.zeros(len(x), 3, 4)


def test_code_of_your_own():
    encoder = FeatureEncoder.load(f"{__name__}:Patches")
    x = pictures(6, 10)
    features = encoder(x, 3, 5)
    expected = F.pixel_unshuffle(x / 2 + 0.5, 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(features, expected)
    # The first token is that of the upper left corner, the second its neighbour to the right.
    assert features[0, 1, 0] == x[0, 0, 0, 2] / 2 + 0.5


def test_maps_are_brought_to_the_grid():
    features = FeatureEncoder.load(f"{__name__}:Map")(pictures(), 3, 5)
    assert features.shape == (2, 15, 3)
    flat = FeatureEncoder(Map())(torch.ones(1, 3, 8, 8), 2, 3)
    torch.testing.assert_close(flat, torch.ones(1, 6, 3))


def test_mistakes(tmp_path, monkeypatch):
    with pytest.raises(ImportError, match="features absent_package:Net: No module named"):
        FeatureEncoder.load("absent_package:Net")
    with pytest.raises(ValueError, match=f"module {__name__} has no Absent"):
        FeatureEncoder.load(f"{__name__}:Absent")
    with pytest.raises(TypeError, match=r"must make an nn.Module, got str"):
        FeatureEncoder.load(f"{__name__}:wrong")
    with pytest.raises(ValueError, match=r"at least 6 states for 2 x 3 patches .*, got 3"):
        FeatureEncoder.load(f"{__name__}:narrow")(pictures(), 2, 3)
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="features must be a folder or hub id") as caught:
        FeatureEncoder.load(str(tmp_path))
    assert "\n" not in str(caught.value)
    from small_encoders import cut_in_half, gemma, saved

    folder = saved(tmp_path / "cut", gemma())
    cut_in_half(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"^features must be .* deserializing header"):
        FeatureEncoder.load(str(folder))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'transition-models\[t2i\]'"):
        FeatureEncoder.load(str(tmp_path))
