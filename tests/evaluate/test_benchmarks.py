import json

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import tim
from small_encoders import autoencoder_dc, autoencoder_kl, gemma, saved, tokenizer
from tim.evaluate import benchmarks
from tim.evaluate.benchmarks import sample_benchmark
from tim.evaluate.generator import GeneratorSettings, noise_of
from tim.models import TiMConfig
from tim.pipeline import TiMPipeline

SIZES = {"hidden_size": 32, "depth": 1, "num_heads": 2, "encoder_depth": 1, "lora_hidden_size": 8}
TEXT = TiMConfig(
    input_size=4, patch_size=1, in_channels=8, num_classes=None, cap_feat_dim=16, **SIZES
)
PROMPTS = ["a red cat", "two dogs, \u201cgreen\u201d", "grass"]
OPTIONS = {"device": "cpu", "batch_size": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    network = tim.TiM(TEXT)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    parts = {"text_encoder": gemma().get_decoder(), "tokenizer": tokenizer()}
    path = tmp_path_factory.mktemp("text")
    TiMPipeline(network, vae=autoencoder_dc(), **parts).save_pretrained(path)
    return path


@pytest.fixture
def geneval(tmp_path):
    file = tmp_path / "evaluation_metadata.jsonl"
    records = [{"tag": "colors", "prompt": p, "include": [{"class": "cat"}]} for p in PROMPTS]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_geneval_layout(model, geneval, tmp_path):
    (folder,) = sample_benchmark(model, "geneval", geneval, tmp_path / "out", steps=(2,), **OPTIONS)
    assert folder == tmp_path / "out" / "steps-2"
    samples = [f"samples/{k:04d}.png" for k in range(4)]
    assert files(folder) == [f"{i:05d}/{n}" for i in range(3) for n in ["metadata.jsonl", *samples]]
    # As the scorer reads it: one JSON value.
    about = json.loads((folder / "00001" / "metadata.jsonl").read_text())
    assert about == json.loads(geneval.read_text().splitlines()[1])
    # Pictures are those of the prompts and of their own noise.
    pipe = TiMPipeline.from_pretrained(model)
    noise = noise_of(0, range(4, 8), (8, 4, 4))
    expected = pipe([PROMPTS[1]] * 4, num_inference_steps=2, latents=noise, output_type="np").images
    for k, picture in enumerate(expected):
        written = pixels(folder / "00001" / "samples" / f"{k:04d}.png").astype(int)
        assert np.abs(written - picture * 255).max() <= 1


def test_a_killed_call_goes_on(model, geneval, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    sample_benchmark(model, "geneval", geneval, whole, steps=(1,), images=2, **OPTIONS)
    real, saved_items = benchmarks.GenEval.save, []

    def save(self, folder, item, pictures):
        if len(saved_items) == 1:
            raise RuntimeError("killed")
        saved_items.append(item.prompt)
        real(self, folder, item, pictures)

    monkeypatch.setattr(benchmarks.GenEval, "save", save)
    part = tmp_path / "part"
    with pytest.raises(RuntimeError, match="killed"):
        sample_benchmark(model, "geneval", geneval, part, steps=(1,), images=2, **OPTIONS)
    leftover = part / "steps-1" / "00000" / ".0000.png.tmp-1"
    leftover.write_bytes(b"half")
    monkeypatch.setattr(benchmarks.GenEval, "save", real)
    first = part / "steps-1" / "00000" / "samples" / "0000.png"
    time = first.stat().st_mtime_ns
    sample_benchmark(model, "geneval", geneval, part, steps=(1,), images=2, **OPTIONS)
    assert files(part) == files(whole) and first.stat().st_mtime_ns == time
    with pytest.raises(ValueError, match="pictures of another seed: give another folder"):
        sample_benchmark(model, "geneval", geneval, part, images=2, seed=1, **OPTIONS)


def test_dpg_bench_layout(model, tmp_path):
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    for name, prompt in zip(("COCOval_1", "7"), PROMPTS, strict=False):
        (prompts / f"{name}.txt").write_text(prompt + "\n")
    options = {**OPTIONS, "steps": (1, 2)}
    one, two = sample_benchmark(model, "dpg-bench", prompts, tmp_path / "out", **options)
    # The scorer takes every file in the folder for a grid.
    assert files(one) == files(two) == ["7.png", "COCOval_1.png"]
    grid = pixels(one / "7.png")
    assert grid.shape == (32, 32, 3)
    side = 16
    crops = [grid[y : y + side, x : x + side] for y in (0, side) for x in (0, side)]
    pipe = TiMPipeline.from_pretrained(model)
    expected = pipe(
        [PROMPTS[1]] * 4, num_inference_steps=1, latents=noise_of(0, range(4), (8, 4, 4)),
        output_type="np",
    ).images  # fmt: skip
    for crop, picture in zip(crops, expected, strict=True):
        assert np.abs(crop.astype(int) - picture * 255).max() <= 1


def test_mjhq_layout(model, tmp_path):
    file = tmp_path / "meta_data.json"
    about = zip("aba", PROMPTS, strict=True)
    records = {f"12{i}": {"category": c, "prompt": p} for i, (c, p) in enumerate(about)}
    file.write_text(json.dumps(records))
    (folder,) = sample_benchmark(model, "mjhq", file, tmp_path / "out", steps=(1,), **OPTIONS)
    assert files(folder) == ["a/120.jpg", "a/122.jpg", "b/121.jpg"]
    with Image.open(folder / "b" / "121.jpg") as image:
        assert image.format == "JPEG" and image.size == (16, 16)


def test_bad_input(model, geneval, tmp_path):
    def told(match, benchmark="geneval", prompts=geneval, error=ValueError, source=model, **rest):
        with pytest.raises(error, match=match):
            sample_benchmark(source, benchmark, prompts, tmp_path / "x", **{**OPTIONS, **rest})
        assert not (tmp_path / "x").exists()

    told("benchmark must be one of geneval, dpg-bench, mjhq, got 'coco'", "coco")
    told("steps must be positive", steps=())
    told("images must be at least 1, got 0", images=0)
    told("images must be 1 for mjhq, got 2", "mjhq", images=2)
    told("images must be from 1 to 4 for dpg-bench", "dpg-bench", tmp_path, images=5)
    told("holds no prompts", "dpg-bench", tmp_path)
    told("prompts must be the folder", "dpg-bench", error=FileNotFoundError)
    told("prompts must be a .json file", "mjhq", error=FileNotFoundError)
    told("prompts must be a .jsonl file", prompts=tmp_path / "no.jsonl", error=FileNotFoundError)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"tag": "x"}\n')
    told("bad.jsonl:1 must have a prompt", prompts=bad)
    bad = tmp_path / "bad.json"
    bad.write_text('{"..": {"category": "x", "prompt": "y"}}')
    told("category and name must be names of files", "mjhq", bad)
    bad.write_text('{"1": {"prompt": "y"}}')
    told("must have a category and a prompt", "mjhq", bad)
    wide = GeneratorSettings(size=(24, 16))
    told("needs square pictures, got size 24x16", "dpg-bench", _prompts(tmp_path), settings=wide)
    told("size: width must be a multiple of 4", settings=GeneratorSettings(size=(18, 16)))
    labels = TiMConfig(input_size=8, patch_size=2, in_channels=4, num_classes=10, **SIZES)
    pipe = TiMPipeline(tim.TiM(labels), vae=autoencoder_kl())
    told("needs a text model", source=saved(tmp_path / "labels", pipe))


def _prompts(tmp_path):
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "1.txt").write_text("a cat")
    return folder
