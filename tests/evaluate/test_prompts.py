import json

import pytest

from tim.evaluate.prompts import read_prompts


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "a cat\n\n  two dogs \n"),
        ("a.json", json.dumps(["a cat", {"prompt": "two dogs"}])),
        ("a.json", json.dumps({"x": {"category": "art", "prompt": "a cat"}, "y": "two dogs"})),
        ("a.jsonl", '{"caption": "a cat"}\n\n{"captions": ["two dogs", "2"]}\n'),
    ],
)
def test_prompts(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    assert read_prompts(tmp_path / name) == ["a cat", "two dogs"]


def test_bad_files(tmp_path):
    def told(name, text, match, error=ValueError):
        if text is not None:
            (tmp_path / name).write_bytes(text)
        with pytest.raises(error, match=match):
            read_prompts(tmp_path / name)

    told("absent.txt", None, "prompts: .* does not exist", FileNotFoundError)
    told("a.csv", b"x", r"prompts must be a .txt, .json or .jsonl file")
    told("a.txt", b"\n \n", "holds no prompts")
    told("a.txt", b"\xff\xfe", "is not a text file")
    told("a.json", b"{", "cannot be read as json")
    told("a.json", b"3", "neither a list nor a mapping")
    told("a.jsonl", b'"a"\n{"x": 1}\n', r"a.jsonl:2 must be a text or have an entry prompt")
