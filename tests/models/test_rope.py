import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from golden_files import golden, relative_error
from tim.models.rope import rope_tables
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
