"""The paper's networks at full size, on the meta device, against the published configurations."""

import pytest
import torch

from tim.models import ARCHITECTURES, TiM, TiMConfig
from tim.models.released import RELEASES, release_of, released_config

#: `network.params` of the public repository's configs/c2i/*.yaml and configs/t2i/*.yaml.
COMMON = {
    "qk_norm": True, "new_condition": "t-r", "use_new_embed": True, "distance_aware": True,
    "z_dim": 768,
}  # fmt: skip
XL = {**COMMON, "depth": 28, "hidden_size": 1152, "num_heads": 16, "encoder_depth": 8,
      "lora_hidden_size": 384}  # fmt: skip
LABELS = {"class_dropout_prob": 0.1, "num_classes": 1000}
PUBLISHED = {
    "tim-b4-256": {
        **COMMON, **LABELS, "input_size": 32, "patch_size": 4, "in_channels": 4, "depth": 12,
        "hidden_size": 768, "num_heads": 12, "encoder_depth": 4, "lora_hidden_size": 256,
    },
    "tim-xl2-256": {**XL, **LABELS, "input_size": 32, "patch_size": 2, "in_channels": 4},
    "tim-xl1-512": {**XL, **LABELS, "input_size": 16, "patch_size": 1, "in_channels": 32},
    "tim-t2i-xl1": {**XL, "input_size": 16, "patch_size": 1, "in_channels": 32,
                    "cap_feat_dim": 1152},
}  # fmt: skip
#: Millions of parameters, without the projection head, stated with the released files.
STATED = {"tim-xl2-256": 664, "tim-xl1-512": 664, "tim-t2i-xl1": 865}


def linear(name: str, inner: int, outer: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outer, inner)} | ({f"{name}.bias": (outer,)} if bias else {})


def swiglu(name: str, inner: int, middle: int, outer: int) -> dict[str, tuple[int, ...]]:
    return {
        **linear(f"{name}.fc1_g", inner, middle),
        **linear(f"{name}.fc1_x", inner, middle),
        **linear(f"{name}.fc2", middle, outer),
    }


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def published_shapes(p: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a released state dict, spelled out from the public module tree."""
    width, head = p["hidden_size"], p["hidden_size"] // p["num_heads"]
    patch = p["patch_size"] ** 2 * p["in_channels"]
    shapes = {"x_embedder.proj.weight": (width, p["in_channels"], p["patch_size"], p["patch_size"])}
    shapes |= {"x_embedder.proj.bias": (width,)}
    for name in ("t_embedder", "delta_embedder"):
        shapes |= linear(f"{name}.mlp.0", 256, width) | linear(f"{name}.mlp.2", width, width)
    text = p.get("cap_feat_dim")
    if text:
        shapes |= norm("y_embedder.norm", text)
        shapes |= swiglu("y_embedder.mlp", text, 4 * width, width)
    else:
        shapes |= {"y_embedder.embedding_table.weight": (p["num_classes"] + 1, width)}
    for i in range(p["depth"]):
        at = f"blocks.{i}"
        shapes |= linear(f"{at}.attn.qkv", width, 3 * width)
        shapes |= linear(f"{at}.attn.qkv_d", width, 3 * width, bias=False)
        shapes |= linear(f"{at}.attn.proj", width, width)
        kinds = ["attn"]
        if text:
            kinds.append("cross_attn")
            shapes |= linear(f"{at}.cross_attn.q", width, width)
            shapes |= linear(f"{at}.cross_attn.kv", width, 2 * width)
            shapes |= linear(f"{at}.cross_attn.proj", width, width)
        for kind in kinds:
            shapes |= norm(f"{at}.{kind}.q_norm", head) | norm(f"{at}.{kind}.k_norm", head)
        shapes |= swiglu(f"{at}.mlp", width, 4 * width * 2 // 3, width)
        chunks = 9 if text else 6
        shapes |= swiglu(f"{at}.adaLN_modulation", width, p["lora_hidden_size"], chunks * width)
    shapes |= linear("projector.0", width, 2048) | linear("projector.2", 2048, 2048)
    shapes |= linear("projector.4", 2048, p["z_dim"])
    shapes |= linear("final_layer.linear", width, patch)
    shapes |= swiglu("final_layer.adaLN_modulation", width, width // 2, 2 * width)
    return shapes


@pytest.mark.parametrize("preset", PUBLISHED)
def test_full_size_networks_are_the_published_ones(preset):
    config = TiMConfig.from_released(PUBLISHED[preset])
    assert config == released_config(preset)
    with torch.device("meta"):
        model = TiM(config)
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert state == published_shapes(PUBLISHED[preset])
    assert set(state) == {name for name, _ in model.named_parameters()}
    count = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("projector"))
    assert round(count / 1e6) == STATED.get(preset, 129)


def test_every_release_is_a_preset():
    from tim import presets

    for release in RELEASES:
        assert release.config == released_config(release.preset)
        assert presets.get(release.preset).model == ARCHITECTURES[release.preset]
        assert (release.text_encoder is None) == (release.config.num_classes is not None)


def test_release_of_what_is_known():
    assert release_of(file="t2i_model.bin").repository == "GoodEnough/TiM-T2I"
    assert release_of(preset="tim-b4-256") is None
    assert release_of(repository="someone/else") is None
