import dataclasses
import math

import pytest
import torch
from networks import KINDS, arguments, network
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from golden_files import golden, relative_error
from tim.models.rope import SCALINGS, frequencies, rope_tables
from tim.models.tables import cached


def coordinates(height: int, width: int, grid: str) -> list[tuple[int, int]]:
    """Read back from the angles: with head_dim 4 the one frequency of each half is 1."""
    cos, sin = rope_tables(height, width, 4, grid, dtype=torch.float64)
    angles = torch.atan2(sin, cos).round().int()
    assert torch.equal(angles[:, 0], angles[:, 1])
    assert torch.equal(angles[:, 2], angles[:, 3])
    return [tuple(pair) for pair in angles[:, ::2].tolist()]


def test_spatial_is_column_and_row():
    assert coordinates(2, 3, "spatial") == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]


def test_released_enumerates_the_transposed_grid():
    assert coordinates(2, 3, "released") == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]


def test_grids_agree_on_squares():
    assert coordinates(3, 3, "spatial") == coordinates(3, 3, "released")


@pytest.mark.parametrize(("name", "grid"), [("c2i_model", (4, 4)), ("t2i_model", (4, 6))])
def test_matches_the_published_tables(name, grid):
    tensors, _ = golden(name)
    cos, sin = rope_tables(*grid, tensors["rope_cos"].shape[1], "released")
    assert cos.dtype == torch.float32
    assert relative_error(cos, tensors["rope_cos"]) < 1e-6
    assert relative_error(sin, tensors["rope_sin"]) < 1e-6


def test_tables_outlive_the_transform_and_the_mode_that_made_them():
    grid = (5, 7, 8)
    torch.func.jvp(lambda x: x * rope_tables(*grid)[0].sum(), (torch.ones(()),), (torch.ones(()),))
    with torch.inference_mode():
        other = rope_tables(7, 5, 8)[0]
    first = rope_tables(*grid)[0]
    assert first.data_ptr()  # a tensor of a transform that has ended has no storage
    assert first is rope_tables(*grid)[0]
    for table in (first, other):
        weight = torch.ones_like(table, requires_grad=True)
        (weight * table).sum().backward()
        assert torch.equal(weight.grad, table)


def test_is_part_of_the_graph_under_compile():
    compiled = torch.compile(
        lambda x: x + rope_tables(3, 4, 8)[0], backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(torch.zeros(12, 8)), rope_tables(3, 4, 8)[0])


def test_fake_tensors_stay_out_of_the_cache():
    """Memory estimators run networks on fake tensors, before or after a real pass."""
    with FakeTensorMode():
        fake = rope_tables(3, 11, 8)[0]
    real = rope_tables(3, 11, 8)[0]
    with FakeTensorMode():
        again = rope_tables(3, 11, 8)[0]
    assert isinstance(fake, FakeTensor)
    assert isinstance(again, FakeTensor)
    assert not isinstance(real, FakeTensor)


def test_meta_device():
    cos, sin = rope_tables(3, 4, 8, device="meta")
    assert cos.shape == sin.shape == (12, 8)
    assert cos.is_meta


def test_cache_keeps_devices_and_dtypes_apart():
    def build(device, dtype):
        return torch.ones(2, device=device, dtype=dtype)

    cpu = torch.device("cpu")
    assert cached(build, cpu, torch.float64).dtype == torch.float64
    assert cached(build, cpu, torch.float32).dtype == torch.float32
    assert cached(build, torch.device("meta"), torch.float32).is_meta


def plain(head_dim: int) -> torch.Tensor:
    k = torch.arange(head_dim // 4, dtype=torch.float64)
    return 10000.0 ** (-k / (head_dim // 4))


def test_scaling_leaves_grids_up_to_the_trained_size_alone():
    for scaling in SCALINGS:
        for grid in ("spatial", "released"):
            ours = rope_tables(12, 16, 72, grid, scaling=scaling, train_size=16)
            for table, expected in zip(ours, rope_tables(12, 16, 72, grid), strict=True):
                assert torch.equal(table, expected)


def test_linear_scaling_is_interpolation_of_positions():
    cos, sin = rope_tables(8, 8, 16, scaling="linear", train_size=4, dtype=torch.float64)
    small = rope_tables(4, 4, 16, dtype=torch.float64)
    # Every other token of the large grid lies where one of the small grid lay.
    for table, expected in zip((cos, sin), small, strict=True):
        torch.testing.assert_close(table.view(8, 8, 16)[::2, ::2].reshape(16, 16), expected)


def test_ntk_aware_keeps_the_highest_and_divides_the_lowest_frequency():
    for scale in (1.5, 4.0):
        found = frequencies(72, "ntk-aware", scale, 16)
        assert found[0] == 1
        torch.testing.assert_close(found[-1], plain(72)[-1] / scale)
        ratio = found / plain(72)
        assert (ratio[1:] < ratio[:-1]).all()


@pytest.mark.parametrize("train_size", [16, 32, 64, 4096])
@pytest.mark.parametrize("scaling", ["ntk-by-parts", "yarn"])
def test_by_parts_goes_from_plain_to_interpolated(scaling, train_size):
    """As it is where the training length holds many turns, divided by s where it holds none."""
    scale, base = 4.0, plain(128)
    found = frequencies(128, scaling, scale, train_size)
    turns = train_size * base / (2 * torch.pi)
    many, few = (16, 0.75) if scaling == "ntk-by-parts" else (32, 1)
    ratio = found / base
    # A place is rounded outwards to a whole frequency, so the neighbours are within the ramp.
    step = base[0] / base[1]
    assert torch.allclose(ratio[turns > many * step], torch.ones(()).double())
    torch.testing.assert_close(
        ratio[turns < few / step],
        torch.full((int((turns < few / step).sum()),), 1 / scale).double(),
    )
    assert (ratio[1:] <= ratio[:-1] + 1e-12).all()
    assert (turns < few / step).any()


def published_frequencies(scaling: str, dim: int, scale: float, length: int) -> torch.Tensor:
    """The public formulas, term by term, for `dim` channels of an axis."""
    exponents = torch.arange(0, dim, 2).double() / dim
    base, by_scale = 10000.0**-exponents, 10000.0**-exponents / scale
    changed = (10000.0 * scale ** (dim / (dim - 2))) ** -exponents

    def mask(low_turns: float, high_turns: float) -> torch.Tensor:
        low, high = (
            dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(10000))
            for turns in (low_turns, high_turns)
        )
        low, high = max(math.floor(low), 0), min(math.ceil(high), dim - 1)
        high = high + 0.001 if high == low else high
        return 1 - ((torch.arange(dim // 2).double() - low) / (high - low)).clamp(0, 1)

    if scaling == "yarn":
        m = mask(32, 1)
        return by_scale * (1 - m) + base * m
    m = mask(1.25, 0.75)
    mixed = by_scale * (1 - m) + changed * m
    m = mask(16, 2)
    return mixed * (1 - m) + base * m


@pytest.mark.parametrize("scaling", ["ntk-by-parts", "yarn"])
@pytest.mark.parametrize(("dim", "length"), [(36, 16), (36, 32), (64, 32), (64, 100)])
def test_by_parts_is_the_published_formula(scaling, dim, length):
    for scale in (1.25, 2.0, 8.0):
        expected = published_frequencies(scaling, dim, scale, length)
        torch.testing.assert_close(frequencies(2 * dim, scaling, scale, length), expected)


def test_yarn_scales_the_tables():
    cos, sin = rope_tables(8, 32, 72, scaling="yarn", train_size=16, dtype=torch.float64)
    magnitude = 1 + 0.1 * math.log(2)
    torch.testing.assert_close(cos**2 + sin**2, torch.full_like(cos, magnitude**2))
    other = rope_tables(8, 32, 72, scaling="linear", train_size=16, dtype=torch.float64)[0]
    assert other[0].max() == 1


@pytest.mark.parametrize("grid", ["spatial", "released"])
def test_axes_of_their_own(grid):
    """Decoupled, the short axis of a 16 x 64 grid is not scaled and the long one is, by 4."""
    options = {"scaling": "linear", "train_size": 16, "dtype": torch.float64}
    cos, _ = rope_tables(16, 64, 16, grid, decouple=True, **options)
    plain_cos, _ = rope_tables(16, 64, 16, grid, dtype=torch.float64)
    both, _ = rope_tables(16, 64, 16, grid, **options)
    # The first half of the head turns with the coordinate that counts to `width` (spatial) or
    # `height` (released).
    long, short = (slice(0, 8), slice(8, 16)) if grid == "spatial" else (slice(8, 16), slice(0, 8))
    assert torch.equal(cos[:, short], plain_cos[:, short])
    assert torch.equal(cos[:, long], both[:, long])
    assert not torch.equal(both[:, short], plain_cos[:, short])


def test_scaling_needs_the_trained_size():
    with pytest.raises(ValueError, match="scaling 'yarn' needs train_size, got None"):
        rope_tables(8, 8, 16, scaling="yarn")


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_network_on_larger_grids_than_trained(config):
    """All variants change the network beyond its training size only, and keep exact tangents."""
    x, t, r, y = arguments(config, torch.float64)
    large = torch.cat([x, x.flip(2)], dim=2).repeat(1, 1, 2, 3)
    outputs = {}
    for scaling in SCALINGS:
        model = network(dataclasses.replace(config, rope_scaling=scaling), torch.float64)
        outputs[scaling] = model(large, t, r, y)
        assert torch.equal(model(x, t, r, y), network(config, torch.float64)(x, t, r, y))
        v = torch.ones_like(large)
        _, derivative = torch.func.jvp(
            lambda x, t, m=model: m(x, t, r, y), (large, t), (v, torch.ones_like(t))
        )
        e = 1e-5
        ahead, behind = (model(large + s * v, t + s, r, y) for s in (e, -e))
        torch.testing.assert_close(derivative, (ahead - behind) / (2 * e), rtol=1e-5, atol=1e-7)
    names = list(outputs)
    for i, one in enumerate(names):
        for other in names[:i]:
            assert not torch.allclose(outputs[one], outputs[other], rtol=1e-6), (one, other)
