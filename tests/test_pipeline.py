import dataclasses
import importlib
import json
import sys
import types
from pathlib import Path
from weakref import WeakKeyDictionary

import huggingface_hub
import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file

import tim
from rehearsal import Rehearsed
from small_encoders import autoencoder_dc, autoencoder_kl, gemma, saved, tokenizer
from tim import sampling_graph, transports
from tim.autoencoder import decode
from tim.models import ARCHITECTURES, TiMConfig
from tim.models.loading import release_at
from tim.models.released import RELEASES
from tim.pipeline import TiMPipeline, TiMTransformer2DModel, open_pipeline
from tim.sampler import resolution_shift, sample
from tim.text import TextEncoder
from tiny_runs import config as run_config

SIZES = {
    "hidden_size": 32, "depth": 2, "num_heads": 2, "encoder_depth": 1, "projector_dim": 8,
    "lora_hidden_size": 8,
}  # fmt: skip
LABELS = TiMConfig(input_size=8, patch_size=2, in_channels=4, num_classes=10, **SIZES)
TEXT = TiMConfig(
    input_size=4, patch_size=1, in_channels=8, num_classes=None, cap_feat_dim=16, z_dim=12,
    rope_grid="released", **SIZES,
)  # fmt: skip
PROMPTS = ["a photo of red cat on grass", "dog"]


def network(config: TiMConfig) -> tim.TiM:
    torch.manual_seed(3)
    model = tim.TiM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def labels():
    return TiMPipeline(network(LABELS), vae=autoencoder_kl())


@pytest.fixture(scope="module")
def text():
    return TiMPipeline(
        network(TEXT),
        vae=autoencoder_dc(),
        text_encoder=gemma().get_decoder(),
        tokenizer=tokenizer(),
    )


@pytest.fixture(autouse=True)
def quiet(labels, text):
    for pipe in (labels, text):
        pipe.set_progress_bar_config(disable=True)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_labels_give_what_the_sampler_gives(labels, steps):
    z, y = noise(2, 4, 8, 12), torch.tensor([3, 7])
    options = {"guidance_scale": 2.0, "guidance_interval": (0.0, 0.8)}
    latents = labels(
        class_labels=y, height=16, width=24, num_inference_steps=steps, latents=z,
        output_type="latent", **options,
    ).images  # fmt: skip
    expected = sample(
        labels.network, y, z, steps, transport=transports.get("ot_fm"), cfg_scale=2.0,
        cfg_interval=(0.0, 0.8), null=torch.tensor([10, 10]),
    )  # fmt: skip
    torch.testing.assert_close(latents, expected, rtol=1e-6, atol=1e-6)


def test_prompts_give_what_the_sampler_gives(text):
    z = noise(2, 8, 4, 6)
    options = {"height": 16, "width": 24, "num_inference_steps": 3, "latents": z}
    pictures = text(PROMPTS, guidance_scale=3.0, output_type="pt", **options).images
    encoder = TextEncoder(text.text_encoder, text.tokenizer)
    y = encoder(PROMPTS)
    latents = sample(
        text.network, y, z, 3, transport=transports.get("ot_fm"), cfg_scale=3.0,
        null=encoder.null(2, y.shape[1]),
    )  # fmt: skip
    expected = (decode(text.vae, latents) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(pictures, expected, rtol=1e-4, atol=1e-5)
    led_away = text(
        PROMPTS, negative_prompt="blue", guidance_scale=3.0, output_type="pt", **options
    )
    assert not torch.allclose(led_away.images, pictures)


def test_graphs_give_the_same_pictures(labels, monkeypatch):
    """Their replays run the function again, so that a CPU has them."""
    monkeypatch.setattr("tim.sampling_graph.Replayed", Rehearsed)
    monkeypatch.setattr("tim.sampling_graph._graphs", WeakKeyDictionary())
    options = {
        "class_labels": [3, 7], "latents": noise(2, 4, 8, 8), "num_inference_steps": 9,
        "guidance_scale": 2.0, "guidance_interval": (0.2, 0.8), "output_type": "latent",
    }  # fmt: skip
    expected = labels(**options).images
    labels.accelerate(cuda_graph=True)
    try:
        with pytest.raises(ValueError, match="cuda_graph needs a CUDA device, got cpu"):
            labels(**options)
        monkeypatch.setattr("tim.pipeline.check_device", lambda device, what: None)
        for _ in range(2):
            torch.testing.assert_close(labels(**options).images, expected, rtol=1e-6, atol=1e-6)
        (graphs,) = sampling_graph._graphs.values()
        assert [graph.replayed.recordings for graph in graphs.values()] == [1, 1]
        monkeypatch.setattr(labels.transformer, "_hf_hook", object(), raising=False)
        with pytest.raises(ValueError, match="cuda_graph needs weights that stay on the GPU"):
            labels(**options)
    finally:
        labels.accelerate()


def test_a_compiled_network_is_called(labels, monkeypatch):
    compiled = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module, **how: compiled.append((module, how))
    )
    labels.accelerate(compile=True)
    assert compiled == [(labels.transformer, {"dynamic": False})]


@pytest.mark.slow
def test_a_compiled_network_gives_the_same_pictures():
    pipe = TiMPipeline(network(dataclasses.replace(LABELS, in_channels=1)))
    pipe.set_progress_bar_config(disable=True)
    options = {
        "class_labels": [3, 7], "latents": noise(2, 1, 8, 8), "num_inference_steps": 4,
        "guidance_scale": 2.0, "output_type": "latent",
    }  # fmt: skip
    expected = pipe(**options).images
    torch._dynamo.reset()
    pipe.accelerate(compile=True)
    torch._dynamo.utils.counters.clear()
    torch.testing.assert_close(pipe(**options).images, expected, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_shift_of_the_times(labels):
    z, seen = noise(1, 4, 8, 8), []

    def look(pipe, step, time, given):
        seen.append(float(time))
        assert list(given) == ["latents"] and given["latents"].shape == z.shape

    options = {"num_inference_steps": 4, "latents": z, "output_type": "latent"}
    shifted = labels(class_labels=1, shift=2.0, callback_on_step_end=look, **options).images
    assert seen == pytest.approx([1000, 1000 * 6 / 7, 1000 * 2 / 3, 400])
    labels.register_to_config(shift_base=16)
    by_resolution = labels(class_labels=1, **options).images
    labels.register_to_config(shift_base=None)
    assert resolution_shift(64, 16) == 2
    assert torch.equal(by_resolution, shifted)
    assert not torch.equal(labels(class_labels=1, **options).images, shifted)
    expected = sample(
        labels.network, torch.tensor([1]), z, 4, transport=transports.get("ot_fm"),
        schedule="shifted", shift=2.0,
    )  # fmt: skip
    torch.testing.assert_close(shifted, expected, rtol=1e-6, atol=1e-6)


def test_kinds_of_output(labels):
    options = {"class_labels": [1, 2], "num_inference_steps": 1}
    generator = torch.Generator().manual_seed(1)
    (first,) = labels(generator=generator, return_dict=False, **options)
    assert [picture.size for picture in first] == [(16, 16)] * 2
    arrays = labels(generator=generator.manual_seed(1), output_type="np", **options).images
    assert arrays.shape == (2, 16, 16, 3) and 0 <= arrays.min() <= arrays.max() <= 1
    np.testing.assert_array_equal(np.array(first[1]), (arrays[1] * 255).round().astype(np.uint8))
    each = [torch.Generator().manual_seed(seed) for seed in (4, 5)]
    tensors = labels(generator=each, output_type="pt", **options).images
    alone = labels(
        class_labels=2, num_inference_steps=1, output_type="pt",
        generator=torch.Generator().manual_seed(5),
    ).images  # fmt: skip
    torch.testing.assert_close(tensors[1:], alone)
    several = labels(class_labels=[1, 2], num_images_per_prompt=3, num_inference_steps=1).images
    assert len(several) == 6


def test_progress_bar_counts_the_steps(labels, capsys):
    options = {"class_labels": 1, "num_inference_steps": 3, "output_type": "latent"}
    labels(**options)
    assert capsys.readouterr().err == ""
    labels.set_progress_bar_config(disable=False)
    labels(**options)
    assert "3/3" in capsys.readouterr().err


def test_callback_may_replace_the_latents(labels):
    options = {"class_labels": 1, "num_inference_steps": 2, "output_type": "latent"}

    def replace(pipe, step, time, given):
        return {"latents": torch.zeros_like(given["latents"])}

    out = labels(latents=noise(1, 4, 8, 8), callback_on_step_end=replace, **options).images
    assert torch.equal(out, torch.zeros(1, 4, 8, 8))


def test_pixels_need_no_autoencoder():
    pipe = TiMPipeline(network(dataclasses.replace(LABELS, in_channels=1)))
    pipe.set_progress_bar_config(disable=True)
    (picture,) = pipe(class_labels=1, num_inference_steps=2).images
    assert picture.size == (8, 8) and picture.mode == "L"
    with pytest.raises(ValueError, match="no vae to tile"):
        pipe.enable_vae_tiling()


def test_component_shares_the_weights_of_the_network():
    model = network(LABELS)
    component = TiMTransformer2DModel.wrap(model)
    state = component.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(state[k].data_ptr() == v.data_ptr() for k, v in model.state_dict().items())
    component.to(torch.bfloat16)
    assert component.dtype == model.x_embedder.proj.weight.dtype == torch.bfloat16


def test_a_pipeline_on_the_hub_is_opened_whole(labels, tmp_path, monkeypatch):
    labels.save_pretrained(tmp_path / "me" / "fox")
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda name, file, **_: str(tmp_path / name / file)
    )
    asked = []
    read = TiMPipeline.from_pretrained

    def from_pretrained(name, **options):
        asked.append(name)
        return read(tmp_path / name, **options)

    monkeypatch.setattr(TiMPipeline, "from_pretrained", from_pretrained)
    pipe = open_pipeline("me/fox")
    assert asked == ["me/fox"] and pipe.network.config == labels.network.config
    with pytest.raises(ValueError, match="me/fox is a whole pipeline, which has its own vae"):
        open_pipeline("me/fox", vae="other")


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.preset)
def test_a_folder_with_a_published_file_brings_its_encoders(release, tmp_path):
    (tmp_path / release.file).touch()
    assert release_at(tmp_path, None) == release
    (tmp_path / "config.json").touch()
    assert release_at(tmp_path, None) is None


@pytest.mark.parametrize("kind", ["labels", "text"])
def test_saved_pipelines_come_back(kind, request, tmp_path):
    pipe = request.getfixturevalue(kind)
    pipe.save_pretrained(tmp_path)
    parts = json.loads((tmp_path / "model_index.json").read_text())
    assert parts["_class_name"] == "TiMPipeline"
    assert parts["scheduler"] == ["diffusers", "FlowMapEulerDiscreteScheduler"]
    back = TiMPipeline.from_pretrained(tmp_path)
    back.set_progress_bar_config(disable=True)
    assert back.network.config == pipe.network.config
    assert back.config.max_tokens == 256 and back.config.escape
    condition = {"class_labels": [3]} if kind == "labels" else {"prompt": PROMPTS[:1]}
    options = {**condition, "num_inference_steps": 2, "output_type": "pt"}
    generators = [torch.Generator().manual_seed(2) for _ in range(2)]
    one, two = (p(generator=g, **options).images for p, g in zip((pipe, back), generators))  # noqa: B905
    torch.testing.assert_close(one, two)
    half = TiMPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.transformer.dtype == torch.bfloat16
    # The weights are those of the network, under the released names, and tim.load reads them.
    weights = load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    assert weights.keys() == pipe.network.state_dict().keys()
    loaded = tim.load(tmp_path)
    assert loaded.config == pipe.network.config
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, weights[name])


def test_push_to_hub(labels, monkeypatch):
    from diffusers.utils import hub_utils

    uploaded = []

    def upload(self, folder, repository, **_):
        assert tim.load(folder).config == LABELS
        uploaded.append((repository, {path.name for path in Path(folder).iterdir()}))

    repository = types.SimpleNamespace(repo_id="someone/labels")
    monkeypatch.setattr(hub_utils, "create_repo", lambda *_, **__: repository)
    monkeypatch.setattr(hub_utils, "load_or_create_model_card", lambda *_, **__: _Card())
    monkeypatch.setattr(hub_utils, "populate_model_card", lambda card, **_: card)
    monkeypatch.setattr(hub_utils.PushToHubMixin, "_upload_folder", upload)
    labels.push_to_hub("someone/labels")
    ((name, files),) = uploaded
    assert name == "someone/labels"
    assert {"model_index.json", "scheduler", "transformer", "vae"} <= files


class _Card:
    def save(self, path):
        pass


@pytest.fixture
def releases(monkeypatch, tmp_path):
    """Tiny networks and encoders under the published names."""
    import huggingface_hub

    folders = {
        "stabilityai/sd-vae-ft-ema": saved(tmp_path / "kl", autoencoder_kl()),
        "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers": saved(tmp_path / "dc", autoencoder_dc()),
        "google/gemma-3-1b-it": saved(tmp_path / "gemma", gemma(), tokenizer()),
    }
    tiny = {
        "tim-xl2-256": LABELS,
        "tim-xl1-512": dataclasses.replace(TEXT, num_classes=10, cap_feat_dim=None),
        "tim-t2i-xl1": TEXT,
    }
    for release in RELEASES:
        monkeypatch.setitem(ARCHITECTURES, release.preset, tiny[release.preset])
        path = tmp_path / release.repository / release.file
        path.parent.mkdir(parents=True, exist_ok=True)
        state = network(release.config).state_dict()
        torch.save(state, path) if path.suffix == ".bin" else save_file(state, path)
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda repo, file, **_: str(tmp_path / repo / file)
    )
    load_autoencoder, load_text_model = tim.pipeline.load_autoencoder, tim.pipeline.load_text_model
    monkeypatch.setattr(
        tim.pipeline, "load_autoencoder", lambda name: load_autoencoder(str(folders[name]))
    )
    monkeypatch.setattr(
        tim.pipeline, "load_text_model", lambda name: load_text_model(str(folders[name]))
    )
    return tmp_path


@pytest.mark.parametrize("release", RELEASES, ids=lambda r: r.preset)
def test_released_weights_bring_their_encoders(releases, release):
    for source in (release.repository, f"{release.repository}/{release.file}"):
        preset = None if source.endswith(release.file) else release.preset
        pipe = TiMPipeline.from_weights(source, preset=preset, dtype=torch.bfloat16)
        pipe.set_progress_bar_config(disable=True)
        assert pipe.network.config == release.config
        assert pipe.transformer.dtype == torch.bfloat16 and pipe.vae.dtype == torch.float32
        condition = {"class_labels": 1} if release.text_encoder is None else {"prompt": "a cat"}
        (picture,) = pipe(num_inference_steps=2, guidance_scale=2.0, **condition).images
        assert picture.size == (16, 16)


def test_run_directories(tmp_path):
    from tim.trainer import Trainer

    config = run_config(steps=1, checkpoint_every=1)
    config = dataclasses.replace(
        config, objective=dataclasses.replace(config.objective, shift_base=16)
    )
    Trainer(config, tmp_path / "run").train()
    pipe = TiMPipeline.from_weights(tmp_path / "run")
    assert pipe.config.shift_base == 16 and pipe.vae is None
    transport = dataclasses.replace(config.transport, name="ve", P_mean=None)
    other = dataclasses.replace(config, transport=transport)
    other.save(tmp_path / "run" / "config.yaml")
    with pytest.raises(ValueError, match=r"must be of transport ot_fm .*, got ve from"):
        TiMPipeline.from_weights(tmp_path / "run")


def test_parts_that_do_not_fit(labels, text):
    with pytest.raises(ValueError, match=r"vae must have latents of 4 channels.*got 8"):
        TiMPipeline(labels.network, vae=text.vae)
    narrow = network(dataclasses.replace(TEXT, cap_feat_dim=20))
    with pytest.raises(ValueError, match=r"text_encoder must give features of width 20.*got 16"):
        TiMPipeline(narrow, text_encoder=text.text_encoder, tokenizer=text.tokenizer)


def test_parts_that_are_missing(labels, text, tmp_path):
    labels.network.save_pretrained(tmp_path / "labels")
    text.network.save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match=r"vae is missing: .*labels models latents of 4 channels"):
        TiMPipeline.from_weights(tmp_path / "labels")
    with pytest.raises(ValueError, match=r"text_encoder is missing: .* is a text model"):
        TiMPipeline.from_weights(tmp_path / "text", vae=text.vae)
    with pytest.raises(ValueError, match=r"text_encoder must not be given: .* takes class labels"):
        TiMPipeline.from_weights(tmp_path / "labels", vae=labels.vae, text_encoder="x")
    bare = TiMPipeline(text.network, vae=text.vae)
    with pytest.raises(ValueError, match="the pipeline has no text_encoder"):
        bare("a cat")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"height": 18}, ValueError, "height must be a multiple of 4 .*, got 18"),
        ({"width": -4}, ValueError, "width must be a multiple of 4 .*, got -4"),
        ({"num_inference_steps": 0}, ValueError, "num_inference_steps must be a .*, got 0"),
        ({"guidance_scale": 0.5}, ValueError, r"guidance_scale must be at least 1 .*, got 0.5"),
        ({"shift": 0}, ValueError, "shift must be positive, got 0"),
        ({"guidance_interval": (0.9, 0.1)}, ValueError, r"low <= high, got \(0.9, 0.1\)"),
        (
            {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]},
            ValueError,
            "tensor_inputs must be of latents, got prompt_embeds",
        ),
        ({"output_type": "jpeg"}, ValueError, "output_type must be one of pil, np.*, got 'jpeg'"),
        ({"latents": torch.zeros(1, 4, 8, 9)}, ValueError, r"latents must have shape \[1, 4, 8, 8"),
        ({"latents": 3}, TypeError, "latents must be a tensor, got int"),
        ({"class_labels": 10}, ValueError, r"class_labels must be in 0 .. 9, got \[10\]"),
        ({"class_labels": 1.5}, ValueError, "class_labels must be whole numbers, got 1.5"),
        ({"class_labels": None}, ValueError, "a class model takes class_labels and no prompts"),
        ({"prompt": "cat"}, ValueError, "a class model takes class_labels and no prompts"),
    ],
)
def test_bad_arguments_of_a_class_model(labels, options, error, message):
    with pytest.raises(error, match=message) as caught:
        labels(**{"class_labels": 1, "num_inference_steps": 1, **options})
    assert "\n" not in str(caught.value)


def test_bad_arguments_of_a_text_model(text):
    with pytest.raises(ValueError, match="a text model takes prompt and no class_labels"):
        text(class_labels=1)
    with pytest.raises(ValueError, match=r"negative_prompt must be one or as many .*, 2, got 3"):
        text(PROMPTS, negative_prompt=["a", "b", "c"])


def test_large_pictures_in_tiles(labels):
    options = {"class_labels": 1, "num_inference_steps": 1, "height": 64, "width": 32}
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    whole = labels(generator=generators[0], output_type="pt", **options).images
    labels.enable_vae_tiling(32)
    tiled = labels(generator=generators[1], output_type="pt", **options).images
    labels.vae.disable_tiling()
    assert tiled.shape == whole.shape and not torch.equal(tiled, whole)


def test_offloading_covers_every_network():
    parts = TiMPipeline.model_cpu_offload_seq.split("->")
    assert parts == ["text_encoder", "transformer", "vae"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offloading_gives_the_same_pictures(text):
    pytest.importorskip("accelerate")
    generator = torch.Generator()
    options = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "pt"}
    expected = text(PROMPTS, generator=generator.manual_seed(0), **options).images
    text.enable_model_cpu_offload()
    pictures = text(PROMPTS, generator=generator.manual_seed(0), **options).images
    assert all(p.device.type == "cpu" for p in text.transformer.parameters())
    torch.testing.assert_close(pictures.cpu(), expected, rtol=1e-3, atol=1e-3)


def test_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.delitem(sys.modules, "tim.pipeline")
    with pytest.raises(ImportError, match=r"pip install -U 'transition-models\[t2i\]'"):
        importlib.import_module("tim.pipeline")
