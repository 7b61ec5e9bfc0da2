import copy
import dataclasses

import pytest
import torch
from networks import CAPTIONS, KINDS, LABELS, arguments, network

from golden_files import golden, relative_error
from tim import ops
from tim.models import ARCHITECTURES, TiM, TiMConfig
from tim.models.blocks import add_update
from tim.models.embeddings import time_features

GOLDEN = ["c2i_model", "t2i_model"]


def published(name: str) -> tuple[TiM, dict[str, torch.Tensor]]:
    tensors, config = golden(name)
    model = TiM(TiMConfig.from_released(config["model"]))
    prefix = "model."
    model.load_state_dict(
        {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    )
    return model, tensors


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("kernels", [True, False])
def test_published_outputs_in_float32(name, kernels):
    model, g = published(name)
    if kernels:
        out, features = model(g["x"], g["t"], g["r"], g["y"], return_features=True)
    else:
        with ops.reference_only():
            out, features = model(g["x"], g["t"], g["r"], g["y"], return_features=True)
    assert relative_error(out, g["out"]) < 1e-5
    assert relative_error(features, g["h_proj"]) < 1e-5


@pytest.mark.parametrize("name", GOLDEN)
def test_published_outputs_in_float64(name):
    model, g = published(name)
    y = g["y"].double() if g["y"].is_floating_point() else g["y"]
    inputs = (g["x"].double(), g["t"].double(), g["r"].double(), y)
    out, features = model.double()(*inputs, return_features=True)
    assert relative_error(out, g["out64"]) < 5e-7
    assert relative_error(features, g["h_proj64"]) < 5e-7


@pytest.mark.parametrize("name", GOLDEN)
def test_published_intermediate_values(name):
    model, g = published(name)
    seen = {}

    def record(key):
        def hook(module, inputs, output):
            seen[key] = add_update(*output) if key.startswith("block_out") else output

        return hook

    embedders = {
        "x_embed": model.x_embedder,
        "t_embed": model.t_embedder,
        "delta_embed": model.delta_embedder,
        "y_embed": model.y_embedder,
    }
    for key, module in embedders.items():
        module.register_forward_hook(record(key))
    for number, block in enumerate(model.blocks):
        block.register_forward_hook(record(f"block_out.{number}"))
    model(g["x"], g["t"], g["r"], g["y"])
    for key, value in seen.items():
        assert relative_error(value, g[key]) < 1e-5, key
    assert len(seen) == 4 + len(model.blocks)


@pytest.mark.parametrize("name", GOLDEN)
def test_features_do_not_change_the_output(name):
    model, g = published(name)
    inputs = g["x"], g["t"], g["r"], g["y"]
    assert torch.equal(model(*inputs), model(*inputs, return_features=True)[0])


# Exact sizes follow from the released shapes; without the projection head, which is not used to
# sample, they are the published 664M and 865M. (For B/4 131M is published, 128.8M is what it has.)
@pytest.mark.parametrize(
    ("name", "with_head", "without_head"),
    [
        ("tim-b4-256", 136_173_120, 128_828_224),
        ("tim-xl2-256", 672_259_344, 664_128_016),
        ("tim-xl1-512", 672_296_224, 664_164_896),
        ("tim-t2i-xl1", 873_109_408, 864_978_080),
    ],
)
def test_parameter_counts_of_the_paper(name, with_head, without_head):
    def count(config):
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in TiM(config).parameters())

    config = ARCHITECTURES[name]
    assert count(config) == with_head
    assert count(dataclasses.replace(config, z_dim=None)) == without_head


def test_forward_on_the_meta_device():
    with torch.device("meta"):
        model = TiM(LABELS)
        x, t, y = torch.empty(2, 4, 8, 12), torch.empty(2), torch.empty(2, dtype=torch.int64)
    out, features = model(x, t, t, y, return_features=True)
    assert out.is_meta
    assert out.shape == x.shape
    assert features.shape == (2, 24, 20)


def test_starts_at_zero_with_identity_blocks():
    model = TiM(LABELS)
    x, t, r, y = arguments(LABELS)
    tokens = []
    model.x_embedder.register_forward_hook(lambda *call: tokens.append(call[2]))
    model.blocks[-1].register_forward_hook(lambda *call: tokens.append(add_update(*call[2])))
    assert torch.equal(model(x, t, r, y), torch.zeros_like(x))
    assert torch.equal(*tokens)


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_initialisation_is_alive_and_seeded(config):
    torch.manual_seed(3)
    model = TiM(config)
    torch.manual_seed(3)
    again = TiM(config)
    for (name, one), two in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two), name
        silent = "adaLN_modulation.fc2" in name or name.startswith("final_layer.linear")
        assert (one == 0).all() == (silent or name.endswith("bias")), name


CONDITIONS = {
    "t-r": lambda T, D, t, r: D(t - r),
    "r": lambda T, D, t, r: D(r),
    "t,r": lambda T, D, t, r: T(t) + D(r),
    "t,t-r": lambda T, D, t, r: T(t) + D(t - r),
    "r,t-r": lambda T, D, t, r: T(r) + D(t - r),
    "t,r,t-r": lambda T, D, t, r: T(t) + T(r) + D(t - r),
}


@pytest.mark.parametrize("own_embedder", [True, False])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_time_conditions(condition, own_embedder):
    config = dataclasses.replace(LABELS, new_condition=condition, use_new_embed=own_embedder)
    model = network(config, torch.float64)
    assert hasattr(model, "delta_embedder") == own_embedder
    x, t, r, y = arguments(config, torch.float64)

    def embed(embedder):
        return lambda time: embedder.mlp(time_features(time))

    T = embed(model.t_embedder)
    D = embed(model.delta_embedder) if own_embedder else T
    second = CONDITIONS[condition](T, D, t, r)
    seen = []
    model.blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[2:4]))
    model(x, t, r, y)
    ((total, interval),) = seen
    torch.testing.assert_close(interval[:, 0], second)
    torch.testing.assert_close(total[:, 0], T(t) + second + model.y_embedder(y))


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_without_interval_aware_attention(config):
    model = network(dataclasses.replace(config, distance_aware=False))
    assert not any("qkv_d" in name for name in model.state_dict())
    full = network(config)
    full.load_state_dict(model.state_dict(), strict=False)
    for block in full.blocks:
        block.attn.qkv_d.weight.data.zero_()
    torch.testing.assert_close(model(*arguments(config)), full(*arguments(config)))


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_without_query_and_key_norm(config):
    model = network(dataclasses.replace(config, qk_norm=False), torch.float64)
    assert not any("_norm" in name for name in model.state_dict())
    x, t, r, y = arguments(config, torch.float64)
    assert relative_error(model(x, t, r, y), network(config, torch.float64)(x, t, r, y)) > 1e-3
    v = torch.ones_like(t)
    step = 1e-5
    _, tangent = torch.func.jvp(lambda t: model(x, t, r, y), (t,), (v,))
    expected = (model(x, t + step, r, y) - model(x, t - step, r, y)) / (2 * step)
    assert relative_error(tangent, expected) < 1e-7


def test_default_width_of_the_modulation():
    block = TiM(dataclasses.replace(LABELS, lora_hidden_size=None)).blocks[0]
    assert block.adaLN_modulation.fc2.weight.shape == (6 * 48, 36)


def test_positions_matter_only_off_the_square():
    released = dataclasses.replace(CAPTIONS, rope_grid="released")
    x, t, r, y = arguments(CAPTIONS)
    spatial, other = network(CAPTIONS), network(released)
    assert relative_error(other(x, t, r, y), spatial(x, t, r, y)) > 1e-3
    square = x[..., :3, :3]
    assert torch.equal(other(square, t, r, y), spatial(square, t, r, y))


def test_samples_do_not_mix():
    model = network(LABELS)
    x, t, r, y = arguments(LABELS)
    whole = model(x, t, r, y)
    for i in range(3):
        part = slice(i, i + 1)
        torch.testing.assert_close(model(x[part], t[part], r[part], y[part]), whole[part])


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("features", [False, True])
def test_gradient_checkpointing_changes_nothing_but_memory(config, features):
    model = network(config)
    inputs = arguments(config)
    gradients, stored = [], []
    for checkpointing in (False, True):
        model.gradient_checkpointing = checkpointing
        model.zero_grad()
        sizes = []

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model(*inputs, return_features=features)
        stored.append(sum(sizes))
        sum(o.square().mean() for o in (out if features else (out,))).backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, two in zip(*gradients, strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            torch.testing.assert_close(one, two)
    assert stored[1] < stored[0] / 2


def test_gradient_checkpointing_steps_aside_without_gradient():
    model = network(LABELS)
    model.gradient_checkpointing = True
    with torch.no_grad():
        out = model(*arguments(LABELS))
    assert not out.requires_grad


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("mode", ["half", "autocast"])
def test_bfloat16(config, mode):
    inputs = arguments(config, torch.bfloat16)
    exact = network(config, torch.float64)(*(i.double() if i.dtype.is_floating_point else i
                                             for i in inputs))  # fmt: skip
    if mode == "half":
        out = network(config).to(torch.bfloat16)(*inputs)
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = network(config)(*inputs)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, exact) < 0.03


def test_latents_and_captions_take_the_dtype_of_the_parameters():
    x, t, r, y = arguments(CAPTIONS)
    model = network(CAPTIONS)
    assert torch.equal(model(x.double(), t, r, y.double()), model(x, t, r, y))


@pytest.mark.parametrize(
    ("config", "checkpointing", "backend"),
    [(LABELS, False, "aot_eager"), (LABELS, True, "eager"), (CAPTIONS, False, "eager")],
    ids=["labels", "checkpointed", "captions"],
)
def test_compiles_to_one_graph(config, checkpointing, backend):
    model = network(dataclasses.replace(config, depth=1, encoder_depth=1))
    model.gradient_checkpointing = checkpointing
    inputs = arguments(config)

    def run(function):
        model.zero_grad()
        out = function(*inputs)
        out.square().sum().backward()
        return out, [p.grad for p in model.parameters() if p.grad is not None]

    compiled = run(torch.compile(model, fullgraph=True, backend=backend))
    torch.testing.assert_close(compiled, run(model))


def test_copies_are_independent_and_the_state_holds_parameters_only():
    model = network(LABELS)
    inputs = arguments(LABELS)
    before = model(*inputs)
    twin = copy.deepcopy(model)
    assert set(twin.state_dict()) == {name for name, _ in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin(*inputs), before)
    assert twin.config == model.config


def test_no_null_label_for_captions():
    with pytest.raises(ValueError, match="text model has no null label"):
        TiM(CAPTIONS).null_condition(2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3, 4, 8)}, ValueError, r"x must have shape \[B, 4, H, W\], got \[3, 4"),
        ({"x": torch.zeros(3, 3, 8, 8)}, ValueError, r"x must have shape \[B, 4, H, W\]"),
        ({"x": torch.zeros(3, 4, 8, 7)}, ValueError, "multiples of patch_size 2, got 8 x 7"),
        ({"x": torch.zeros(3, 4, 0, 8)}, ValueError, "multiples of patch_size 2, got 0 x 8"),
        ({"x": torch.zeros(3, 4, 8, 8).int()}, TypeError, "x must have a floating-point dtype"),
        ({"t": torch.zeros(2)}, ValueError, r"t must have shape \[B\] = \[3\], got \[2\]"),
        ({"r": torch.zeros(3, 1)}, ValueError, r"r must have shape \[B\] = \[3\], got \[3, 1\]"),
        ({"r": torch.zeros(3).long()}, TypeError, "r must have a floating-point dtype"),
        ({"y": torch.zeros(3, 1).long()}, ValueError, r"y must have shape \[B\] = \[3\]"),
        ({"y": torch.zeros(3)}, TypeError, "y must hold int64 or int32 labels, got torch.float32"),
    ],
)
def test_refuses_bad_inputs_in_one_line(change, error, message):
    inputs = dict(zip("xtry", arguments(LABELS), strict=True))
    with pytest.raises(error, match=message) as caught:
        TiM(LABELS)(**{**inputs, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", "xtry")
def test_refuses_what_is_no_tensor(name):
    inputs = dict(zip("xtry", arguments(LABELS), strict=True))
    what = (
        r"x\[0\] must be a tensor, got float"
        if name == "x"
        else f"{name} must be a tensor, got list"
    )
    with pytest.raises(TypeError, match=f"^{what}$"):
        TiM(LABELS)(**{**inputs, name: [0.5] * 3})


@pytest.mark.parametrize("shift", [-1, LABELS.num_classes + 1])
def test_refuses_labels_out_of_range(shift):
    x, t, r, _ = arguments(LABELS)
    with pytest.raises(
        ValueError, match=r"y must hold labels from 0 to \d+ \(the null label\), got"
    ):
        TiM(LABELS)(x, t, r, torch.full((3,), shift))


def test_refuses_bad_captions():
    x, t, r, _ = arguments(CAPTIONS)
    with pytest.raises(ValueError, match=r"y must have shape \[B, M, K\] = \[3, M, 12\], got \[3"):
        TiM(CAPTIONS)(x, t, r, torch.zeros(3, 5, 11))
    with pytest.raises(TypeError, match=r"y must have a floating-point dtype, got torch.int64"):
        TiM(CAPTIONS)(x, t, r, torch.zeros(3, 5, 12).long())


def test_refuses_features_without_projection_head():
    config = dataclasses.replace(LABELS, z_dim=None)
    with pytest.raises(ValueError, match="return_features needs a projection head"):
        TiM(config)(*arguments(config), return_features=True)


def test_refuses_a_mapping_as_config():
    with pytest.raises(TypeError, match="config must be a TiMConfig, got dict"):
        TiM(LABELS.to_dict())
