"""Times flash-linear-attention's gated operators, for `experiments.bench_gpu`.

    python -m tests.parity.fla_operator --batch 4 --tokens 8192 --heads 16 --head-dim 128

Needs torch with CUDA and `pip install flash-linear-attention`. The last line of stdout is a JSON
object: seconds by name of the part of `bench_gpu` that does the same, or why there are none.
"""

import argparse
import json
import statistics
import time


def reason_to_skip() -> str | None:
    try:
        import fla
        import torch
    except ImportError as error:
        return f"flash-linear-attention and torch are needed: {error}"
    del fla
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def measure(arguments: argparse.Namespace, householder: int, grad: bool) -> tuple[float, float]:
    """Median seconds and peak GB of one forward pass, or of it and all gradients."""
    import torch
    from fla.ops.gated_delta_product import chunk_gated_delta_product
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from torch.nn.functional import logsigmoid, normalize

    batch, tokens, heads = arguments.batch, arguments.tokens, arguments.heads
    dtype = getattr(torch, arguments.dtype)

    def random(length: int, *size: int):
        return torch.randn(batch, length, heads, *size, device="cuda", dtype=dtype)

    # Householder steps lie one after the other on the axis of tokens.
    virtual = tokens * householder
    q = normalize(random(tokens, arguments.head_dim), dim=-1)
    k = normalize(random(virtual, arguments.head_dim), dim=-1)
    v, beta = random(virtual, arguments.head_dim), random(virtual).sigmoid()
    log_decay = logsigmoid(random(tokens).float() + 4)
    inputs = [x.detach().requires_grad_(grad) for x in (q, k, v, log_decay, beta)]

    def run() -> None:
        if householder == 1:
            out, _ = chunk_gated_delta_rule(*inputs, scale=1.0)
        else:
            out, _ = chunk_gated_delta_product(*inputs, num_householder=householder, scale=1.0)
        if grad:
            torch.autograd.grad(out.float().sum(), inputs)
        torch.cuda.synchronize()

    # Triton tries its settings in the first runs.
    for _ in range(3):
        run()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(arguments.repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), torch.cuda.max_memory_allocated() / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()
    if reason := reason_to_skip():
        print(json.dumps({"skipped": reason}))
        return
    import fla
    import torch

    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "fla": fla.__version__,
        "median_s": {},
        "peak_gb": {},
    }
    for householder in (1, 2):
        for suffix, grad in (("", False), ("-grad", True)):
            name = f"op-n{householder}{suffix}"
            seconds, peak = measure(arguments, householder, grad)
            result["median_s"][name], result["peak_gb"][name] = seconds, peak
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
