"""Small captioned sets of pictures, made from packages: folders that `data.captions` reads.

captions.jsonl        a record for each picture: file_name, captions and label
held-out.jsonl        pictures that are not to be trained on, in words that are not (digits)
images/...            the pictures
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from tim.data.dataset import to_uint8

LISTING = "captions.jsonl"
HELD_OUT = "held-out.jsonl"
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
#: What a digit is called, {} being its number as a word or a figure: in training, and held out.
DIGIT_CAPTIONS = ("a handwritten {}", "the digit {}", "a picture of the number {}")
HELD_OUT_CAPTIONS = ("someone wrote {} by hand", "scan of a {}", "draw me the numeral {}")
SKIN = {"1F3FB": "light", "1F3FC": "medium light", "1F3FD": "medium", "1F3FE": "medium dark",
        "1F3FF": "dark"}  # fmt: skip
_KINDS_FIRST = ("animal", "emotion", "face", "food", "person", "place", "plant", "transport")


def write_digits(folder: Path) -> int:
    """scikit-learn's scanned digits as grey pictures of 8 x 8 pixels with captions in words.

    Returns the number of pictures to train on.
    """
    from tim.data.digits import digits

    counts = []
    for split, listing, texts in (
        ("train", LISTING, DIGIT_CAPTIONS),
        ("test", HELD_OUT, HELD_OUT_CAPTIONS),
    ):
        data = digits(split)
        (folder / "images" / split).mkdir(parents=True, exist_ok=True)
        records = []
        for i, (pixels, label) in enumerate(
            zip(to_uint8(data.images), data.labels.tolist(), strict=True)
        ):
            name = f"images/{split}/{i:04d}.png"
            Image.fromarray(pixels[..., 0].numpy()).save(folder / name)
            words = (NUMBERS[label], str(label))
            captions = [text.format(word) for text in texts for word in words]
            records.append({"file_name": name, "captions": captions, "label": label})
        _write_listing(folder / listing, records)
        counts.append(len(records))
    return counts[0]


def write_emoji(
    folder: Path, package: Path, categories: Sequence[str] = (), variants: bool = False
) -> int:
    """The pictures of an unpacked npm package emoji-datasource-* with their names as captions.

    Args:
        package: what npm installed or packed, with emoji.json and img/NAME/64.
        categories: only these ("Food & Drink", ...); all when empty.
        variants: also the five skin tones.

    Returns the number of pictures.

    Raises FileNotFoundError or ValueError for a folder that is no such package, or a category that
    is not in it.
    """
    found = sorted(package.glob("img/*/64"))
    if not (package / "emoji.json").is_file() or len(found) != 1:
        raise FileNotFoundError(
            f"{package} must be an unpacked emoji-datasource-* of npm (emoji.json, img/NAME/64)"
        )
    try:
        table = json.loads((package / "emoji.json").read_text())
        known = sorted({entry["category"] for entry in table})
        records = [
            record
            for entry in table
            if not categories or entry["category"] in categories
            for record in _emoji_records(entry, known.index(entry["category"]), variants)
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{package / 'emoji.json'} is damaged: {type(error).__name__} {error}"
        ) from None
    if missing := [name for name in categories if name not in known]:
        raise ValueError(f"categories must be of {', '.join(known)}; got {', '.join(missing)}")
    records = [record for record in records if (found[0] / record["file_name"]).is_file()]
    if not records:
        raise ValueError(f"{found[0]} holds none of the pictures of {package / 'emoji.json'}")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for record in records:
        name = record["file_name"]
        shutil.copyfile(found[0] / name, folder / "images" / name)
        record["file_name"] = f"images/{name}"
    _write_listing(folder / LISTING, records)
    return len(records)


def _emoji_records(entry: dict[str, Any], label: int, variants: bool) -> Iterable[dict[str, Any]]:
    name = entry["name"].lower().replace("-", " ")
    kind, *rest = entry["subcategory"].split("-")
    # "marine animal", "smiling face", but "cat face".
    kind = " ".join([*rest, kind] if kind in _KINDS_FIRST else [kind, *rest])
    short = [text.replace("_", " ").replace("-", " ") for text in entry["short_names"]]
    plain = [text for text in short if text.replace(" ", "").isalpha()]
    captions = list(dict.fromkeys([name, *plain, f"{name}, {kind}"]))
    yield {"file_name": entry["image"], "captions": captions, "label": label}
    for tones, variant in entry.get("skin_variations", {}).items() if variants else ():
        skin = " and ".join(dict.fromkeys(SKIN[tone] for tone in tones.split("-")))
        yield {
            "file_name": variant["image"],
            "captions": [f"{text}, {skin} skin tone" for text in captions],
            "label": label,
        }


def _write_listing(path: Path, records: list[dict[str, Any]]) -> None:
    """Last of all, so that a folder with a listing is whole."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in records))
    os.replace(temporary, path)
