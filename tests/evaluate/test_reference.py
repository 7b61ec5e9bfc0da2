import numpy as np
import pytest
import torch

from latent_data import image_folder, picture
from tim.data.digits import digits
from tim.evaluate.reference import DatasetImages, open_reference

SIZE = (8, 6)


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (7, 4, 5, 3), dtype=np.uint8)


def images_of(reference, size=3) -> torch.Tensor:
    parts = list(reference.images.batches(size))
    assert all(part.dtype == torch.uint8 and len(part) <= size for part in parts)
    found = torch.cat(parts)
    assert len(found) == len(reference.images)
    return found


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_of_an_archive(save, pixels, tmp_path):
    save(tmp_path / "r.npz", arr_0=pixels)
    reference = open_reference(tmp_path / "r.npz", SIZE, None)
    assert reference.mean is None
    expected = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    assert images_of(reference).equal(expected)
    fewer = open_reference(tmp_path / "r.npz", SIZE, 3)
    assert images_of(fewer).equal(expected[[0, 2, 4]])
    assert fewer.identity != reference.identity


def test_moments_with_and_without_images(pixels, tmp_path):
    mean, covariance = np.arange(2.0), np.eye(2)
    np.savez(tmp_path / "m.npz", mu=mean, sigma=covariance)
    reference = open_reference(tmp_path / "m.npz", SIZE, None)
    assert reference.images is None
    np.testing.assert_array_equal(reference.mean, mean)
    np.testing.assert_array_equal(reference.covariance, covariance)
    np.savez(tmp_path / "b.npz", mu=mean, sigma=covariance, arr_0=pixels, mu_s=mean)
    assert len(open_reference(tmp_path / "b.npz", SIZE, None).images) == 7


def test_folder_is_cropped_to_the_size_of_the_samples(tmp_path):
    folder = image_folder(tmp_path / "f")
    (folder / "dogs" / "broken.png").unlink()
    assert images_of(open_reference(folder, SIZE, None)).shape == (3, 3, *SIZE)
    assert len(open_reference(folder, SIZE, 2).images) == 2
    picture(9, *SIZE).save(tmp_path / "one.png")
    (tmp_path / "g").mkdir()
    (tmp_path / "one.png").rename(tmp_path / "g" / "one.png")
    same = images_of(open_reference(tmp_path / "g", SIZE, None))[0].permute(1, 2, 0)
    np.testing.assert_array_equal(same, np.asarray(picture(9, *SIZE)))


def test_images_of_a_data_set():
    images = DatasetImages(digits("test"), 10, ("digits",))
    found = torch.cat(list(images.batches(4)))
    assert found.shape == (10, 1, 8, 8) and found.max() == 255


def test_bad_references(tmp_path, pixels):
    def told(match, error=ValueError):
        return pytest.raises(error, match=match)

    with told("reference: .*absent does not exist", FileNotFoundError):
        open_reference(tmp_path / "absent", SIZE, None)
    (tmp_path / "x.txt").write_text("x")
    with told("reference must be an .npz file or a folder of images"):
        open_reference(tmp_path / "x.txt", SIZE, None)
    (tmp_path / "x.npz").write_text("x")
    with told("cannot be read as an .npz file: File is not a zip file"):
        open_reference(tmp_path / "x.npz", SIZE, None)
    np.savez(tmp_path / "k.npz", mean=np.zeros(2), cov=np.eye(2))
    with told("must hold mu and sigma, or images arr_0, got mean, cov"):
        open_reference(tmp_path / "k.npz", SIZE, None)
    np.savez(tmp_path / "k.npz", mu=np.zeros(2))
    with told("holds mu and no sigma"):
        open_reference(tmp_path / "k.npz", SIZE, None)
    np.savez(tmp_path / "k.npz", mu=np.zeros(2), sigma=np.eye(3))
    with told(r"mu and sigma must have shapes \[D\] and \[D, D\], got \[2\] and \[3, 3\]"):
        open_reference(tmp_path / "k.npz", SIZE, None)
    np.savez(tmp_path / "k.npz", mu=np.array([0, np.nan]), sigma=np.eye(2))
    with told("mu or sigma hold values that are not finite"):
        open_reference(tmp_path / "k.npz", SIZE, None)
    np.savez(tmp_path / "k.npz", arr_0=pixels.astype(np.float32))
    with told(r"arr_0 must be uint8 \[N, H, W, 3\], got float32 \[7, 4, 5, 3\]"):
        open_reference(tmp_path / "k.npz", SIZE, None)
    (tmp_path / "empty").mkdir()
    with told("holds no images"):
        open_reference(tmp_path / "empty", SIZE, None)
    broken = open_reference(image_folder(tmp_path / "f"), SIZE, None)
    with told(r"reference: .*broken.png cannot be read"):
        list(broken.images.batches(8))
