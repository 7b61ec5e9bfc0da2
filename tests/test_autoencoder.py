import sys

import pytest
import torch

from small_encoders import autoencoder_dc, autoencoder_kl
from tim.autoencoder import (
    decode,
    downsampling,
    enable_tiling,
    encode,
    load_autoencoder,
    statistics,
)

KINDS = {"kl": autoencoder_kl, "dc": autoencoder_dc}


@pytest.fixture(params=KINDS, scope="module")
def vae(request):
    return KINDS[request.param]()


def pictures(size: int = 16, batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_loads_what_diffusers_saved(vae, tmp_path):
    vae.save_pretrained(tmp_path)
    loaded = load_autoencoder(str(tmp_path), dtype=torch.float64)
    assert type(loaded) is type(vae)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert {p.dtype for p in loaded.parameters()} == {torch.float64}
    assert encode(loaded, pictures()).dtype == torch.float32


def test_latents_are_scaled_as_the_networks_need(vae):
    x = pictures()
    latents = encode(vae, x)
    factor = downsampling(vae)
    assert latents.shape == (2, vae.config.latent_channels, 16 // factor, 16 // factor)
    with torch.no_grad():
        raw = vae.encode(x)
        z = raw.latent if hasattr(raw, "latent") else raw.latent_dist.mean
    torch.testing.assert_close(latents, z * vae.config.scaling_factor)
    with torch.no_grad():
        torch.testing.assert_close(decode(vae, latents), vae.decode(z).sample)


def test_statistics_of_the_released_autoencoders():
    """Mean 0 and deviation 1 / scaling_factor, in the classes that the hub ids name."""
    mean, std = statistics(autoencoder_kl())
    assert (mean.item(), std.item()) == (0, pytest.approx(1 / 0.18215))
    mean, std = statistics(autoencoder_dc())
    assert (mean.item(), std.item()) == (0, pytest.approx(1 / 0.41407))


def test_statistics_per_channel_and_shift():
    mean, std = statistics(
        autoencoder_kl(latents_mean=[1.0, 2, 3, 4], latents_std=[1.0, 2, 4, 8], scaling_factor=0.5)
    )
    assert mean.flatten().tolist() == [1, 2, 3, 4] and std.flatten().tolist() == [2, 4, 8, 16]
    assert mean.shape == std.shape == (1, 4, 1, 1)
    vae = autoencoder_kl(shift_factor=0.25, scaling_factor=2.0)
    assert [s.item() for s in statistics(vae)] == [0.25, 0.5]
    x = pictures()
    torch.testing.assert_close(encode(vae, x), (vae.encode(x).latent_dist.mean - 0.25) * 2)


def test_full_size_factors():
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        assert downsampling(autoencoder_kl(blocks=4)) == 8
        large = diffusers.AutoencoderDC()
    assert downsampling(large) == 32 and large.config.latent_channels == 32
    with torch.device("meta"):
        assert downsampling(diffusers.AutoencoderTiny()) == 8


def test_tiny_autoencoder_round_trip():
    diffusers = pytest.importorskip("diffusers")
    vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
    )  # fmt: skip
    latents = encode(vae, pictures())
    assert decode(vae, latents).shape == (2, 3, 16, 16)
    assert downsampling(vae) == 2


def test_posterior_of_a_variational_autoencoder():
    vae, x = autoencoder_kl(), pictures()
    draws = [
        encode(vae, x, posterior="sample", generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], encode(vae, x))


def test_tiles_of_large_images(vae):
    factor = downsampling(vae)
    size = 8 * factor * 4
    small, large = pictures(size, 1), pictures(2 * size, 1)
    latents = encode(vae, large)
    plain = encode(vae, small), decode(vae, encode(vae, small)), decode(vae, latents)
    enable_tiling(vae, size)
    try:
        assert torch.equal(encode(vae, small), plain[0])
        assert torch.equal(decode(vae, plain[0]), plain[1])
        assert encode(vae, large).shape == latents.shape
        tiled = decode(vae, latents)
    finally:
        vae.disable_tiling()
    assert tiled.shape == plain[2].shape
    # Attention over the whole image and edges differ; the picture is the same.
    difference = (tiled - plain[2]).square().mean().sqrt()
    assert 0 < difference < 0.5 * plain[2].std()


def test_tile_sizes(vae):
    factor = downsampling(vae)
    for size in (-8, 0, 8 * factor + 1):
        with pytest.raises(ValueError, match=rf"size must be a multiple of {8 * factor} .* {size}"):
            enable_tiling(vae, size)
    enable_tiling(vae)
    tile = getattr(vae, "tile_sample_min_size", None) or vae.tile_sample_min_height
    vae.disable_tiling()
    assert tile == 1024


def test_refuses_what_does_not_fit(vae):
    with pytest.raises(ValueError, match=rf"multiples of {downsampling(vae)} .*, got \[2, 3, 15, "):
        encode(vae, pictures(15))
    channels = vae.config.latent_channels
    with pytest.raises(ValueError, match=rf"shape \[B, {channels}, H, W\] .*, got \[1, 3, 4, 4\]"):
        decode(vae, torch.zeros(1, 3, 4, 4))


def test_no_such_autoencoder(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    with pytest.raises(ValueError, match=r"^vae must be a folder or hub id of diffusers") as caught:
        load_autoencoder(str(tmp_path))
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"pip install 'transition-models\[t2i\]'"):
        load_autoencoder(str(tmp_path))
