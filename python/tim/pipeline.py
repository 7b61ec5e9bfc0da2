"""Prompts or class labels to pictures: a pipeline of diffusers around a TiM network.

Needs the packages of the extra `t2i`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tim.autoencoder import EXTRA, decode, downsampling, enable_tiling, load_autoencoder
from tim.config import RunConfig
from tim.graphs import check_device
from tim.models import TiM, TiMConfig, load
from tim.models.loading import pipeline_index, release_at
from tim.sampler import is_guided, predict
from tim.schedule import resolution_shift, shift_time
from tim.text import MAX_TOKENS, TextEncoder, load_text_model
from tim.transports import FlowMatching

try:
    from diffusers import (
        ConfigMixin,
        DiffusionPipeline,
        FlowMapEulerDiscreteScheduler,
        ImagePipelineOutput,
        ModelMixin,
    )
    from diffusers.configuration_utils import register_to_config
    from diffusers.image_processor import VaeImageProcessor
    from diffusers.utils.torch_utils import randn_tensor
except ImportError as error:
    raise ImportError(
        f"tim.pipeline needs a recent diffusers: pip install -U '{EXTRA}' ({error})"
    ) from None

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class TiMTransformer2DModel(ModelMixin, ConfigMixin):
    """A `TiM` as a component of a pipeline: same weights, same names, same call."""

    @register_to_config
    def __init__(self, architecture: dict[str, Any]) -> None:
        super().__init__()
        self._adopt(TiM(TiMConfig.from_dict(architecture)))

    @classmethod
    def wrap(cls, network: TiM) -> TiMTransformer2DModel:
        """The component that holds the weights of `network` itself, not copies."""
        with torch.device("meta"):
            model = cls(network.config.to_dict())
        model._adopt(network)
        return model.train(network.training)

    def _adopt(self, network: TiM) -> None:
        for name, child in network.named_children():
            self.add_module(name, child)
        # Hidden from nn.Module: its children are ours, under the names of released weights.
        object.__setattr__(self, "network", network)

    def forward(self, *arguments: Any, **options: Any) -> Tensor | tuple[Tensor, ...]:
        """As `TiM.forward`."""
        return self.network(*arguments, **options)


class TiMPipeline(DiffusionPipeline):
    """Pictures of any size in any number of steps, from prompts or class labels.

    `from_weights` puts one together from a network (released, trained or loaded);
    `save_pretrained`, `from_pretrained` and `push_to_hub` are those of diffusers, and so are
    `enable_model_cpu_offload`, `set_progress_bar_config` and the callbacks.

    Args:
        transformer: the network, of transport ot_fm.
        scheduler: the any-step Euler scheduler of diffusers.
        vae: an autoencoder of diffusers. None: the network models pixels.
        text_encoder, tokenizer: of transformers, for a text model.
        max_tokens, escape: see `tim.text.TextEncoder`.
        shift_base: latents' height times width at 1024 x 1024, if times are to be shifted for the
            resolution (`tim.schedule`), as the network was trained. None: no shift.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components: ClassVar[list[str]] = ["scheduler", "vae", "text_encoder", "tokenizer"]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]

    def __init__(
        self,
        transformer: TiMTransformer2DModel | TiM,
        scheduler: FlowMapEulerDiscreteScheduler | None = None,
        vae: nn.Module | None = None,
        text_encoder: nn.Module | None = None,
        tokenizer: Any = None,
        max_tokens: int = MAX_TOKENS,
        escape: bool = True,
        shift_base: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(transformer, TiM):
            transformer = TiMTransformer2DModel.wrap(transformer)
        config = transformer.network.config
        if vae is not None and vae.config.latent_channels != config.in_channels:
            raise ValueError(
                f"vae must have latents of {config.in_channels} channels, those of the network, "
                f"got {vae.config.latent_channels}"
            )
        if text_encoder is not None:
            width = TextEncoder(text_encoder, tokenizer).features
            if width != config.cap_feat_dim:
                raise ValueError(
                    f"text_encoder must give features of width {config.cap_feat_dim}, what the "
                    f"network reads, got {width}"
                )
        self.register_modules(
            transformer=transformer,
            scheduler=scheduler or FlowMapEulerDiscreteScheduler(),
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )
        self.register_to_config(max_tokens=max_tokens, escape=escape, shift_base=shift_base)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.multiple)
        self._cuda_graph = False

    @classmethod
    def from_weights(
        cls,
        source: str | Path,
        *,
        preset: str | None = None,
        config: TiMConfig | None = None,
        vae: str | nn.Module | None = None,
        text_encoder: str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> TiMPipeline:
        """A pipeline around the network that `tim.load` finds in `source`.

        Args:
            source, preset, config: as for `tim.load`.
            vae, text_encoder: names or folders; those of the release where none are given. The
                autoencoder is kept in float32.
            dtype: of the network and the text encoder.
            options: max_tokens, escape, shift_base.

        Raises:
            as `tim.load`; ValueError for a network that needs a text encoder or an autoencoder
            where none is given.
        """
        if (Path(source) / "config.yaml").is_file():
            run = _run_config(Path(source))
            vae, text_encoder = vae or run.data.vae, text_encoder or run.data.text_encoder
            known = {
                "shift_base": run.objective.shift_base,
                "max_tokens": run.data.max_tokens,
                "escape": run.data.escape,
            }
            options = {**known, **options}
        network = load(source, preset=preset, config=config, dtype=dtype)
        release = release_at(source, preset)
        vae = vae or (release and release.autoencoder)
        text_encoder = text_encoder or (release and release.text_encoder)
        wanted = network.config
        if vae is None and wanted.in_channels not in (1, 3):
            raise ValueError(
                f"vae is missing: {source} models latents of {wanted.in_channels} channels, which "
                "only their autoencoder can turn into pictures"
            )
        parts: dict[str, Any] = {}
        if wanted.num_classes is None:
            if text_encoder is None:
                raise ValueError(f"text_encoder is missing: {source} is a text model")
            model, parts["tokenizer"] = load_text_model(text_encoder)
            parts["text_encoder"] = model.to(dtype=dtype)
        elif text_encoder is not None:
            raise ValueError(f"text_encoder must not be given: {source} takes class labels")
        if vae is not None:
            parts["vae"] = load_autoencoder(vae) if isinstance(vae, str) else vae
        return cls(network, **parts, **options)

    @property
    def network(self) -> TiM:
        return self.transformer.network

    @property
    def factor(self) -> int:
        """Pixels per latent along a side."""
        return 1 if self.vae is None else downsampling(self.vae)

    @property
    def multiple(self) -> int:
        """What height and width must be multiples of: pixels of a token along a side."""
        return self.factor * self.network.config.patch_size

    def enable_vae_tiling(self, size: int | None = None) -> None:
        """Decode pictures larger than `size` in tiles, see `tim.autoencoder.enable_tiling`."""
        if self.vae is None:
            raise ValueError("there is no vae to tile: the network models pixels")
        enable_tiling(self.vae, size)

    def accelerate(self, *, compile: bool = False, cuda_graph: bool = False) -> None:
        """Take the steps of later calls faster, with the same pictures but for rounding.

        Args:
            compile: the network through torch.compile, anew for each shape: a minute at the first
                call, and not worth it for a few pictures.
            cuda_graph: launch the network as one CUDA graph, for which the pipeline has to be on a
                GPU as a whole (no CPU offload). The first three steps of a shape run as usual.
        """
        if compile:
            self.transformer.compile(dynamic=False)
        self._cuda_graph = cuda_graph

    def set_rope(
        self, scaling: str, *, train_size: int | None = None, decouple: bool = False
    ) -> None:
        """Change the positions of pictures larger than those trained on, see `tim.models.rope`.

        Args:
            scaling: "none", "linear", "ntk-aware", "ntk-by-parts" or "yarn".
            train_size: tokens of the training images along a side. None: of square ones of the
                network's input_size.
            decouple: scale each axis by its own side.
        """
        config = dataclasses.replace(
            self.network.config,
            rope_scaling=scaling,
            rope_train_size=train_size,
            rope_decouple=decouple,
        )
        self.network.config = config
        self.transformer.register_to_config(architecture=config.to_dict())

    def encode_prompt(
        self, prompt: Sequence[str], negative_prompt: Sequence[str] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Features [B, M, K] of the prompts and of what guidance leads away from.

        Both have the length of the longest; negative_prompt None is the empty prompt.
        """
        encoder = TextEncoder(
            self.text_encoder,
            self.tokenizer,
            max_tokens=self.config.max_tokens,
            escape=self.config.escape,
        )
        negative = [""] * len(prompt) if negative_prompt is None else list(negative_prompt)
        both = encoder([*prompt, *negative]).to(self._execution_device)
        return both[: len(prompt)], both[len(prompt) :]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        class_labels: int | Sequence[int] | Tensor | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 4,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        shift: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Tensor]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Sample pictures.

        Args:
            prompt, class_labels: what to show; a text model takes prompts, any other labels.
            height, width: in pixels, multiples of `multiple`; by default those trained on.
            num_inference_steps: calls of the network.
            guidance_scale: F = F_null + guidance_scale (F_cond - F_null), 1 for none.
            guidance_interval: (low, high), guided where low < t < high; so with high = 1 the first
                step is not guided.
            negative_prompt: what guidance leads away from; by default the empty prompt.
            num_images_per_prompt: pictures for each prompt or label.
            generator: source of the noise, or one for each picture.
            latents: the noise itself, [B, C, H, W].
            shift: the s of `tim.schedule.shift_time`. None: as `shift_base` says.
            output_type: "pil", "np" [B, H, W, C] or "pt" [B, C, H, W] in [0, 1], or "latent".
            return_dict: return an ImagePipelineOutput, whose `images` they are, else a tuple.
            callback_on_step_end: function of (pipeline, step, time, {"latents": ...}) called after
                each step; latents that it returns replace those of the pipeline.

        Raises:
            TypeError, ValueError: an argument is missing or does not fit, before any work is done.
        """
        config = self.network.config
        height = height or config.input_size * self.factor
        width = width or config.input_size * self.factor
        self._check(height, width, num_inference_steps, guidance_scale, output_type, latents)
        if shift is not None and not shift > 0:
            raise ValueError(f"shift must be positive, got {shift}")
        if not guidance_interval[0] <= guidance_interval[1]:
            raise ValueError(
                f"guidance_interval must be (low, high) with low <= high, got {guidance_interval}"
            )
        if set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(
                "callback_on_step_end_tensor_inputs must be of "
                f"{', '.join(self._callback_tensor_inputs)}, "
                f"got {', '.join(callback_on_step_end_tensor_inputs)}"
            )
        device = self._execution_device
        if self._cuda_graph:
            check_device(device, "cuda_graph")
            if hasattr(self.transformer, "_hf_hook"):
                raise ValueError("cuda_graph needs weights that stay on the GPU, got CPU offload")
        y, null = self._conditions(prompt, class_labels, negative_prompt, device)
        y = y.repeat_interleave(num_images_per_prompt, 0)
        null = null.repeat_interleave(num_images_per_prompt, 0)

        shape = (len(y), config.in_channels, height // self.factor, width // self.factor)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif latents.shape != shape:
            raise ValueError(f"latents must have shape {list(shape)}, got {list(latents.shape)}")
        dtype = self.transformer.dtype
        x = latents.to(device=device, dtype=torch.float64)

        times = self._times(num_inference_steps, shape, shift)
        transport = FlowMatching()
        with self.progress_bar(total=num_inference_steps) as bar:
            for i, (t, r) in enumerate(itertools.pairwise(times)):
                guided = is_guided(t, transport, guidance_scale, guidance_interval)
                F = predict(
                    self.transformer, x.to(dtype), t, r, y, null if guided else None,
                    guidance_scale, transport=transport, cuda_graph=self._cuda_graph,
                )  # fmt: skip
                at, to = t * self._scale, r * self._scale
                x = self.scheduler.step(F, at, x, r_timestep=to).prev_sample
                if callback_on_step_end is not None:
                    given = dict.fromkeys(callback_on_step_end_tensor_inputs, x)
                    returned = callback_on_step_end(self, i, at, given) or {}
                    x = returned.get("latents", x).double()
                bar.update()
        images = self._images(x.float(), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @property
    def _scale(self) -> int:
        return self.scheduler.config.num_train_timesteps

    def _times(self, steps: int, shape: tuple[int, ...], shift: float | None) -> Tensor:
        """[steps + 1] descending times of the scheduler, float64 on the CPU."""
        if shift is None and self.config.shift_base is not None:
            shift = resolution_shift(shape[2] * shape[3], self.config.shift_base)
        sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1]
        sigmas = shift_time(sigmas, 1.0 if shift is None else shift)
        self.scheduler.set_timesteps(sigmas=sigmas.tolist(), device="cpu")
        return self.scheduler.sigmas

    def _conditions(
        self,
        prompt: str | Sequence[str] | None,
        class_labels: int | Sequence[int] | Tensor | None,
        negative_prompt: str | Sequence[str] | None,
        device: torch.device,
    ) -> tuple[Tensor, Tensor]:
        """Condition of each picture and its null condition."""
        classes = self.network.config.num_classes
        if classes is None:
            if prompt is None or class_labels is not None:
                raise ValueError("a text model takes prompt and no class_labels")
            if self.text_encoder is None:
                raise ValueError("the pipeline has no text_encoder for its prompts")
            prompt = [prompt] if isinstance(prompt, str) else list(prompt)
            if isinstance(negative_prompt, str):
                negative_prompt = [negative_prompt] * len(prompt)
            if negative_prompt is not None and len(negative_prompt) != len(prompt):
                raise ValueError(
                    f"negative_prompt must be one or as many as prompt, {len(prompt)}, "
                    f"got {len(negative_prompt)}"
                )
            return self.encode_prompt(prompt, negative_prompt)
        if class_labels is None or prompt is not None or negative_prompt is not None:
            raise ValueError("a class model takes class_labels and no prompts")
        y = torch.atleast_1d(torch.as_tensor(class_labels)).to(device)
        if y.dim() != 1 or y.dtype.is_floating_point or not len(y):
            raise ValueError(f"class_labels must be whole numbers, got {class_labels!r}")
        if y.min() < 0 or y.max() >= classes:
            raise ValueError(f"class_labels must be in 0 .. {classes - 1}, got {y.tolist()}")
        return y.long(), torch.full_like(y, classes, dtype=torch.int64)

    def _check(
        self, height: int, width: int, steps: int, scale: float, output: str, latents: object
    ) -> None:
        for name, value in (("height", height), ("width", width)):
            if value < 1 or value % self.multiple:
                raise ValueError(
                    f"{name} must be a multiple of {self.multiple} (a token is that many pixels "
                    f"wide), got {value}"
                )
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"num_inference_steps must be a whole number from 1, got {steps!r}")
        if not scale >= 1:
            raise ValueError(f"guidance_scale must be at least 1 (no guidance), got {scale}")
        if output not in OUTPUT_TYPES:
            raise ValueError(
                f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output!r}"
            )
        if latents is not None and not isinstance(latents, Tensor):
            raise TypeError(f"latents must be a tensor, got {type(latents).__name__}")

    def _images(self, x: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return x
        pictures = x if self.vae is None else decode(self.vae, x)
        return self.image_processor.postprocess(pictures, output_type=output_type)


def open_pipeline(
    source: str | Path, *, dtype: torch.dtype | None = None, **options: Any
) -> TiMPipeline:
    """The pipeline in a folder or hub repository, or one around the network in `source`.

    Args:
        options: as for `TiMPipeline.from_weights`; a saved pipeline takes none.
    """
    if pipeline_index(source) is None:
        return TiMPipeline.from_weights(source, dtype=dtype, **options)
    if given := [name for name, value in options.items() if value is not None]:
        raise ValueError(f"{source} is a whole pipeline, which has its own {', '.join(given)}")
    return TiMPipeline.from_pretrained(source, dtype=dtype)


def _run_config(run: Path) -> RunConfig:
    """Configuration of a run. Raises ValueError when it is not one of transport ot_fm."""
    config = RunConfig.load(run / "config.yaml")
    transport = config.transport.build()
    if transport.name != "ot_fm" or (transport.T_min, transport.T_max) != (0, 1):
        raise ValueError(
            f"{run} must be of transport ot_fm with times from 0 to 1, as the scheduler of a "
            f"pipeline, got {transport.name} from {transport.T_min:g} to {transport.T_max:g}: "
            "use tim.sample"
        )
    return config
