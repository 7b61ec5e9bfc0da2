"""Folders of images: classes, geometry, all kinds of files, and files that are none."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tim.data.folder import FolderDataset, list_images, load_image

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def paint(path: Path, color=RED, size=(20, 12), mode: str = "RGB", **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **options)
    return path


def shades(folder: Path, count: int) -> None:
    """Images whose grey level tells them apart."""
    for i in range(count):
        paint(folder / f"{i:02}.png", (10 * i,) * 3, (8, 8))


def batch(dataset: FolderDataset, indices: list[int], seed: int = 0):
    return dataset.batch(np.array(indices), np.random.default_rng(seed))


def test_sub_folders_are_classes(tmp_path) -> None:
    for name in ("dog/b.jpg", "cat/deep/a.PNG", "cat/z.webp", "ant/1.bmp"):
        paint(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    paint(tmp_path / "cat" / ".hidden.png")
    dataset = FolderDataset(tmp_path, image_size=4)
    assert dataset.files == ["ant/1.bmp", "cat/deep/a.PNG", "cat/z.webp", "dog/b.jpg"]
    assert dataset.classes == ["ant", "cat", "dog"] and dataset.num_classes == 3
    assert batch(dataset, [3, 0, 2]).y.tolist() == [2, 0, 1]


def test_no_sub_folders_make_one_class(tmp_path) -> None:
    shades(tmp_path, 3)
    dataset = FolderDataset(tmp_path, image_size=4, channels=1)
    x, y, _ = batch(dataset, [0, 2])
    assert x.shape == (2, 1, 4, 4) and y.tolist() == [0, 0] and dataset.num_classes == 1
    assert x[1].unique().tolist() == pytest.approx([20 / 127.5 - 1])


def test_what_is_no_image_folder(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        list_images(tmp_path / "absent")
    with pytest.raises(ValueError, match="holds no images"):
        list_images(tmp_path)
    paint(tmp_path / "a.png")
    paint(tmp_path / "cats" / "b.png")
    with pytest.raises(ValueError, match=r"both in sub-folders and beside them \(a.png\)"):
        list_images(tmp_path)


def test_links_to_a_folder_above_are_not_followed(tmp_path) -> None:
    paint(tmp_path / "all" / "cat" / "a.png")
    paint(tmp_path / "elsewhere" / "b.png")
    (tmp_path / "all" / "cat" / "loop").symlink_to(tmp_path / "all")
    (tmp_path / "all" / "dog").symlink_to(tmp_path / "elsewhere")
    assert list_images(tmp_path / "all")[0] == ["cat/a.png", "dog/b.png"]


def test_centre_square(tmp_path) -> None:
    canvas = np.zeros((10, 30, 3), np.uint8)
    canvas[:, :10], canvas[:, 10:20], canvas[:, 20:] = RED, GREEN, BLUE
    Image.fromarray(canvas).save(tmp_path / "wide.png")
    Image.fromarray(canvas.transpose(1, 0, 2)).save(tmp_path / "tall.png")
    for name in ("wide", "tall"):
        pixels = load_image(tmp_path / f"{name}.png", 10)
        assert (pixels == np.array(GREEN)[:, None, None]).all()


def test_resizing_has_no_aliases(tmp_path) -> None:
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    # Picking every fourth pixel would give black or white, 127 away from the mean.
    assert np.abs(load_image(tmp_path / "stripes.png", 16, 1).astype(int) - 127).max() <= 16


@pytest.mark.parametrize("channels", [1, 3])
def test_modes(tmp_path, channels) -> None:
    level = 100
    sixteen = Image.fromarray(np.full((9, 9), level * 257, np.uint16))
    sixteen.save(tmp_path / "i16.png")
    Image.fromarray(np.full((9, 9), level, np.int32)).save(tmp_path / "i32.tif")
    paint(tmp_path / "grey.png", level, mode="L")
    paint(tmp_path / "grey.jpg", level, mode="L")
    paint(tmp_path / "rgb.webp", (level,) * 3, lossless=True)
    paint(tmp_path / "palette.gif", (level,) * 3)
    paint(tmp_path / "cmyk.jpg", (0, 0, 0, 255 - level), mode="CMYK")
    paint(tmp_path / "opaque.png", (level, level, level, 255), mode="RGBA")
    paint(tmp_path / "la.png", (level, 255), mode="LA")
    for path in sorted(tmp_path.iterdir()):
        pixels = load_image(path, 6, channels)
        assert pixels.shape == (channels, 6, 6) and pixels.dtype == np.uint8
        assert np.abs(pixels.astype(int) - level).max() <= 2, path.name


def test_transparency_is_white(tmp_path) -> None:
    paint(tmp_path / "rgba.png", (0, 0, 0, 0), mode="RGBA")
    palette = Image.new("P", (9, 9), 3)
    palette.putpalette([0] * 768)
    palette.save(tmp_path / "p.png", transparency=3)
    for path in tmp_path.iterdir():
        assert (load_image(path, 4) == 255).all(), path.name


def test_exif_orientation(tmp_path) -> None:
    canvas = np.zeros((32, 32, 3), np.uint8)
    canvas[:, :16], canvas[:, 16:] = RED, BLUE
    exif = Image.Exif()
    exif[0x0112] = 6  # To be shown turned by 90 degrees clockwise: the left half comes up.
    Image.fromarray(canvas).save(tmp_path / "turned.jpg", exif=exif, quality=100, subsampling=0)
    pixels = load_image(tmp_path / "turned.jpg", 16).astype(int)
    assert np.abs(pixels[:, 3, :] - np.array(RED)[:, None]).max() < 12
    assert np.abs(pixels[:, 12, :] - np.array(BLUE)[:, None]).max() < 12


def test_large_pictures_are_welcome(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    paint(tmp_path / "large.png", size=(40, 40))
    dataset = FolderDataset(tmp_path, image_size=4)
    assert batch(dataset, [0]).x[0, 0].unique().tolist() == [1]
    assert dataset.skipped == {}


def damage(folder: Path) -> list[str]:
    """Four files that are no complete images, among the shades 00 .. 09."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name in ("02.png", "03.png"):
        Image.fromarray(noise).save(folder / name)
    whole = (folder / "02.png").read_bytes()
    (folder / "02.png").write_bytes(whole[: len(whole) // 2])
    (folder / "03.png").write_bytes(whole[:60] + bytes(200) + whole[260:])
    (folder / "07.png").write_bytes(b"")
    (folder / "09.png").write_text("<html>404</html>")
    return ["02.png", "03.png", "07.png", "09.png"]


@pytest.mark.parametrize("cache_bytes", [0, 10**6])
def test_unreadable_files_are_named_and_replaced_by_the_next(tmp_path, cache_bytes) -> None:
    shades(tmp_path, 10)
    bad = damage(tmp_path)
    dataset = FolderDataset(tmp_path, image_size=4, channels=1, cache_bytes=cache_bytes)
    assert dataset.skipped == {}
    for _ in range(2):
        levels = ((batch(dataset, list(range(10))).x[:, 0, 0, 0] + 1) * 127.5).round()
        assert levels.tolist() == [0, 10, 40, 40, 40, 50, 60, 80, 80, 0]
    assert list(dataset.skipped) == bad
    assert all(dataset.skipped.values())


def test_nothing_readable(tmp_path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the 1 images in .* can be read"):
        FolderDataset(tmp_path, image_size=4)


def test_cache_is_used_only_where_all_images_fit(tmp_path) -> None:
    shades(tmp_path, 4)
    cached = FolderDataset(tmp_path, image_size=4, cache_bytes=4 * 48)
    plain = FolderDataset(tmp_path, image_size=4, cache_bytes=4 * 48 - 1)
    first = [batch(d, [0, 1, 2, 3]).x for d in (cached, plain)]
    assert all(x.is_contiguous() for x in [*first, batch(cached, [0, 1, 2, 3]).x])
    assert first[0].equal(first[1])
    for path in tmp_path.iterdir():
        path.unlink()
    assert batch(cached, [0, 1, 2, 3]).x.equal(first[0])
    with pytest.raises(ValueError, match="none of the 4"):
        batch(plain, [0])


def test_order_does_not_depend_on_the_number_of_threads(tmp_path) -> None:
    shades(tmp_path, 10)
    damage(tmp_path)
    results = []
    for workers in (1, 4):
        dataset = FolderDataset(tmp_path, image_size=4, flip=0.5, workers=workers, cache_bytes=0)
        results.append(torch.cat([batch(dataset, [9, 3, 5, 0, 7], seed=s).x for s in range(5)]))
    assert results[0].equal(results[1])
