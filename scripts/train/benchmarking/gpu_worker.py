"""Measures training steps of one MPT variant on one device and prints one line of JSON; ``gpu.py`` runs it once per variant.

Needs torch and transformers only (no Composer), so that it runs where the training stack is hard to install. A process per variant keeps peak
memory, compilation caches and out-of-memory errors of one variant away from the next.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from typing import Any, Callable

import torch
from measure import VOCAB_SIZE, model_config, peak_bf16_flops, peak_rss_bytes, step_flops

OUT_OF_MEMORY_RC = 3


def parse() -> argparse.Namespace:
    """Arguments of one variant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--size', required=True)
    parser.add_argument('--device', default='cuda')
    parser.add_argument('--seq_len', type=int, default=2048)
    parser.add_argument('--microbatch', type=int, required=True)
    parser.add_argument('--accum', type=int, default=4, help='microbatches per optimiser step')
    parser.add_argument('--steps', type=int, default=5)
    parser.add_argument('--attn', choices=('sdpa', 'flash-attn'), default='sdpa')
    parser.add_argument('--loss', choices=('fused', 'liger', 'torch'), default='fused')
    parser.add_argument('--compile', type=int, default=0)
    parser.add_argument('--optimizer', type=int, default=1, help='0: forward and backward only')
    return parser.parse_args()


def loss_function(name: str) -> Callable[..., Any]:
    """Our chunked loss, the same through Liger's kernel, or torch's with all logits."""
    from llmfoundry.models import losses

    if name == 'torch':
        return losses.torch_linear_cross_entropy
    if name == 'fused':
        losses._liger_function = lambda: None  # the chunked one even where Liger is installed
    return losses.fused_linear_cross_entropy


def build(args: argparse.Namespace) -> Any:
    """The model on its device, its blocks compiled if asked for."""
    from llmfoundry.models.mpt.configuration_mpt import MPTConfig
    from llmfoundry.models.mpt.modeling_mpt import MPTForCausalLM

    config = model_config(args.size, args.seq_len, 'flash' if args.attn == 'flash-attn' else 'torch')
    torch.manual_seed(0)
    model = MPTForCausalLM(MPTConfig(**config, init_device=args.device)).to(args.device).train()
    if args.compile:
        for block in model.transformer.blocks:
            block.compile()  # block by block: one compilation serves all layers
    return model


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Builds, warms up, times."""
    device = torch.device(args.device)
    model, loss_fn = build(args), loss_function(args.loss)
    n_params = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == 'cuda') if args.optimizer else None
    input_ids = torch.randint(0, VOCAB_SIZE, (args.microbatch, args.seq_len), device=device)

    def step() -> float:
        for _ in range(args.accum):
            with torch.autocast(device.type, torch.bfloat16):
                loss = model(input_ids=input_ids, labels=input_ids, loss_fn=loss_fn).loss.mean()
            (loss / args.accum).backward()
        if optimizer is not None:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        return float(loss.detach())

    def synchronize() -> None:
        if device.type == 'cuda':
            torch.cuda.synchronize()

    losses = [step() for _ in range(2)]
    seconds = []
    for _ in range(args.steps):
        synchronize()
        start = time.perf_counter()
        losses.append(step())
        synchronize()
        seconds.append(time.perf_counter() - start)
    tokens = args.microbatch * args.accum * args.seq_len
    median = sorted(seconds)[len(seconds) // 2]
    flops_per_s = step_flops(n_params, args.size, args.microbatch * args.accum, args.seq_len) / median
    name = torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'
    peak = peak_bf16_flops(name)
    return {
        'device': name, 'torch': torch.__version__, 'n_params': n_params, 'tokens_per_s': tokens / median, 'flops_per_s': flops_per_s,
        'mfu': None if peak is None else flops_per_s / peak, 'peak_bytes': torch.cuda.max_memory_allocated() if device.type == 'cuda' else peak_rss_bytes(),
        'first_loss': losses[0], 'last_loss': losses[-1], 'seconds_per_step': median,
    }


def main() -> None:
    """Prints the figures, or exits with ``OUT_OF_MEMORY_RC``."""
    args = parse()
    for package, wanted in (('flash_attn', args.attn == 'flash-attn'), ('liger_kernel', args.loss == 'liger')):
        if wanted and importlib.util.find_spec(package) is None:
            raise SystemExit(f'{package} is not installed')
    try:
        print(json.dumps(run(args)))
    except torch.OutOfMemoryError as e:
        print(e)
        raise SystemExit(OUT_OF_MEMORY_RC) from e


if __name__ == '__main__':
    main()
