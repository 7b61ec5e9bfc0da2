import dataclasses
import json

import pytest
import yaml

from golden_files import golden
from tim.models import ARCHITECTURES, TiMConfig

VALID = {"hidden_size": 48, "num_heads": 2, "depth": 3, "encoder_depth": 2}


@pytest.mark.parametrize("config", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_survives_json_and_yaml(config):
    values = config.to_dict()
    assert TiMConfig.from_dict(json.loads(json.dumps(values))) == config
    assert TiMConfig.from_dict(yaml.safe_load(yaml.safe_dump(values))) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "hidden_size must be a multiple of num_heads 5, got 48"),
        ({"num_heads": 8}, "must be a multiple of 4 .* got 48 / 8 = 6"),
        ({"input_size": 9}, "input_size must be a multiple of patch_size 2, got 9"),
        ({"z_dim": 8, "encoder_depth": 4}, "encoder_depth must be at most depth 3, got 4"),
        ({"new_condition": "t+r"}, "new_condition must be one of 't-r', .*, got 't\\+r'"),
        ({"rope_grid": "square"}, "rope_grid must be one of 'spatial', 'released', got 'square'"),
        ({"class_dropout_prob": 1.0}, r"class_dropout_prob must be in \[0, 1\), got 1.0"),
        ({"num_classes": None}, "exactly one of num_classes and cap_feat_dim .* None and None"),
        ({"cap_feat_dim": 8}, "exactly one of num_classes and cap_feat_dim .* 1000 and 8"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"lora_hidden_size": -1}, "lora_hidden_size must be at least 1, got -1"),
    ],
)
def test_refuses_bad_values_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        TiMConfig(**{**VALID, **changes})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [2.0, True, "2"])
def test_refuses_sizes_that_are_no_integers(value):
    with pytest.raises(TypeError, match=f"depth must be an int, got {type(value).__name__}"):
        TiMConfig(**{**VALID, "depth": value})


def test_encoder_depth_is_free_without_projection_head():
    assert TiMConfig(**{**VALID, "encoder_depth": 99}).z_dim is None


def test_from_dict_lists_all_unknown_settings():
    with pytest.raises(ValueError, match="unknown model settings: breadth, hiden_size"):
        TiMConfig.from_dict({"hiden_size": 4, "breadth": 2})


@pytest.mark.parametrize("name", ["c2i_model", "t2i_model"])
def test_released_parameters(name):
    params = golden(name)[1]["model"]
    config = TiMConfig.from_released(params)
    for key, value in params.items():
        assert getattr(config, key) == value
    assert config.rope_grid == "released"
    assert (config.num_classes is None) == (name == "t2i_model")


def test_absent_released_parameters_take_the_public_defaults():
    config = TiMConfig.from_released({"qk_norm": True})
    assert not config.use_new_embed
    assert not config.distance_aware
    assert (config.z_dim, config.projector_dim, config.lora_hidden_size) == (768, 2048, None)
    assert (config.hidden_size, config.depth, config.num_heads) == (1152, 28, 16)


def test_released_parameters_that_are_no_choice_here():
    plain = TiMConfig.from_released({})
    harmless = {"use_checkpoint": True, "mlp_ratio": 4.0, "swiglu": True}
    assert TiMConfig.from_released(harmless) == plain
    with pytest.raises(ValueError, match=r"mlp_ratio must be 4.0, got 2.0"):
        TiMConfig.from_released({"mlp_ratio": 2.0})
    with pytest.raises(ValueError, match="unknown model settings: attn, window"):
        TiMConfig.from_released({"window": 3, "attn": 1})
    with pytest.raises(TypeError, match="params must be a mapping, got NoneType"):
        TiMConfig.from_released(None)


def test_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TiMConfig().depth = 2
