"""Memory of attention's tangent and backward pass for long sequences, as a process uses it.

    python benchmarks/attention_memory.py [--tokens 4096,16384,65536] [--json FILE]

One head of width 64 in float32 on two threads of a CPU. Each line is a process of its own: how much
its resident set grows at most, beyond the operands, in one call of `torch.func.jvp` and in one more
of the backward pass; seconds of the first; and the error of some rows against float64. `tim` is
`tim.ops.attention`, `plain` the formula that stores its scores, left out above 16384 tokens.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from attention_peers import plain
from torch import Tensor

from tim import ops
from tim.bench import machine
from tim.bench.problem import relative_error

WAYS = {"tim": ops.attention, "plain": plain}
LONGEST_PLAIN = 16384
HEAD_DIM = 64


def resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(way: str, tokens: int) -> dict[str, object]:
    """One line, in this process."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    function = WAYS[way]
    operands = [torch.randn(1, tokens, 1, HEAD_DIM) for _ in range(6)]

    def tangent(operands: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(function, tuple(operands[:3]), tuple(operands[3:]))

    def backward(operands: Sequence[Tensor]) -> None:
        leaves = [x.detach().requires_grad_() for x in operands[:3]]
        function(*leaves).backward(operands[3])

    few = [x[:, :64] for x in operands]
    tangent(few)
    backward(few)
    before, start = resident(), time.perf_counter()
    results = tangent(operands)
    seconds, grown = time.perf_counter() - start, resident() - before
    rows = torch.linspace(0, tokens - 1, 16).long()
    chosen = [x[:, rows] for x in results]
    del results
    backward(operands)
    both = resident() - before
    wide = [x.double() for x in operands]
    wide[0], wide[3] = wide[0][:, rows], wide[3][:, rows]
    exact = torch.func.jvp(ops.attention_reference, tuple(wide[:3]), tuple(wide[3:]))
    return {
        "way": way, "tokens": tokens, "seconds": seconds, "tangent_bytes": grown,
        "with_backward_bytes": both, "error": relative_error(chosen, exact),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="4096,16384,65536", help="lengths, with commas")
    parser.add_argument("--json", help="write the lines there")
    parser.add_argument("--one", nargs=2, metavar=("WAY", "TOKENS"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(measure(options.one[0], int(options.one[1]))))
        return
    lines = []
    for tokens in map(int, options.tokens.split(",")):
        for way in WAYS:
            if way == "plain" and tokens > LONGEST_PLAIN:
                continue
            command = [sys.executable, __file__, "--one", way, str(tokens)]
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            lines.append(json.loads(output.stdout))
            print(*(f"{key} {value:.4g}" if key != "way" else f"{value:5}"
                    for key, value in lines[-1].items()), flush=True)  # fmt: skip
    if options.json:
        result = {"machine": machine.describe(torch.device("cpu")), "lines": lines}
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
