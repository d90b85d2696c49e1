"""Times flash-linear-attention's operators, for `experiments.bench_gpu`.

    python -m tests.parity.fla_operator --batch 4 --tokens 8192 --heads 16 --head-dim 128

Needs torch with CUDA and `pip install flash-linear-attention`. The last line of stdout is a JSON
object: seconds by name of the part of `bench_gpu` that does the same, or why there are none.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable


def reason_to_skip() -> str | None:
    try:
        import fla
        import torch
    except ImportError as error:
        return f"flash-linear-attention and torch are needed: {error}"
    del fla
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def prepare(
    arguments: argparse.Namespace, householder: int, *, gated: bool, grad: bool
) -> Callable[[], None]:
    """What does one forward pass, or it and all gradients; run once for Triton to choose."""
    import torch
    from fla.ops.delta_rule import chunk_delta_rule
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
    q, k, v, log_decay, beta = (x.detach().requires_grad_(grad) for x in (q, k, v, log_decay, beta))
    inputs = (q, k, v, log_decay, beta) if gated else (q, k, v, beta)

    def run() -> None:
        if householder > 1:
            out, _ = chunk_gated_delta_product(
                q,
                k,
                v,
                log_decay if gated else None,
                beta,
                num_householder=householder,
                scale=1.0,
            )
        elif gated:
            out, _ = chunk_gated_delta_rule(*inputs, scale=1.0)
        else:
            out, _ = chunk_delta_rule(*inputs, scale=1.0)
        if grad:
            torch.autograd.grad(out.float().sum(), inputs)
        torch.cuda.synchronize()

    run()
    return run


def measure(run: Callable[[], None], repeats: int) -> tuple[float, float]:
    """Median seconds, and peak GB."""
    import torch

    run()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
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
        # Such as gradients that some releases of Triton compile wrongly on Hopper.
        "refused": {},
    }
    for householder, gated, grad in itertools.product((1, 2), (True, False), (False, True)):
        if not (gated or grad):
            continue
        name = f"op-n{householder}{'' if gated else '-ungated'}{'-grad' if grad else ''}"
        try:
            run = prepare(arguments, householder, gated=gated, grad=grad)
            seconds, peak = measure(run, arguments.repeats)
            result["median_s"][name], result["peak_gb"][name] = seconds, peak
        except RuntimeError as error:
            result["refused"][name] = f"{type(error).__name__}: {error}"
        # Whoever stops it early keeps what there is.
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
