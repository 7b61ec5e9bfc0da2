import math

import pytest

from tim.data.buckets import buckets, nearest


@pytest.mark.parametrize(
    ("side", "multiple", "aspect"), [(1024, 32, 2.0), (256, 16, 4.0), (64, 8, 1.5)]
)
def test_sizes_of_one_area(side, multiple, aspect):
    sizes = buckets(side, multiple, aspect)
    assert (side, side) in sizes
    assert all((w, h) in sizes for h, w in sizes)
    for height, width in sizes:
        assert height % multiple == width % multiple == 0
        assert max(height / width, width / height) <= aspect
        # One more column of tokens would be too much.
        short, long = sorted((height, width))
        assert short * long <= side * side < short * (long + multiple)


def test_square_alone():
    assert buckets(256, 8, 1.0) == [(256, 256)]


def test_the_nearest_has_the_closest_aspect_ratio():
    sizes = buckets(1024, 32, 2.0)
    assert nearest(sizes, 500, 500) == (1024, 1024)
    for height, width in ((768, 1024), (1080, 1920), (3000, 2000), (10, 400)):
        chosen = nearest(sizes, height, width)
        distance = {s: abs(math.log(s[0] / s[1]) - math.log(height / width)) for s in sizes}
        assert distance[chosen] == min(distance.values())
    assert nearest(sizes, 10, 400)[1] > nearest(sizes, 10, 400)[0]


def test_mistakes():
    with pytest.raises(ValueError, match="side must be a multiple of 32, got 1000"):
        buckets(1000, 32)
    with pytest.raises(ValueError, match=r"max_aspect must be at least 1, got 0\.5"):
        buckets(64, 8, 0.5)
