"""The Hugging Face mixin, or a stand-in where its packages are missing."""

from typing import Any

try:
    import safetensors  # noqa: F401
    from huggingface_hub import PyTorchModelHubMixin as HubMixin
except ImportError as error:
    _MISSING = error.name

    class HubMixin:
        """Says which package is missing, once it is needed: benchmarks run without any."""

        def __init_subclass__(cls, **_: Any) -> None:
            super().__init_subclass__()

        @classmethod
        def from_pretrained(cls, *_: Any, **__: Any) -> Any:
            raise ImportError(f"from_pretrained needs the package {_MISSING}, which is missing")

        def save_pretrained(self, *_: Any, **__: Any) -> None:
            raise ImportError(f"save_pretrained needs the package {_MISSING}, which is missing")

        def push_to_hub(self, *_: Any, **__: Any) -> None:
            raise ImportError(f"push_to_hub needs the package {_MISSING}, which is missing")


__all__ = ["HubMixin"]
