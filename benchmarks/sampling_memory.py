"""Memory and time of one sampling step on images of any size, each in a process of its own.

python benchmarks/sampling_memory.py [--network NAME] [--depth N] [--pixels 512,1024,...]
    [--dtype NAME] [--steps N] [--threads N] [--json FILE]

Weights are random and pictures are not decoded. On a CPU memory is the growth of the process's
largest resident set from the loaded weights to the end of the step; on a GPU that of the caching
allocator. It holds what sampling needs beside the weights, which are counted apart.
Blocks run one after the other in the same memory, so with `--depth` a machine that is too slow for
the whole network can measure it on the first blocks. Where a machine does other work too, the time
that a single thread (`--threads 1`) was at work says more than the clock.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

import tim
from tim.models import TiM
from tim.models.sizes import ARCHITECTURES

#: Pixels of the side of a latent position.
FACTORS = {4: 8, 32: 32}


def measure(
    network: str, depth: int | None, pixels: int, dtype: torch.dtype, steps: int
) -> dict[str, object]:
    config = ARCHITECTURES[network]
    depth = depth or config.depth
    config = dataclasses.replace(
        config, depth=depth, encoder_depth=min(depth, config.encoder_depth)
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    with torch.device("meta"):
        model = TiM(config)
    # Made in place: an initialisation in float32 would be the largest that there is.
    model = model.to(dtype).to_empty(device=device).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    side = pixels // FACTORS[config.in_channels]
    noise = torch.randn(1, config.in_channels, side, side, dtype=dtype, device=device)
    if config.num_classes is None:
        y = torch.randn(1, 256, config.cap_feat_dim, dtype=dtype, device=device)
    else:
        y = torch.ones(1, dtype=torch.long, device=device)
    transport = tim.transports.get("ot_fm")
    tim.sample(model, y, noise[..., :4, :4], steps=1, transport=transport)  # loads what it loads
    before, start, worked = peak(device), time.perf_counter(), time.process_time()
    out = tim.sample(model, y, noise, steps=steps, transport=transport)
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert out.isfinite().all() and out.shape == noise.shape
    return {
        "network": network,
        "depth": depth,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "pixels": pixels,
        "tokens": (side // config.patch_size) ** 2,
        "steps": steps,
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - worked,
        "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
        "memory": peak(device) - before,
    }


def peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--network", choices=ARCHITECTURES, default="tim-xl1-512")
    parser.add_argument("--depth", type=int)
    parser.add_argument("--pixels", default="512,1024,2048,4096")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sizes = [int(size) for size in options.pixels.split(",")]
    if options.one:
        dtype = getattr(torch, options.dtype)
        print(json.dumps(measure(options.network, options.depth, sizes[0], dtype, options.steps)))
        return 0
    rows = []
    for size in sizes:
        arguments = [f"--network={options.network}", f"--pixels={size}", f"--dtype={options.dtype}",
                     f"--steps={options.steps}", f"--threads={options.threads}"]  # fmt: skip
        if options.depth:
            arguments.append(f"--depth={options.depth}")
        command = [sys.executable, __file__, "--one", *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(row := json.loads(done.stdout))
        print(
            f"{row['network']}, depth {row['depth']}, {row['dtype']}, "
            f"{size} x {size}: {row['tokens']} tokens, "
            f"{row['seconds']:.1f} s ({row['cpu_seconds']:.1f} s of all threads), "
            f"{row['memory'] / 2**20:.0f} MiB beside "
            f"{row['weights'] / 2**20:.0f} MiB of weights",
            flush=True,
        )
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
