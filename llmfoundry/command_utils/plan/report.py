"""The plan as text and as JSON."""

from __future__ import annotations

from typing import Any, Sequence

from llmfoundry.command_utils.plan.alternatives import Alternative
from llmfoundry.command_utils.plan.arithmetic import format_bytes
from llmfoundry.command_utils.plan.estimate import Estimate
from llmfoundry.command_utils.plan.fake_model import Target

__all__ = ['as_dict', 'as_text']

NAMES = {
    'parameter': 'parameters', 'gradient': 'gradients', 'optimizer': 'optimizer state', 'buffer': 'buffers of the model', 'communication': 'communication (buckets, gathered weights)',
    'activations': 'activations and temporaries',
}


def as_dict(estimate: Estimate, target: Target, memory: int, microbatch: int, largest: int, alternatives: Sequence[Alternative]) -> dict[str, Any]:
    """All figures, bytes per rank."""
    found = estimate.peak
    return {
        'device_type': target.device_type, 'devices': target.devices, 'device_memory_bytes': memory, 'microbatch': microbatch, 'at_peak_bytes': dict(found.division),
        'allocator_holes_bytes': estimate.holes, 'base_bytes': estimate.base, 'total_bytes': estimate.total, 'peak_phase': found.phase,
        'activations_kept_bytes': found.activations_kept, 'loss_bytes': found.loss_bytes, 'fits': estimate.total <= memory, 'largest_microbatch': largest,
        'alternatives': [{'change': a.change, 'total_bytes': a.total, 'fits': a.total <= memory, 'cost': a.cost} for a in alternatives],
    }  # fmt: skip


def as_text(plan: dict[str, Any], title: str) -> str:
    """One table, the verdict, the alternatives."""
    where = 'resident memory of a CPU process' if plan['device_type'] == 'cpu' else 'GPU memory (terms of CUDA are unmeasured)'
    lines = [f'{title}: {plan["devices"]} x {plan["device_type"]}, microbatch {plan["microbatch"]}; {where}, per rank, at the peak ({plan["peak_phase"]})', '']
    rows = [(NAMES[kind], size) for kind, size in plan['at_peak_bytes'].items()]
    rows += [('holes of the allocator', plan['allocator_holes_bytes']), ('process: libraries, kernels, data' if plan['device_type'] == 'cpu' else 'CUDA context, communicators', plan['base_bytes'])]
    rows += [('total', plan['total_bytes'])]
    lines += [f'  {name:44}{format_bytes(size):>10}' for name, size in rows if size]
    lines += [
        '', f'  of the activations, kept for the backward pass: {format_bytes(plan["activations_kept_bytes"])}; added by logits and loss: {format_bytes(plan["loss_bytes"])}', '',
        f'{"FITS" if plan["fits"] else "DOES NOT FIT"}: {format_bytes(plan["total_bytes"])} of {format_bytes(plan["device_memory_bytes"])}. '
        + (f'Largest microbatch that fits: {plan["largest_microbatch"]}.' if plan['largest_microbatch'] else 'No microbatch fits.'),
    ]  # fmt: skip
    if plan['alternatives']:
        lines += ['', 'Alternatives:']
        lines += [f'  {"fits" if a["fits"] else "    "} {format_bytes(a["total_bytes"]):>9}  {a["change"]}  ({a["cost"]})' for a in plan['alternatives']]
    return '\n'.join(lines)
