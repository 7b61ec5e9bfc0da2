"""Captioned sets of pictures made from packages: `tim dataset`."""

import json

import numpy as np
import pytest
from PIL import Image

from tim.cli import run
from tim.config import DataConfig
from tim.data import build_dataset
from tim.data.digits import digits
from tim.data.sources import open_source

ENTRIES = [
    {
        "name": "RED APPLE", "image": "a.png", "category": "Food & Drink",
        "subcategory": "food-fruit", "short_names": ["apple", "apple2"],
    },
    {
        "name": "WAVING HAND SIGN", "image": "b.png", "category": "People & Body",
        "subcategory": "hand-fingers-open", "short_names": ["wave"],
        "skin_variations": {"1F3FB": {"image": "c.png"}, "1F3FB-1F3FF": {"image": "gone.png"}},
    },
]  # fmt: skip


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "package" / "img" / "google" / "64"
    folder.mkdir(parents=True)
    for i, name in enumerate("abc"):
        Image.new("RGBA", (64, 64), (80 * i, 0, 0, 255)).save(folder / f"{name}.png")
    (tmp_path / "package" / "emoji.json").write_text(json.dumps(ENTRIES))
    return tmp_path / "package"


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_digits_keep_their_pixels_and_say_their_number(tmp_path, capsys):
    assert run(["dataset", "digits", "--out", str(tmp_path / "set")]) == 0
    assert "1500 pictures" in capsys.readouterr().out
    data = DataConfig(
        kind="folder", path=str(tmp_path / "set"), image_size=8, channels=1,
        captions="captions.jsonl",
    )  # fmt: skip
    dataset, real = build_dataset(data), digits()
    assert len(dataset) == 1500 and dataset.captioned
    chosen = np.arange(0, 1500, 97)
    batch = dataset.batch(chosen, np.random.default_rng(0))
    # Grey levels 0 .. 16 written as 0 .. 255.
    assert (batch.x - real.images[chosen]).abs().max() < 1 / 127
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    for text, label in zip(batch.y, real.labels[chosen].tolist(), strict=True):
        assert text.endswith((words[label], str(label))), (text, label)
    held_out = records(tmp_path / "set" / "held-out.jsonl")
    assert len(held_out) == 297
    trained = {c for r in records(tmp_path / "set" / "captions.jsonl") for c in r["captions"]}
    assert not trained & {c for r in held_out for c in r["captions"]}
    listed = open_source(tmp_path / "set", "held-out.jsonl")
    assert [s.class_number() for s in listed.samples] == digits("test").labels.tolist()


def test_emoji_have_their_names(package, tmp_path):
    out = tmp_path / "all"
    assert (
        run(["dataset", "emoji", "--package", str(package), "--out", str(out), "--variants"]) == 0
    )
    found = {r["file_name"]: r["captions"] for r in records(out / "captions.jsonl")}
    # The variant whose picture is not there is left out.
    assert found == {
        "images/a.png": ["red apple", "apple", "red apple, fruit food"],
        "images/b.png": [
            "waving hand sign", "wave", "waving hand sign, hand fingers open",
        ],
        "images/c.png": [
            "waving hand sign, light skin tone", "wave, light skin tone",
            "waving hand sign, hand fingers open, light skin tone",
        ],
    }  # fmt: skip
    with Image.open(out / "images" / "c.png") as picture:
        assert picture.getpixel((0, 0)) == (160, 0, 0, 255)
    flags = [
        "--package",
        str(package),
        "--categories",
        "Food & Drink",
        "--out",
        str(tmp_path / "f"),
    ]
    assert run(["dataset", "emoji", *flags]) == 0
    assert [r["label"] for r in records(tmp_path / "f" / "captions.jsonl")] == [0]


def test_mistakes_are_one_line_and_nothing_is_written(package, tmp_path, capsys):
    out = tmp_path / "out"
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep")
    (tmp_path / "empty").mkdir()
    for flags, message in (
        (["emoji", "--out", out], "package is missing: where is"),
        (["emoji", "--out", out, "--package", tmp_path / "empty"], "must be an unpacked emoji-"),
        (["emoji", "--out", out, "--package", package, "--categories", "Cars"],
         "categories must be of Food & Drink, People & Body; got Cars"),
        (["digits", "--out", out, "--variants"], "are for emoji, not for digits"),
        (["digits", "--out", full], "out must be a new or empty folder"),
        (["digits", "--out", full / "mine.txt"], "out must be a folder, got the file"),
    ):  # fmt: skip
        assert run(["dataset", *map(str, flags)]) == 2
        told = capsys.readouterr().err
        assert message in told and told.count("\n") == 1
    (package / "emoji.json").write_text('[{"category": "x"}]')
    assert run(["dataset", "emoji", "--out", str(out), "--package", str(package)]) == 2
    assert "emoji.json is damaged: KeyError 'name'" in capsys.readouterr().err
    assert not out.exists()
