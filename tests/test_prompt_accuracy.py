"""Whether a classifier says that prompts are obeyed: `tim obeyed`."""

import dataclasses
import json
import sys
from unittest import mock

import huggingface_hub
import pytest
import torch

pytest.importorskip("transformers")
from small_encoders import gemma, saved, tokenizer
from tim import presets, prompt_accuracy
from tim.cli import run
from tim.config import RunConfig
from tim.data.captioned_sets import NUMBERS, write_digits
from tim.data.digits import digits
from tim.text import TextEncoder
from tim.trainer import Trainer

WORDS = " ".join([*NUMBERS, *map(str, range(10)), "a handwritten the digit picture of number"])


@pytest.fixture(scope="module", autouse=True)
def classifiers():
    """Each classifier is trained once: it takes longer than everything else here."""
    train, found = prompt_accuracy.train_classifier, {}

    def once(x, y, classes, *, seed):
        key = (x.double().sum().item(), y.sum().item(), tuple(x.shape), classes, seed)
        if key not in found:
            found[key] = train(x, y, classes, seed=seed)
        return found[key]

    with mock.patch.object(prompt_accuracy, "train_classifier", once):
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps from prompts to digits."""
    folder = tmp_path_factory.mktemp("obeyed")
    write_digits(folder / "digits")
    encoder = saved(folder / "encoder", gemma(), tokenizer(WORDS))
    config = presets.get("digits-text")
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, cap_feat_dim=16, hidden_size=32, depth=2),
        data=dataclasses.replace(
            config.data, path=str(folder / "digits"), text_encoder=str(encoder)
        ),
        train=dataclasses.replace(
            config.train, steps=2, sample_every=0, tensorboard=False, device="cpu"
        ),
    )
    Trainer(config, folder / "run").train()
    return folder / "run"


def test_of_untrained_samples_it_is_near_chance(trained, capsys):
    assert run(["obeyed", str(trained), "--steps", "1,2", "--samples", "200"]) == 0
    out = capsys.readouterr().out
    found = json.loads((trained / "prompt-accuracy.json").read_text())
    assert found["step"] == 2 and found["samples"] == 200 and found["steps"] == [1, 2]
    assert found["classifier_accuracy"] > 0.95 and 0.1 <= found["chance"] < 0.12
    assert max(found["trained"] + found["held_out"]) < 0.4
    assert f"{found['trained'][0]:.1%}" in out and "chance: 10" in out


def test_it_sees_what_was_drawn(trained, monkeypatch):
    """Real digits of the number that the prompt names, and digits that are always a four."""
    real = digits("test")

    def named(prompt):
        word = next(w for w in prompt.split() if w in NUMBERS or w.isdigit())
        return NUMBERS.index(word) if word in NUMBERS else int(word)

    def number(prompts):
        return torch.stack([torch.nonzero(real.labels == named(p))[0, 0] for p in prompts])

    monkeypatch.setattr(
        prompt_accuracy, "_sampled",
        lambda model, config, text, prompts, *rest: real.images[number(prompts)],
    )  # fmt: skip
    obeyed = prompt_accuracy.prompt_accuracy(trained, steps=[1], samples=300)
    assert min(obeyed.trained + obeyed.held_out) > 0.85
    monkeypatch.setattr(
        prompt_accuracy, "_sampled",
        lambda model, config, text, prompts, *rest: real.images[number(["a 4"] * len(prompts))],
    )  # fmt: skip
    deaf = prompt_accuracy.prompt_accuracy(trained, steps=[1], samples=300)
    assert max(deaf.trained + deaf.held_out) < 0.2
    assert deaf.classifier_accuracy == obeyed.classifier_accuracy


def test_mistakes_are_told(trained, tmp_path):
    for options, message in (
        ({"steps": []}, "steps must be positive"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        (
            {"held_out": "none.jsonl"},
            r"captions must be .* a \.jsonl file, got .*none",
        ),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            prompt_accuracy.prompt_accuracy(trained, **options)
    config = RunConfig.load(trained / "config.yaml")
    with pytest.raises(FileNotFoundError, match="has no checkpoint yet"):
        config.save(tmp_path / "config.yaml")
        prompt_accuracy.prompt_accuracy(tmp_path)
    with pytest.raises(ValueError, match="must be of a text model on a folder"):
        presets.get("digits").save(tmp_path / "config.yaml")
        prompt_accuracy.prompt_accuracy(tmp_path)


def test_an_encoder_inside_a_package(tmp_path, monkeypatch):
    """Its weights are found without its code being run."""
    package = tmp_path / "tiny_sentence_encoder"
    saved(package / "model", gemma(), tokenizer())
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    text = TextEncoder.load("tiny-sentence-encoder")
    assert torch.equal(text(["a cat"]), TextEncoder.load(str(package / "model"))(["a cat"]))
    assert "tiny_sentence_encoder" not in sys.modules
    # The hub would be asked, several times, for what no package has.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"of transformers, got no-such-p.*install --no-deps no-su"
    ):
        TextEncoder.load("no-such-package-of-weights")
