"""Requests of all kinds at once: each gets what it would get alone, in few calls of the network."""

import threading
from dataclasses import replace
from weakref import WeakKeyDictionary

import pytest
import torch

import tim
from models.networks import CAPTIONS, LABELS, network
from rehearsal import Rehearsed
from tim import Request, Sampler, transports
from tim.sampler import sample
from tim.schedule import resolution_shift
from tim.trainer import Trainer
from tiny_runs import config as run_config

OT_FM = transports.get("ot_fm")
#: In float64 nothing but a leak between requests could be seen in float32 results.
WIDE = {"dtype": torch.float64}
REQUESTS = [
    Request(1, seed=1),
    Request(7, seed=2, cfg_scale=2.0),
    Request(3, seed=3, steps=3),
    Request(1, seed=4, size=(4, 6)),
    Request(2, seed=5, cfg_scale=3.5),
    Request(0, seed=6),
    Request(9, seed=7, cfg_scale=2.0, size=(4, 6)),
    Request(4, seed=1),
]


class Counted(Sampler):
    """Remembers the batches that its network was called with."""

    def __init__(self, model, transport=OT_FM, **options):
        super().__init__(model, transport, **options)
        self.batches: list[int] = []
        self.model.register_forward_hook(lambda _, inputs, out: self.batches.append(len(out)))


@pytest.fixture(scope="module")
def labels():
    return network(LABELS)


@pytest.fixture(scope="module")
def text():
    pytest.importorskip("transformers")
    from small_encoders import gemma, tokenizer
    from tim.text import TextEncoder

    encoder = TextEncoder(gemma(hidden=12).get_decoder().double(), tokenizer())
    return network(replace(CAPTIONS, z_dim=None)), encoder


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("stochasticity", [0.0, 0.5])
@pytest.mark.parametrize("max_batch", [2, 16])
def test_a_request_gets_what_it_would_get_alone(labels, max_batch, stochasticity):
    sampler = Sampler(
        labels, OT_FM, max_batch=max_batch, stochasticity=stochasticity, steps=5, **WIDE
    )
    together = sampler(REQUESTS)
    for request, image in zip(REQUESTS, together, strict=True):
        height, width = request.size or (8, 8)
        assert image.shape == (4, height, width) and image.dtype == torch.float32
        same(image, sampler([request])[0])
    for image, again in zip(together, reversed(sampler(REQUESTS[::-1])), strict=True):
        same(image, again)
    # The same seed and another class: the same noise, another picture.
    assert not torch.allclose(together[0], together[-1])


def test_a_request_is_a_call_of_sample(labels):
    sampler = Sampler(labels, OT_FM, cfg_interval=(0.1, 0.9), shift_base=16, max_batch=3)
    for request, image in zip(REQUESTS, sampler(REQUESTS), strict=True):
        height, width = request.size or (8, 8)
        generator = torch.Generator().manual_seed(request.seed)
        expected = sample(
            labels, torch.tensor([request.y]),
            torch.randn(1, 4, height, width, generator=generator), request.steps or 4,
            transport=OT_FM, cfg_scale=request.cfg_scale or 1.0, cfg_interval=(0.1, 0.9),
            null=torch.tensor([10]), schedule="shifted",
            shift=resolution_shift(height * width, 16),
        )  # fmt: skip
        torch.testing.assert_close(image[None], expected, rtol=1e-4, atol=1e-5)


def test_requests_share_calls(labels):
    sampler = Counted(labels, max_batch=4, steps=1, cfg_interval=(0, 2))
    sampler([Request(i % 10, seed=i) for i in range(9)])
    assert sampler.batches == [4, 4, 1]
    sampler.batches.clear()
    sampler([Request(1, cfg_scale=1 + i) for i in range(4)])
    assert sorted(sampler.batches) == [1, 6]  # a scale of 1 is not guided


def test_prompts_of_any_length(text):
    model, encoder = text
    short, long = "dog", "a photo of red cat on grass"
    requests = [
        Request(short, seed=1),
        Request(long, seed=2),
        Request("cat", seed=3),
        Request(short, seed=1, cfg_scale=2.0, negative=long),
        Request(long, seed=5, cfg_scale=3.0),
        Request(short, seed=1, cfg_scale=2.0),
    ]
    sampler = Counted(model, text_encoder=encoder, cfg_interval=(0, 2), steps=2, **WIDE)
    together = sampler(requests)
    # Two of one length, one long, guided: one short, one long beside one led away from a long one.
    assert sorted(sampler.batches) == [1, 1, 2, 2, 2, 2, 4, 4]
    for request, image in zip(requests, together, strict=True):
        same(image, sampler([request])[0])
    features = encoder([short]).double()
    z = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    same(together[0][None], sample(sampler.model, features, z, 2, transport=OT_FM))
    given = sampler([Request(features[0], seed=1)])[0]
    same(given, together[0])
    padded = Counted(model, text_encoder=encoder, steps=1, tokens=9, **WIDE)
    alone = padded([requests[0]])[0]
    same(padded(requests[:3])[0], alone)
    assert padded.batches == [1, 3]


def test_generators_go_on_from_where_they_are(labels):
    sampler, generator = Sampler(labels, OT_FM, steps=1, **WIDE), torch.Generator().manual_seed(9)
    pictures = sampler([Request(1, seed=generator), Request(1, seed=generator)])
    generator.manual_seed(9)
    same(sampler([Request(1, seed=generator)])[0], pictures[0])
    same(sampler([Request(1, seed=generator)])[0], pictures[1])
    assert not torch.allclose(*pictures)
    torch.manual_seed(0)
    drawn = [sampler([Request(1)])[0] for _ in range(2)]
    assert not torch.allclose(*drawn)


@pytest.mark.parametrize("name", transports.TRANSPORTS)
def test_every_transport(labels, name):
    transport = transports.get(name)
    sampler = Sampler(labels, transport)
    (image,) = sampler([Request(2, seed=0, steps=3)])
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = sample(labels, torch.tensor([2]), z, 3, transport=transport)
    torch.testing.assert_close(image[None], expected, rtol=1e-5, atol=1e-5)


def test_another_dtype_leaves_the_model_alone(labels):
    sampler = Sampler(labels, OT_FM, dtype=torch.bfloat16)
    (half,), (full,) = (s([Request(2, seed=0)]) for s in (sampler, Sampler(labels, OT_FM)))
    assert labels.x_embedder.proj.weight.dtype == torch.float32
    assert sampler.model.x_embedder.proj.weight.dtype == torch.bfloat16
    assert half.dtype == torch.float32 and not torch.equal(half, full)
    torch.testing.assert_close(half, full, rtol=0.1, atol=0.1)
    assert Sampler(labels, OT_FM).model is labels


def test_few_shapes_for_any_number_of_requests(labels, monkeypatch):
    """As on a GPU with graphs, whose replays run the function again here."""
    monkeypatch.setattr("tim.sampling_graph.Replayed", Rehearsed)
    for module in ("sampler", "service"):
        monkeypatch.setattr(f"tim.{module}.check_device", lambda device, what: None)
    monkeypatch.setattr("tim.sampling_graph._graphs", WeakKeyDictionary())
    plain = Sampler(labels, OT_FM, steps=5, **WIDE)
    graphed = Counted(labels, steps=5, cuda_graph=True, max_batch=6, **WIDE)
    requests = [*REQUESTS, *(Request(i % 10, seed=i, cfg_scale=1.5) for i in range(9))]
    for _ in range(2):
        for image, expected in zip(graphed(requests), plain(requests), strict=True):
            same(image, expected)
    graphed.batches.clear()
    for count in range(1, 8):
        graphed([Request(1, seed=i, steps=1) for i in range(count)])
    assert graphed.batches == [1, 2, 4, 4, 6, 6, 6, 1]


@pytest.mark.slow
def test_a_compiled_network_gives_the_same(labels):
    compiled = Sampler(labels, OT_FM, compile=True, max_batch=4)
    expected = Sampler(labels, OT_FM)(REQUESTS)
    for image, other in zip(compiled(REQUESTS), expected, strict=True):
        torch.testing.assert_close(image, other, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("compile", [False, True])
def test_graphs_on_a_gpu_give_the_same(compile):
    model = network(LABELS).cuda()
    graphed = Sampler(model, OT_FM, cuda_graph=True, compile=compile, steps=6)
    expected = Sampler(model, OT_FM, steps=6)(REQUESTS)
    for _ in range(2):
        for image, other in zip(graphed(REQUESTS), expected, strict=True):
            torch.testing.assert_close(image, other, rtol=1e-3, atol=1e-4)


def test_threads_wait_for_one_another(labels):
    sampler = Sampler(labels, OT_FM, **WIDE)
    expected, found = sampler(REQUESTS), {}

    def ask(number: int) -> None:
        found[number] = sampler([REQUESTS[number]])[0]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(REQUESTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, image in enumerate(expected):
        same(found[number], image)


def test_a_run_brings_its_transport_and_settings(tmp_path):
    config = run_config(steps=1, checkpoint_every=1)
    config = replace(
        config,
        transport=replace(config.transport, name="trigflow"),
        objective=replace(config.objective, shift_base=16),
        sample=replace(config.sample, cfg_scale=2.0, cfg_interval=(0.2, 0.9)),
    )
    Trainer(config, tmp_path / "run").train()
    sampler = Sampler.load(tmp_path / "run", dtype=torch.float64, steps=2)
    assert sampler.transport == config.transport.build() and sampler.shift_base == 16
    assert (sampler.cfg_scale, sampler.cfg_interval, sampler.steps) == (2.0, (0.2, 0.9), 2)
    (image,) = sampler([Request(3, seed=0)])
    assert image.shape == (1, 8, 8) and image.isfinite().all()
    tim.load(tmp_path / "run").save_pretrained(tmp_path / "saved")
    assert Sampler.load(tmp_path / "saved").transport == OT_FM


def test_a_saved_pipeline_brings_its_settings(text, tmp_path):
    pytest.importorskip("diffusers")
    from tim.pipeline import TiMPipeline

    model, encoder = text
    parts = {"text_encoder": encoder.model, "tokenizer": encoder.tokenizer}
    pipe = TiMPipeline(model, **parts, max_tokens=5, escape=False, shift_base=16)
    pipe.save_pretrained(tmp_path)
    sampler = Sampler.load(tmp_path, **WIDE)
    assert sampler.shift_base == 16
    assert (sampler.text_encoder.max_tokens, sampler.text_encoder.escape) == (5, False)
    (image,) = sampler([Request("a red cat", seed=3)])
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(1, *image.shape, generator=generator)
    (expected,) = pipe("a red cat", latents=noise, output_type="latent").images
    torch.testing.assert_close(image, expected, rtol=1e-4, atol=1e-5)


def test_a_pipeline_on_the_hub_brings_its_shift(labels, tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    import huggingface_hub

    from tim.pipeline import TiMPipeline

    class NotThere(huggingface_hub.errors.EntryNotFoundError, OSError):
        pass

    def download(repository, file, **_):
        if not (tmp_path / repository / file).is_file():
            raise NotThere(file)
        return str(tmp_path / repository / file)

    TiMPipeline(labels, shift_base=16).save_pretrained(tmp_path / "me" / "fox")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    sampler = Sampler.load("me/fox")
    assert sampler.shift_base == 16 and sampler.model.config == labels.config


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (3, TypeError, "requests[1] must be a Request, got int"),
        (Request(10), ValueError, "requests[1].y must be in 0 .. 9, got 10"),
        (Request("cat"), TypeError, "requests[1].y must be a class, a whole number, got 'cat'"),
        (Request(1, steps=0), ValueError, "requests[1].steps must be a whole number from 1, got 0"),
        (Request(1, cfg_scale=0.5), ValueError, "requests[1].cfg_scale must be at least 1"),
        (Request(1, cfg_scale="2"), TypeError, "requests[1].cfg_scale must be a number, got '2'"),
        (Request(1, size=(8, 7)), ValueError, "requests[1].size must be height and width of the"),
        (Request(1, size=8), ValueError, "requests[1].size must be height and width of the"),
        (Request(1, seed=0.5), TypeError, "requests[1].seed must be a whole number or a gen"),
        (Request(1, negative="a"), ValueError, "requests[1].negative is for text models, got a"),
    ],
)
def test_requests_that_do_not_fit_a_class_model(labels, request_, error, message):
    sampler = Counted(labels)
    with pytest.raises(error) as caught:
        sampler([Request(1), request_])
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert sampler.batches == []


def test_requests_that_do_not_fit_a_text_model(text):
    model, encoder = text
    bare, whole = Sampler(model, OT_FM), Sampler(model, OT_FM, text_encoder=encoder)
    with pytest.raises(ValueError, match=r"requests\[0\]\.y is a prompt: the sampler needs a text"):
        bare([Request("cat")])
    for y in (3, torch.zeros(5, 4)):
        with pytest.raises(TypeError, match=r"y must be a prompt or features \[M, 12\], got"):
            whole([Request(y)])
    features = torch.zeros(5, 12)
    with pytest.raises(ValueError, match=r"negative must be features \[5, 12\] like y where"):
        whole([Request(features, cfg_scale=2.0)])
    with pytest.raises(TypeError, match=r"negative must be a prompt, as y is, got a tensor"):
        whole([Request("cat", negative=features)])
    with pytest.raises(ValueError, match=r"prompts must have at most tokens = 3, got 7: .a photo"):
        Sampler(model, OT_FM, text_encoder=encoder, tokens=3)([Request("a photo of red cat on")])


def test_samplers_that_cannot_be(labels, text):
    with pytest.raises(TypeError, match=r"model must be a tim.TiM, got function"):
        Sampler(lambda x: x, OT_FM)
    with pytest.raises(TypeError, match="transport must be a Transport, got str"):
        Sampler(labels, "ot_fm")
    with pytest.raises(ValueError, match="max_batch must be a whole number from 1, got 0"):
        Sampler(labels, OT_FM, max_batch=0)
    with pytest.raises(ValueError, match="cuda_graph needs a CUDA device, got cpu"):
        Sampler(labels, OT_FM, cuda_graph=True)
    wide = network(replace(CAPTIONS, cap_feat_dim=20, z_dim=None))
    with pytest.raises(ValueError, match=r"text_encoder must give features of width 20.*got 12"):
        Sampler(wide, OT_FM, text_encoder=text[1])
    assert Sampler(labels, OT_FM)([]) == []
