"""Tar files of the WebDataset layout: the index of them, and damaged ones."""

import tarfile

import numpy as np
import pytest

from latent_data import tar_file
from tim.data import tars
from tim.data.images import ImageDataset
from tim.data.sources import open_source


def folder_of_tars(path, counts=(3, 0, 5, 2)):
    path.mkdir()
    start = 0
    for number, count in enumerate(counts):
        tar_file(path / f"{number}.tar", start, count)
        start += count
    return path


def test_samples_are_read_by_number_from_uneven_and_empty_shards(tmp_path):
    source = open_source(folder_of_tars(tmp_path / "data"), "txt")
    assert len(source) == 10 and source.shards == [3, 0, 5, 2] and not source.damaged
    expected = [f"{n}.tar/{i:04d}" for i, n in enumerate([0] * 3 + [2] * 5 + [3] * 2)]
    assert [sample.name for sample in source.samples] == expected
    assert [s.texts()[1] for s in source.samples[2:9:3]] == ["number 2", "number 5", "number 8"]
    assert [s.class_number() for s in source.samples[-3:]] == [1, 0, 1]
    with pytest.raises(IndexError, match="there are 10 samples, got index 10"):
        source.samples[10]


def test_the_index_is_kept_and_renewed_for_files_that_changed(tmp_path, monkeypatch):
    data = folder_of_tars(tmp_path / "data")
    scanned = []
    scan = tars.scan
    monkeypatch.setattr(tars, "scan", lambda tar: scanned.append(tar.name) or scan(tar))
    first = open_source(data)
    assert sorted(scanned) == ["0.tar", "1.tar", "2.tar", "3.tar"]
    scanned.clear()
    again = open_source(data)
    assert not scanned and again.samples[:] == first.samples[:]
    tar_file(data / "2.tar", 3, 6)
    (data / tars.FOLDER / "3.tar.npz").write_bytes(b"PK damaged")
    assert open_source(data).shards == [3, 0, 6, 2] and sorted(scanned) == ["2.tar", "3.tar"]
    assert sorted(p.name for p in (data / tars.FOLDER).iterdir()) == [
        f"{n}.tar.npz" for n in range(4)
    ]


def test_the_index_of_a_read_only_folder_is_kept_elsewhere(tmp_path, monkeypatch):
    data = folder_of_tars(tmp_path / "data", (2,))
    (data / tars.FOLDER).write_text("in the way of the folder, as lacking rights would be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert len(open_source(data)) == 2
    (kept,) = (tmp_path / "cache").rglob("*.npz")
    assert kept.name == "0.tar.npz"
    monkeypatch.setattr(tars, "scan", None)
    assert len(open_source(data)) == 2


def header_of(path, number):
    with tarfile.open(path) as archive:
        return archive.getmembers()[number].offset


def test_damaged_files_are_used_up_to_the_damage_and_listed(tmp_path):
    data = folder_of_tars(tmp_path / "data", (3, 3, 3, 3))
    # Cut off within the image of the last sample; a header overwritten; an image overwritten;
    # nothing at all.
    at = header_of(data / "0.tar", 6)
    (data / "0.tar").write_bytes((data / "0.tar").read_bytes()[: at + 512 + 40])
    for name, at in (("1.tar", header_of(data / "1.tar", 3)), ("2.tar", None)):
        at = header_of(data / name, 0) + 512 if at is None else at
        with (data / name).open("r+b") as file:
            file.seek(at)
            file.write(b"\xff" * 64)
    (data / "3.tar").write_bytes(b"")
    dataset = ImageDataset(data, 8)
    assert dataset.shards == [2, 1, 3, 0]
    dataset.batch(np.arange(len(dataset)), np.random.default_rng(0))
    skipped = dataset.skipped
    assert list(skipped) == ["0.tar", "1.tar", "3.tar", "2.tar/0006"]
    assert skipped["0.tar"].endswith("unexpected end of data")
    assert skipped["1.tar"] == f"damaged at byte {header_of(data / '1.tar', 2) + 1024}: " + (
        "there is no header"
    )
    assert skipped["3.tar"] == "the file is empty"
    assert skipped["2.tar/0006"].startswith("UnidentifiedImageError")
