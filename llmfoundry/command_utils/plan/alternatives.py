"""What else would fit: each change of the config that is known to save memory, estimated by the same simulation, with what it costs."""

from __future__ import annotations

from dataclasses import dataclass

from llmfoundry.command_utils.plan.arithmetic import largest_microbatch
from llmfoundry.command_utils.plan.estimate import Estimate, Planner
from llmfoundry.config.train import TrainConfig
from llmfoundry.errors import ConfigError

__all__ = ['Alternative', 'find_alternatives', 'largest_that_fits', 'ranked']

# Values that an optimizer keeps per weight, of those that keep less than Adam's two.
LESS_STATE = {'decoupled_lionw': 1, 'adalr_lion': 1, 'clip_lion': 1, 'no_op': 0}
LORA = ('model.peft_config.peft_type=LORA', 'model.peft_config.task_type=CAUSAL_LM', 'model.peft_config.r=16', 'model.peft_config.target_modules=all-linear')


@dataclass(frozen=True)
class Alternative:
    """One change of the config.

    Attributes:
        change: what to write.
        total: bytes of one rank with it.
        cost: what is paid.
        rank: cheaper changes have lower numbers.
    """

    change: str
    total: int
    cost: str
    rank: int


def ranked(alternatives: list[Alternative], memory: int) -> list[Alternative]:
    """Those that fit first, cheap ones before dear ones; the rest by size."""
    return sorted(alternatives, key=lambda a: (a.total > memory, a.rank if a.total <= memory else 0, a.total))


def largest_that_fits(planner: Planner, current: Estimate, memory: int) -> tuple[int, int]:
    """(largest microbatch that fits into ``memory``, bytes that each sample adds), from two simulations."""
    size = planner.microbatch()
    other = size // 2 if size > 1 else 2
    totals = {size: current.total, other: planner.estimate(other).total}
    limit = max(int(planner.config.device_train_batch_size), 1)
    per_sample = abs(totals[size] - totals[other]) // abs(size - other)
    return largest_microbatch(totals, memory, limit), per_sample


def find_alternatives(planner: Planner, current: Estimate, per_sample: int) -> list[Alternative]:
    """Every change that saves memory here; those that the config refuses are left out."""
    config, size = planner.config, planner.microbatch()
    found = []
    for smaller in sorted({size // 2, 1} - {0, size}):
        found.append(Alternative(f'device_train_microbatch_size={smaller}', current.total - per_sample * (size - smaller), 'more passes per step; smaller matrix products', 1))
    for changes, cost, rank in _changes(config, planner.target.devices):
        try:
            total = planner.estimate(size, *changes).total
        except (ConfigError, ValueError, TypeError):
            continue
        found.append(Alternative(' '.join(changes), total, cost, rank))
    state = current.peak.division['optimizer']
    if state and config.optimizer['name'] not in LESS_STATE:
        found.append(Alternative('optimizer.name=decoupled_lionw (without eps)', current.total - state // 2, 'another optimizer: lr about a tenth, weight decay to match', 4))
    return [a for a in found if a.total < current.total]


def _changes(config: TrainConfig, devices: int) -> list[tuple[tuple[str, ...], str, int]]:
    fsdp = config.fsdp_config or {}
    strategy = str(fsdp.get('sharding_strategy') or 'FULL_SHARD').upper()
    changes: list[tuple[tuple[str, ...], str, int]] = []
    recompute = 'fsdp_config.activation_checkpointing=true'
    if not fsdp.get('activation_checkpointing'):
        changes.append(((recompute,), 'one more forward pass: about a third more compute', 3))
        if devices > 1 and not fsdp:
            changes[-1] = ((recompute, 'fsdp_config.sharding_strategy=NO_SHARD'), changes[-1][1], 3)
    if devices > 1 and (not fsdp or strategy != 'FULL_SHARD'):
        changes.append((('fsdp_config.sharding_strategy=FULL_SHARD',), 'weights are gathered twice per pass', 2))
        if not fsdp:
            changes.append((('fsdp_config.sharding_strategy=SHARD_GRAD_OP',), 'weights are gathered once per pass', 2))
            changes.append((('fsdp_config.sharding_strategy=FULL_SHARD', recompute), 'gathering and one more forward pass', 3))
    if config.precision == 'fp32':
        changes.append((('precision=amp_bf16',), 'products in bfloat16; slower on CPUs without its instructions', 2))
    if config.model['name'] == 'hf_causal_lm' and not config.model.get('peft_config'):
        changes.append((LORA, 'only an adapter is trained', 5))
    return changes
