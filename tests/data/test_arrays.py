"""Array files: .npz and idx pairs, and what is wrong with them."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from tim.data import to_float
from tim.data.arrays import arrays, read_idx

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (12, 6, 5), dtype=np.uint8)
LABELS = RNG.integers(0, 4, 12).astype(np.uint8)
LABELS[0] = 3


def everything(dataset):
    return dataset.batch(np.arange(len(dataset)), np.random.default_rng(0))


def idx_bytes(array: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim])
    return head + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx_pair(folder: Path, prefix: str = "train", ending: str = "", dot: str = "-") -> Path:
    pack = gzip.compress if ending else bytes
    images = folder / f"{prefix}-images{dot}idx3-ubyte{ending}"
    images.write_bytes(pack(idx_bytes(GREY)))
    (folder / f"{prefix}-labels{dot}idx1-ubyte{ending}").write_bytes(pack(idx_bytes(LABELS)))
    return images


@pytest.mark.parametrize("names", [("x", "y"), ("images", "labels"), ("x_train", "y_train")])
def test_npz_of_grey_images(tmp_path, names) -> None:
    np.savez(tmp_path / "a.npz", **dict(zip(names, (GREY, LABELS), strict=True)))
    dataset = arrays(tmp_path / "a.npz")
    assert dataset.shape == (1, 6, 5) and dataset.num_classes == 4 and len(dataset) == 12
    x, y, _ = everything(dataset)
    assert x.equal(to_float(dataset.images)) and x[:, 0].numpy().shape == GREY.shape
    np.testing.assert_array_equal(dataset.images[:, 0], GREY)
    np.testing.assert_array_equal(y, LABELS)


@pytest.mark.parametrize("axis", [1, 3])
def test_npz_of_colour_images_channels_first_or_last(tmp_path, axis) -> None:
    colour = np.stack([GREY, GREY // 2, GREY // 3], axis)
    np.savez(tmp_path / "a.npz", x=colour, y=LABELS)
    dataset = arrays(tmp_path / "a.npz")
    assert dataset.shape == (3, 6, 5)
    np.testing.assert_array_equal(dataset.images[:, 2], GREY // 3)


def test_npz_of_latents_is_taken_as_it_is_and_labels_are_optional(tmp_path) -> None:
    latents = RNG.standard_normal((5, 4, 8, 8))
    np.savez(tmp_path / "a.npz", images=latents)
    dataset = arrays(tmp_path / "a.npz")
    x, y, _ = everything(dataset)
    np.testing.assert_array_equal(x, latents.astype(np.float32))
    assert dataset.num_classes == 1 and y.tolist() == [0] * 5


def test_npz_test_split(tmp_path) -> None:
    np.savez(tmp_path / "a.npz", x_train=GREY, y_train=LABELS, x_test=GREY[:3], y_test=LABELS[:3])
    assert len(arrays(tmp_path / "a.npz", "test")) == 3
    np.savez(tmp_path / "b.npz", x=GREY, y=LABELS)
    with pytest.raises(ValueError, match=r"must hold an array x_test or images_test .*, got x, y"):
        arrays(tmp_path / "b.npz", "test")


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("dot", ["-", "."])
def test_idx_pair_in_a_folder_or_by_its_images(tmp_path, ending, dot) -> None:
    images = write_idx_pair(tmp_path, "train", ending, dot)
    write_idx_pair(tmp_path, "t10k", ending, dot)
    for path, split in (
        (tmp_path, "train"),
        (images, "train"),
        (tmp_path, "test"),
        (images, "test"),
    ):
        dataset = arrays(path, split)
        np.testing.assert_array_equal(dataset.images[:, 0], GREY)
        np.testing.assert_array_equal(dataset.labels, LABELS)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ({"x": GREY, "y": LABELS[:5]}, ValueError, r"labels must have shape \[12\].*got \[5\]"),
        ({"x": GREY, "y": LABELS / 2}, TypeError, "labels must be whole numbers, got float64"),
        ({"x": GREY, "y": LABELS.astype(int) - 9}, ValueError, "must not be negative"),
        ({"x": GREY.astype(int)}, TypeError, "images must be uint8 or floats, got int64"),
        ({"x": GREY[0]}, ValueError, r"images must have shape .* got \[6, 5\]"),
        ({"x": GREY[:0]}, ValueError, "there are no images"),
        ({"x": GREY / 255}, ValueError, r"float images must have shape \[N, C, H, W\]"),
        ({"x": np.full((2, 1, 4, 4), np.nan)}, ValueError, "not finite"),
        (
            {"pictures": GREY},
            ValueError,
            "must hold an array x or images or x_train .*got pictures",
        ),
    ],
)
def test_wrong_npz(tmp_path, content, error, message) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, **content)
    with pytest.raises(error, match=message) as caught:
        arrays(path)
    assert str(path) in str(caught.value)


def test_damaged_npz(tmp_path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x=GREY, y=LABELS)
    whole = path.read_bytes()
    for damaged in (b"", b"no zip file", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"cannot be read as an .npz file"):
            arrays(path)


def test_npz_with_pickles_is_refused(tmp_path) -> None:
    np.savez(tmp_path / "a.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match=r"cannot be read as an .npz file"):
        arrays(tmp_path / "a.npz")


def test_wrong_idx_files(tmp_path) -> None:
    images = write_idx_pair(tmp_path)
    whole = images.read_bytes()
    for damaged, message in (
        (whole[:-1], r"must have 376 bytes for shape \[12, 6, 5\], got 375"),
        (whole + b"\0", "must have 376 bytes .* got 377"),
        (whole[:9], "must start with the idx header"),
        (b"", "got an empty file"),
        (b"\x89PNG" + whole, "must start with the idx header .* got 89 50 4e 47"),
        (b"\0\0\x0d\x03" + whole[4:], "unsigned bytes, 3 dimensions"),
    ):
        images.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            arrays(tmp_path)
    zipped = tmp_path / "x.gz"
    zipped.write_bytes(gzip.compress(whole)[:-9])
    with pytest.raises(ValueError, match="cannot be unpacked"):
        read_idx(zipped, 3)


def test_missing_parts_are_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="must hold train-images-idx3-ubyte"):
        arrays(tmp_path)
    images = write_idx_pair(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="must hold train-labels-idx1-ubyte"):
        arrays(images)
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"must be an .npz file, a folder with an idx pair"):
        arrays(tmp_path / "a.txt")
