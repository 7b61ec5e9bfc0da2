import numpy as np
import pytest

from tim.evaluate.store import Shards, remove_leftovers, write_samples, write_whole


def test_shards_know_what_is_missing(tmp_path):
    shards = Shards(tmp_path / "a", total=10, size=4)
    values = np.arange(20.0).reshape(10, 2)
    assert len(shards) == 3 and shards.missing() == [0, 1, 2]
    for number in (2, 0):
        rows = shards.rows(number)
        shards.write(number, {"x": values[rows.start : rows.stop]})
    assert Shards(tmp_path / "a", 10, 4).missing() == [1]
    shards.write(1, {"x": values[4:8]})
    np.testing.assert_array_equal(np.concatenate(list(shards.read("x"))), values)
    shards.discard()
    assert not (tmp_path / "a").exists()


def test_a_failed_write_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("old")

    def fail(path):
        path.write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        write_whole(tmp_path / "file", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_leftovers_are_removed(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / ".a.png.tmp-12").write_text("half")
    (tmp_path / "below" / "a.png").write_text("whole")
    remove_leftovers(tmp_path)
    assert [path.name for path in (tmp_path / "below").iterdir()] == ["a.png"]


def test_samples_are_read_as_the_adm_suite_reads_them(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (7, 4, 5, 3), dtype=np.uint8)
    write_samples(tmp_path / "s.npz", pixels.shape, np.split(pixels, [3, 4]))
    with np.load(tmp_path / "s.npz") as archive:
        assert archive.files == ["arr_0"]
        np.testing.assert_array_equal(archive["arr_0"], pixels)


def test_bad_samples(tmp_path):
    pixels = np.zeros((2, 4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="there must be 3 samples, got 2"):
        write_samples(tmp_path / "s.npz", (3, 4, 4, 3), [pixels])
    with pytest.raises(ValueError, match=r"must be uint8 of shape \[N, 4, 4, 3\], got float64"):
        write_samples(tmp_path / "s.npz", (2, 4, 4, 3), [pixels.astype(float)])
    assert list(tmp_path.iterdir()) == []
