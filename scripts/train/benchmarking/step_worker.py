"""Measures forward and backward passes of an MPT model on the CPU, in whatever interpreter runs it; prints one line of JSON.

Uses only what ours and the public release share: ``llmfoundry.ComposerMPTCausalLM``, called as a trainer calls it. One process measures one
precision, so that peak memory belongs to it alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time

from measure import VOCAB_SIZE, matmul_rate, model_config, peak_rss_bytes, step_flops


def main() -> None:
    """Builds the model, runs the steps with products for the yardstick between them, prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--size', default='125m')
    parser.add_argument('--batch_size', type=int, default=2)
    parser.add_argument('--seq_len', type=int, default=1024)
    parser.add_argument('--steps', type=int, default=3)
    parser.add_argument('--precision', choices=('fp32', 'amp_bf16'), default='fp32')
    parser.add_argument('--attn_impl', default='torch')
    parser.add_argument('--loss_fn', default='torch_crossentropy')
    args = parser.parse_args()

    import torch

    torch.manual_seed(0)
    import_rss = peak_rss_bytes()
    from llmfoundry import ComposerMPTCausalLM

    model = ComposerMPTCausalLM(tokenizer=None, loss_fn=args.loss_fn, init_device='cpu', **model_config(args.size, args.seq_len, args.attn_impl))
    model.train()
    n_params = sum(p.numel() for p in model.parameters())
    start_rss = peak_rss_bytes()
    input_ids = torch.randint(0, VOCAB_SIZE, (args.batch_size, args.seq_len))
    batch = {'input_ids': input_ids, 'labels': input_ids.clone(), 'attention_mask': torch.ones_like(input_ids, dtype=torch.bool)}
    autocast = torch.autocast('cpu', torch.bfloat16) if args.precision == 'amp_bf16' else contextlib.nullcontext()

    def step() -> float:
        model.zero_grad(set_to_none=True)
        with autocast:
            loss = model.loss(model(batch), batch)
        loss.backward()
        return float(loss.detach())

    loss = step()
    seconds, rates = [], [matmul_rate(args.size, input_ids.numel())]
    for _ in range(args.steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
        rates.append(matmul_rate(args.size, input_ids.numel()))
    flops = step_flops(n_params, args.size, args.batch_size, args.seq_len)
    tokens = input_ids.numel()
    print(json.dumps({
        'precision': args.precision, 'loss': loss, 'n_params': n_params, 'threads': torch.get_num_threads(), 'torch': torch.__version__,
        'tokens_per_s': tokens / min(seconds), 'tokens_per_s_median': tokens / sorted(seconds)[len(seconds) // 2],
        'matmul_flops_per_s': max(rates), 'fraction_of_matmul': flops / min(seconds) / max(rates),
        'peak_rss_bytes': peak_rss_bytes(), 'model_rss_bytes': start_rss, 'import_rss_bytes': import_rss,
    }))


if __name__ == '__main__':
    main()
