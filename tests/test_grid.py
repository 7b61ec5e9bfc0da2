"""Sample grids."""

import numpy as np
import pytest
import torch
from PIL import Image

from tim.grid import GAP, image_grid, pixels_of, save_picture


def test_rows_columns_and_enlargement() -> None:
    rows = [torch.full((3, 8, 8, 1), level, dtype=torch.uint8) for level in (200, 100)]
    pixels = pixels_of(image_grid(rows, [1, 32]))
    assert pixels.shape[0] == GAP + 2 * (48 + GAP) and pixels.shape[2] == 3
    left = pixels.shape[1] - 3 * (48 + GAP)
    for i, level in enumerate((200, 100)):
        for j in range(3):
            top, at = GAP + i * (48 + GAP), left + j * (48 + GAP)
            assert (pixels[top : top + 48, at : at + 48] == level).all()
    # The step counts are written before the rows.
    assert (pixels[:, :left] == 255).any()


def test_colours_and_their_places() -> None:
    picture = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 64, 80, 3), np.uint8))
    pixels = pixels_of(image_grid([picture], ["x"]))
    left = pixels.shape[1] - 80 - GAP
    assert pixels[GAP : GAP + 64, left : left + 80].equal(picture[0])


def test_a_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch) -> None:
    picture = Image.new("RGB", (20, 10), (1, 2, 3))
    out = tmp_path / "new" / "a.PNG"
    save_picture(picture, out)
    with Image.open(out) as found:
        assert found.format == "PNG" and found.tobytes() == picture.tobytes()
    before = out.read_bytes()

    def crash(self: object, file: object, *_: object) -> None:
        file.write_bytes(before[:20])
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", crash)
    with pytest.raises(KeyboardInterrupt):
        save_picture(picture, out)
    assert out.read_bytes() == before and list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("name", ["a.foo", "a", "a.svg"])
def test_names_that_no_picture_has(tmp_path, name) -> None:
    with pytest.raises(ValueError, match=rf"must end in .png, .jpg or the like, got .*{name}$"):
        save_picture(Image.new("L", (2, 2)), tmp_path / "new" / name)
    assert list(tmp_path.iterdir()) == []
