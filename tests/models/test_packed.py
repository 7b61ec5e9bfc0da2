"""Images of different sizes in one sequence: each comes out as if it were alone."""

import dataclasses

import pytest
import torch
from networks import KINDS, LABELS, network

from golden_files import relative_error
from tim import ops
from tim.models import TiM, TiMConfig
from tim.models.packing import Layout

EACH_KIND = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
#: In tokens: one image, equal ones, very different and odd ones, in no order.
GRIDS = {
    "one": [(3, 5)],
    "equal": [(2, 3), (2, 3)],
    "mixed": [(3, 5), (1, 1), (9, 14), (5, 3), (1, 7), (3, 5)],
}
EACH_GRIDS = pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS)


def packed(config: TiMConfig, grids: list, dtype: torch.dtype = torch.float64, seed: int = 1):
    """x, t, r, y and the tangents of x; the times differ from image to image."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    p, count = config.patch_size, len(grids)
    x, v = (
        [draw(config.in_channels, p * rows, p * columns) for rows, columns in grids]
        for _ in range(2)
    )
    wide = torch.promote_types(dtype, torch.float32)
    t = torch.linspace(0.9, 0.3, count, dtype=torch.float64).to(wide)
    r = t * torch.linspace(0.1, 0.8, count, dtype=torch.float64).to(wide)
    if config.num_classes is None:
        return x, t, r, draw(count, 5, config.cap_feat_dim), v
    return x, t, r, torch.arange(count) % (config.num_classes + 1), v


def jvp(model: TiM, x, t, r, y, v) -> tuple:
    return torch.func.jvp(lambda x, t: model(x, t, r, y), (x, t), (v, torch.ones_like(t)))


def alone(model: TiM, x, t, r, y, v) -> tuple[list, list]:
    """F and dF of each image in a batch of its own."""
    results = [
        jvp(model, x[i][None], t[i : i + 1], r[i : i + 1], y[i : i + 1], v[i][None])
        for i in range(len(x))
    ]
    return [F[0] for F, _ in results], [dF[0] for _, dF in results]


def flat(images) -> torch.Tensor:
    return torch.cat([image.double().flatten() for image in images])


@EACH_KIND
@EACH_GRIDS
@pytest.mark.parametrize("rope", ["spatial", "released"])
def test_equals_each_image_alone(config, grids, rope):
    """Values and tangents, exactly but for the order of sums."""
    model = network(dataclasses.replace(config, rope_grid=rope), torch.float64)
    x, t, r, y, v = packed(config, grids)
    expected, expected_tangents = alone(model, x, t, r, y, v)
    F, dF = jvp(model, x, t, r, y, v)
    assert [image.shape for image in F] == [image.shape for image in x]
    assert relative_error(flat(F), flat(expected)) < 1e-13
    assert flat(expected_tangents).norm() > 0.1 * flat(expected).norm()
    assert relative_error(flat(dF), flat(expected_tangents)) < 1e-13
    assert relative_error(flat(model(x, t, r, y)), flat(expected)) < 1e-13


@EACH_KIND
def test_kernels_are_as_accurate_as_the_references(config):
    inputs = packed(config, GRIDS["mixed"], torch.float32)
    model, wide = network(config), [
        i if torch.is_tensor(i) and not i.is_floating_point() else
        ([v.double() for v in i] if isinstance(i, list) else i.double())
        for i in inputs
    ]  # fmt: skip
    with ops.reference_only():
        exact = jvp(network(config).double(), *wide)
        allowed = [flat(part) for part in jvp(model, *inputs)]
    found = [flat(part) for part in jvp(model, *inputs)]
    for name, limit, mine, plain, truth in zip(
        ("F", "dF"), (2, 3), found, allowed, map(flat, exact), strict=True
    ):
        error, floor = relative_error(mine, truth), 4 * torch.finfo(torch.float32).eps
        assert error <= limit * relative_error(plain, truth) + floor, name


@EACH_KIND
@pytest.mark.parametrize("moving", [0, 1, 4, 6])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_tangents_of_the_last_images_and_gradients(config, moving, checkpointing):
    model = network(config, torch.float64)
    x, t, r, y, v = packed(config, GRIDS["mixed"])
    first = len(x) - moving
    weights = [torch.randn_like(image) for image in x]

    def gradients(F: list, h: list) -> list[torch.Tensor]:
        loss = sum((image * w).sum() for image, w in zip(F, weights, strict=True))
        loss = loss + sum(features.square().sum() for features in h)
        return torch.autograd.grad(loss, list(model.parameters()))

    singles = [
        model(x[i][None], t[i : i + 1], r[i : i + 1], y[i : i + 1], return_features=True)
        for i in range(len(x))
    ]
    expected = gradients([F[0] for F, _ in singles], [h[0] for _, h in singles])
    derivatives = alone(model, x, t, r, y, v)[1][first:]

    model.gradient_checkpointing = checkpointing
    tangents = (v[first:], torch.ones(moving, dtype=t.dtype))
    F, h, dF = model(x, t, r, y, return_features=True, tangents=tangents)
    assert [image.shape[0] for image in h] == [rows * columns for rows, columns in GRIDS["mixed"]]
    assert len(dF) == moving
    if moving:
        assert relative_error(flat(dF), flat(derivatives)) < 1e-13
    assert not any(image.requires_grad for image in dF)
    for name, mine, single in zip(
        dict(model.named_parameters()), gradients(F, h), expected, strict=True
    ):
        # The bias of unrotated keys has none: softmax does not see it.
        assert single.abs().max() > 1e-12 or "cross_attn.k_norm.bias" in name, name
        assert (mine - single).norm() < 1e-12 * max(1, single.norm()), name


@EACH_KIND
def test_gradients_reach_each_image(config):
    model = network(config, torch.float64)
    x, t, r, y, _ = packed(config, GRIDS["mixed"])
    for image in x:
        image.requires_grad_()
    for i, image in enumerate(model(x, t, r, y)):
        found = torch.autograd.grad(image.square().sum(), x, retain_graph=True)
        single = model(x[i][None], t[i : i + 1], r[i : i + 1], y[i : i + 1])
        (expected,) = torch.autograd.grad(single.square().sum(), x[i])
        torch.testing.assert_close(found[i], expected)
        # Nothing leaks from one image to another.
        assert all(g.abs().max() == 0 for j, g in enumerate(found) if j != i)


@pytest.mark.parametrize("scaling", ["none", "linear", "ntk-aware", "ntk-by-parts", "yarn"])
@pytest.mark.parametrize("decouple", [False, True])
def test_positions_are_scaled_for_each_image_by_its_own_size(scaling, decouple):
    config = dataclasses.replace(
        LABELS, rope_scaling=scaling, rope_decouple=decouple, rope_train_size=3
    )
    model = network(config, torch.float64)
    inputs = packed(config, GRIDS["mixed"])
    expected = alone(model, *inputs)
    for mine, single in zip(jvp(model, *inputs), expected, strict=True):
        assert relative_error(flat(mine), flat(single)) < 1e-13


def test_without_norms_of_queries_or_an_interval_in_attention():
    config = dataclasses.replace(LABELS, qk_norm=False, distance_aware=False)
    model = network(config, torch.float64)
    inputs = packed(config, GRIDS["mixed"])
    for mine, single in zip(jvp(model, *inputs), alone(model, *inputs), strict=True):
        assert relative_error(flat(mine), flat(single)) < 1e-13


def test_bfloat16_under_autocast():
    model = network(LABELS)
    inputs = packed(LABELS, GRIDS["mixed"], torch.float32)
    exact = jvp(model, *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        low, single = jvp(model, *inputs), alone(model, *inputs)
    for mine, other, truth in zip(low, single, exact, strict=True):
        assert all(image.dtype == torch.bfloat16 for image in mine)
        error = relative_error(flat(mine), flat(truth))
        assert 0 < error <= 2 * relative_error(flat(other), flat(truth))


def test_compiled():
    model = network(LABELS)
    x, t, r, y, _ = packed(LABELS, GRIDS["mixed"], torch.float32)
    compiled = torch.compile(model, backend="aot_eager")
    try:
        torch.testing.assert_close(flat(compiled(x, t, r, y)), flat(model(x, t, r, y)))
    finally:
        # Packed batches break the graph, after which dynamo leaves the frames alone for good.
        torch._dynamo.reset()


def test_layout_sorts_by_length_with_moving_images_last():
    layout = Layout(((3, 5), (1, 1), (9, 14), (5, 3), (1, 7), (3, 5)), moving=3)
    assert layout.order == (1, 0, 2, 4, 3, 5)
    assert [run.length for run in layout.runs] == [1, 15, 126, 7, 15]
    assert [part.lengths for part in layout.parts] == [(1, 15, 126), (7, 15, 15)]
    assert layout.parts[1].offsets(torch.device("cpu"))[0].tolist() == [0, 7, 22, 37]


def test_mistakes():
    model = network(LABELS)
    x, t, r, y, v = packed(LABELS, GRIDS["mixed"], torch.float32)
    one = torch.ones(2)
    for change, message in (
        ({"x": []}, "x must hold at least one image, got an empty sequence"),
        ({"x": [x[0][None]]}, r"x\[0\] must have shape \[4, H, W\], got \[1, 4, 6, 10\]"),
        ({"x": [*x[:5], x[5][:, :, :9]]}, r"x\[5\] must have H and W .* got 6 x 9"),
        ({"t": one}, r"t must have shape \[B\] = \[6\], got \[2\]"),
        ({"tangents": (v[:2], one)}, r"tangents must have shapes .* got \[\[4, 6, 10\]"),
        ({"tangents": (v[-2:], t)}, r"tangents must have shapes"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**{"x": x, "t": t, "r": r, "y": y, **change})
    with pytest.raises(TypeError, match=r"x\[1\] must be a tensor"):
        model([x[0], None], t, r, y)
