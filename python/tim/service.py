"""Sampling as a service: requests of mixed conditions, sizes and settings, in as few calls as fit.

A picture is a function of its own request: its noise comes from its own seed, a caption is padded
to a length of its own, and what else is asked for at the same time changes nothing but the rounding
of matrix products.
"""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tim._checks import check_number
from tim.config import RunConfig
from tim.graphs import check_device
from tim.models import TiM, load
from tim.models.loading import pipeline_index, release_at
from tim.sampler import sample
from tim.schedule import resolution_shift
from tim.text import TextEncoder
from tim.transports import FlowMatching, Transport


@dataclass(frozen=True, eq=False)
class Request:
    """A picture to sample. None: as the `Sampler` has it."""

    y: int | str | Tensor
    """A class; for a text model a prompt, or features [M, K] of one."""
    seed: int | torch.Generator | None = None
    """Of the noise; None draws one. A generator goes on from where it is."""
    steps: int | None = None
    """Calls of the network."""
    size: tuple[int, int] | None = None
    """Height and width of the latents; by default the input_size of the network, a square."""
    cfg_scale: float | None = None
    """Guidance scale, 1 for none."""
    negative: str | Tensor | None = None
    """What guidance leads away from: a prompt, or features of the shape of y. By default the null
    label or the empty prompt."""


class Sampler:
    """A network that answers lists of requests.

    images = sampler([Request(207, seed=1), Request(88, seed=2, steps=8, cfg_scale=1.5)])

    Requests of one number of steps, one size, one length of caption and all guided or all not share
    calls of the network, `max_batch` at most. With `compile` or `cuda_graph` a call has 1, 2, 4, 8,
    ... images, filled up with copies, so that a few shapes do for any number of requests. Calls
    from several threads wait for one another.

    Args:
        model: the network.
        transport: that it was trained with.
        text_encoder: of the prompts of a text model.
        dtype: of the weights of the network; where it differs from the model's a copy is made. The
            state between steps is float64 in any case.
        compile: the network through torch.compile, anew for each shape: tens of seconds at the
            first call.
        cuda_graph: launch a step as one CUDA graph, on a GPU. The first three steps of a shape run
            as usual, the next is recorded.
        max_batch: most images in a call.
        tokens: pad all prompts to so many tokens; one shape for `compile` and `cuda_graph`. None:
            each to its own length. It changes pictures: networks read padding, too.
        steps, cfg_scale: of requests that do not tell.
        cfg_interval: as for `tim.sample`.
        stochasticity: as for `tim.sample`; the fresh noise comes from the request's seed as well.
        shift_base: latents' height times width at 1024 x 1024, where the network was trained with
            shifted times (`tim.schedule`).

    Raises:
        TypeError, ValueError: an argument is of the wrong type or range, or does not fit.
    """

    def __init__(
        self,
        model: TiM,
        transport: Transport,
        *,
        text_encoder: TextEncoder | None = None,
        dtype: torch.dtype | None = None,
        compile: bool = False,
        cuda_graph: bool = False,
        max_batch: int = 16,
        tokens: int | None = None,
        steps: int = 4,
        cfg_scale: float = 1.0,
        cfg_interval: tuple[float, float] = (0.0, 1.0),
        stochasticity: float = 0.0,
        shift_base: int | None = None,
    ) -> None:
        if not isinstance(model, TiM):
            raise TypeError(f"model must be a tim.TiM, got {type(model).__name__}")
        if not isinstance(transport, Transport):
            raise TypeError(f"transport must be a Transport, got {type(transport).__name__}")
        if isinstance(max_batch, bool) or not isinstance(max_batch, int) or max_batch < 1:
            raise ValueError(f"max_batch must be a whole number from 1, got {max_batch!r}")
        config = model.config
        if text_encoder is not None and text_encoder.features != config.cap_feat_dim:
            raise ValueError(
                f"text_encoder must give features of width {config.cap_feat_dim}, what the "
                f"network reads, got {text_encoder.features}"
            )
        weight = model.x_embedder.proj.weight
        if cuda_graph:
            check_device(weight.device, "cuda_graph")
        if dtype not in (None, weight.dtype):
            model = copy.deepcopy(model).to(dtype)
        self.model, self.transport, self.text_encoder = model.eval(), transport, text_encoder
        self.network = torch.compile(model, dynamic=False) if compile else model
        self.cuda_graph, self.few_shapes = cuda_graph, compile or cuda_graph
        self.max_batch, self.tokens, self.shift_base = max_batch, tokens, shift_base
        self.steps, self.cfg_scale = steps, cfg_scale
        self.cfg_interval, self.stochasticity = cfg_interval, stochasticity
        self._lock = threading.Lock()

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        preset: str | None = None,
        text_encoder: str | TextEncoder | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        **options: object,
    ) -> Sampler:
        """A sampler around the network that `tim.load` finds in `source`.

        A run brings its transport, its shift of the times and the text encoder, guidance and
        interval of its samples; a saved pipeline shift and text encoder; released weights their
        text encoder. Any other is of ot_fm.

        Args:
            text_encoder: a folder or hub id of transformers, or the encoder itself.
            options: as for `Sampler`.

        Raises:
            as `tim.load`; ValueError for an option that does not fit.
        """
        known: dict[str, object] = {}
        transport: Transport = FlowMatching()
        encoder = text_encoder
        text: dict[str, object] = {}
        if (Path(source) / "config.yaml").is_file():
            run = RunConfig.load(Path(source) / "config.yaml")
            transport = run.transport.build()
            encoder = encoder or run.data.text_encoder
            text = {"max_tokens": run.data.max_tokens, "escape": run.data.escape}
            known = {
                "shift_base": run.objective.shift_base,
                "cfg_scale": run.sample.cfg_scale,
                "cfg_interval": run.sample.cfg_interval,
            }
        elif (index := pipeline_index(source)) is not None:
            saved = json.loads(index.read_text())
            known = {"shift_base": saved.get("shift_base")}
            text = {name: saved[name] for name in ("max_tokens", "escape") if name in saved}
            encoder = encoder or str(source)
        elif encoder is None:
            release = release_at(source, preset)
            encoder = release and release.text_encoder
        model = load(source, preset=preset, device=device, dtype=dtype)
        if model.config.num_classes is not None:
            encoder = None
        if isinstance(encoder, str):
            encoder = TextEncoder.load(encoder, device=device, dtype=dtype or torch.float32, **text)
        return cls(model, transport, text_encoder=encoder, **{**known, **options})

    @property
    def device(self) -> torch.device:
        return self.model.x_embedder.proj.weight.device

    def __call__(self, requests: Iterable[Request]) -> list[Tensor]:
        """The last states [C, H, W] of the requests, in their order, float32 on the device.

        Raises:
            TypeError, ValueError: a request does not fit (names it), before any work is done.
        """
        requests = [self._complete(i, request) for i, request in enumerate(requests)]
        groups: dict[tuple, list[int]] = {}
        for i, request in enumerate(requests):
            key = (request.steps, request.size, request.cfg_scale > 1, self._length(request))
            groups.setdefault(key, []).append(i)
        results: list[Tensor | None] = [None] * len(requests)
        with self._lock, torch.no_grad():
            # All noise first: a generator that several requests share is read in their order.
            noise = [self._noise(request) for request in requests]
            for (*_, guided, length), members in groups.items():
                for start in range(0, len(members), self.max_batch):
                    part = members[start : start + self.max_batch]
                    images = self._sample(
                        [requests[i] for i in part], [noise[i] for i in part], guided, length
                    )
                    for i, image in zip(part, images, strict=False):
                        results[i] = image
        return results

    def _sample(
        self, requests: Sequence[Request], noise: Sequence[Tensor], guided: bool, length: int | None
    ) -> Tensor:
        """States [at least B, C, H, W] of requests that fit in one batch."""
        rows = list(range(len(requests)))
        if self.few_shapes:
            full = min(1 << (len(rows) - 1).bit_length(), self.max_batch)
            rows += [rows[-1]] * (full - len(rows))
        y, null = self._conditions(requests, guided, length)
        index = torch.tensor(rows, device=y.device)
        first, steps = requests[0], requests[0].steps
        z = torch.stack([noise[i] for i in rows]).to(self.device)
        fresh = None
        if z.shape[1] > 1:
            fresh = z[:, 1:].transpose(0, 1)
        schedule: dict[str, object] = {}
        if self.shift_base is not None:
            shift = resolution_shift(first.size[0] * first.size[1], self.shift_base)
            schedule = {"schedule": "shifted", "shift": shift}
        return sample(
            self.network, y[index], z[:, 0], steps,
            transport=self.transport,
            cfg_scale=[float(requests[i].cfg_scale) for i in rows] if guided else 1.0,
            cfg_interval=self.cfg_interval,
            null=null[index] if guided else None,
            stochasticity=self.stochasticity if fresh is not None else 0.0,
            step_noise=fresh,
            cuda_graph=self.cuda_graph,
            **schedule,
        )  # fmt: skip

    def _noise(self, request: Request) -> Tensor:
        """[1 + n, C, H, W] on the CPU: the first state's, and that of n stochastic steps."""
        generator = request.seed
        if not isinstance(generator, torch.Generator):
            seed = torch.randint(2**62, ()).item() if generator is None else generator
            generator = torch.Generator().manual_seed(seed)
        count = 1 + (max(request.steps - 2, 0) if self.stochasticity > 0 else 0)
        shape = (count, self.model.config.in_channels, *request.size)
        return torch.randn(shape, generator=generator, device=generator.device).cpu()

    def _conditions(
        self, requests: Sequence[Request], guided: bool, length: int | None
    ) -> tuple[Tensor, Tensor | None]:
        """Conditions of requests of one length, and what guidance leads away from."""
        if length is None:
            y = torch.tensor([request.y for request in requests], device=self.device)
            return y, torch.full_like(y, self.model.config.num_classes)
        wanted = [request.y for request in requests]
        if guided:
            wanted += [request.negative for request in requests]
        prompts = list(dict.fromkeys(value for value in wanted if isinstance(value, str)))
        encoded: dict[str, Tensor] = {}
        if prompts:
            features = self.text_encoder(prompts, tokens=length).to(self.device)
            encoded = dict(zip(prompts, features, strict=True))
        dtype = self.model.x_embedder.proj.weight.dtype
        rows = [encoded[v] if isinstance(v, str) else v.to(self.device) for v in wanted]
        stacked = torch.stack([row.to(dtype) for row in rows])
        return stacked[: len(requests)], stacked[len(requests) :] if guided else None

    def _length(self, request: Request) -> int | None:
        """Tokens of the caption, as many as those of what guidance leads away from."""
        if self.model.config.num_classes is not None:
            return None
        if isinstance(request.y, Tensor):
            return len(request.y)
        texts = [request.y, request.negative][: 2 if request.cfg_scale > 1 else 1]
        longest = self.text_encoder.longest(texts)
        if self.tokens is not None and longest > self.tokens:
            raise ValueError(
                f"prompts must have at most tokens = {self.tokens}, got {longest}: {texts[0]!r:.60}"
            )
        return self.tokens or longest

    def _complete(self, i: int, request: Request) -> Request:
        """The request with all it leaves to the sampler. Raises TypeError or ValueError."""
        if not isinstance(request, Request):
            raise TypeError(f"requests[{i}] must be a Request, got {type(request).__name__}")
        config, what = self.model.config, f"requests[{i}]"
        steps = self.steps if request.steps is None else request.steps
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"{what}.steps must be a whole number from 1, got {steps!r}")
        scale = self.cfg_scale if request.cfg_scale is None else request.cfg_scale
        check_number(f"{what}.cfg_scale", scale)
        if not scale >= 1:
            raise ValueError(f"{what}.cfg_scale must be at least 1 (no guidance), got {scale}")
        seed = request.seed
        if isinstance(seed, bool) or not isinstance(seed, (int, torch.Generator, type(None))):
            raise TypeError(f"{what}.seed must be a whole number or a generator, got {seed!r}")
        size = request.size or (config.input_size, config.input_size)
        patch = config.patch_size
        sides = isinstance(size, (tuple, list)) and len(size) == 2
        if not sides or any(not isinstance(n, int) or n < 1 or n % patch for n in size):
            raise ValueError(
                f"{what}.size must be height and width of the latents, multiples of {patch}, "
                f"got {size}"
            )
        y, negative = self._checked_conditions(what, request, scale > 1)
        return Request(y, seed, steps, tuple(size), float(scale), negative)

    def _checked_conditions(
        self, what: str, request: Request, guided: bool
    ) -> tuple[int | str | Tensor, str | Tensor | None]:
        y, negative, config = request.y, request.negative, self.model.config
        if config.num_classes is not None:
            label = y.item() if isinstance(y, Tensor) and y.dim() == 0 else y
            if isinstance(label, bool) or not isinstance(label, int):
                raise TypeError(f"{what}.y must be a class, a whole number, got {y!r:.60}")
            if not 0 <= label < config.num_classes:
                raise ValueError(f"{what}.y must be in 0 .. {config.num_classes - 1}, got {label}")
            if negative is not None:
                raise ValueError(f"{what}.negative is for text models, got a class model")
            return label, None
        if isinstance(y, str):
            if self.text_encoder is None:
                raise ValueError(f"{what}.y is a prompt: the sampler needs a text_encoder")
            negative = "" if negative is None else negative
            if not isinstance(negative, str):
                raise TypeError(f"{what}.negative must be a prompt, as y is, got a tensor")
            return y, negative
        if not isinstance(y, Tensor) or y.dim() != 2 or y.shape[1] != config.cap_feat_dim:
            got = str(list(y.shape)) if isinstance(y, Tensor) else repr(y)
            raise TypeError(
                f"{what}.y must be a prompt or features [M, {config.cap_feat_dim}], got {got:.60}"
            )
        if guided and not (isinstance(negative, Tensor) and negative.shape == y.shape):
            raise ValueError(
                f"{what}.negative must be features {list(y.shape)} like y where cfg_scale > 1"
            )
        return y, negative
