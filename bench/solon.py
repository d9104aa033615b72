"""Solon's code beside the cyclic code: encoding and decoding, and a step's exchange over a slow link.

    python bench/solon.py [--d 8000000] [--rounds 9]

Times are medians, relative to one read of what the cyclic decoder reads (`messages.sum()`), measured side by side. The
slow link is modelled (`draco_ext.cli.network_model`, through one server): its time is that of the bytes on the server's
link, of the latency, and of the times measured here, without overlap.
"""

import argparse
import functools

import torch

import draco_ext
from draco_ext.cli.bench.timing import Clock, compare
from draco_ext.cli.network_model import Network, buckets, traffic

CASES = [(15, 3, 1), (15, 3, 2), (15, 3, 4), (45, 5, 1), (45, 5, 4), (64, 5, 1), (64, 5, 8)]  # n, s, k


def honest(code, d, generator):
    """Messages of random gradients of `d` elements, the same in every 1000 columns: encoding all would take long."""
    weights = torch.from_numpy(code.weights.reshape(code.workers, -1).copy())
    pattern = weights @ torch.randn(weights.size(1), 500, dtype=torch.complex128, generator=generator)
    rows = torch.view_as_real(pattern).flatten(1).float()
    length = code.message_length(d)
    return rows.repeat(1, -(-length // 1000))[:, :length].contiguous()


def measure(n, s, k, d, rounds):
    """Print one row of the table."""
    generator = torch.Generator().manual_seed(0)
    code = draco_ext.SolonCode(n, s, k) if k > 1 else draco_ext.CyclicCode(n, s)
    messages = honest(code, d, generator)
    attacked = messages.clone()
    attacked[:s] *= -100
    out = torch.empty(k * messages.size(1))
    gradients = torch.randn(code.redundancy, d // 8, generator=generator)
    weights = code.locate(*code.project(messages, 1), messages.size(1), dtype=torch.float32)[0]
    decode = functools.partial(draco_ext.decode, code=code, out=out)
    assert not decode(messages).suspects.any()
    assert decode(attacked).suspects[:s].all()
    calls = {
        "combine": lambda: code.combine(messages, weights, out=out),
        "clean": lambda: decode(messages),
        "attacked": lambda: decode(attacked),
        "encode": lambda: code.encode(0, gradients),
    }
    clock = Clock("cpu")
    found = {name: compare(clock, call, messages.sum, rounds) for name, call in calls.items()}
    encode = 8 * found["encode"].seconds  # of all d columns
    lengths, cells = buckets(d, 4), []
    for bandwidth in (12.5e6, 125e6):  # bytes per second: 100 Mbit/s, 1 Gbit/s
        network = Network(latency=20e-3, bandwidth=bandwidth, memory=float("inf"))
        each = traffic(code, "server", lengths, 4)
        cells.append(each.seconds(network) + found["clean"].seconds + encode)
    size = 4e-6 * messages.size(1)
    print(
        f"| {n}, {s}, {k} | {code.redundancy} | {size:.3g} MB | {encode * 1e3:.0f} ms "
        f"| {found['combine'].ratio:.2f} | {found['clean'].ratio:.2f} "
        f"| {found['attacked'].ratio:.2f} "
        f"| {found['clean'].seconds * 1e3:.0f} ms | {cells[0]:.1f} s | {cells[1]:.2f} s |"
    )


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d", type=int, default=8_000_000, help="elements of a gradient")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    print("| n, s, k | r | message | encode | combine | decode | with s liars | decode | 100 Mbit/s | 1 Gbit/s |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for case in CASES:
        measure(*case, options.d, options.rounds)


if __name__ == "__main__":
    main()
