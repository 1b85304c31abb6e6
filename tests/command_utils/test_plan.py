"""``llmfoundry plan``: its arithmetic by hand, its invariants, and that it is light until it has to work."""

from __future__ import annotations

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmfoundry.command_utils.plan import arithmetic
from llmfoundry.command_utils.plan.storage_log import Event, EventLog
from llmfoundry.command_utils.threads import threads_per_process
from llmfoundry.errors import ConfigError
from tests.helpers.processes import run_in_process

BENCHMARKS = Path(__file__).resolve().parents[2] / 'scripts/train/benchmarking'
D, LAYERS, SEQ, VOCAB = 64, 2, 32, 50368
CONFIG = {
    'model': {'name': 'mpt_causal_lm', 'd_model': D, 'n_heads': 2, 'n_layers': LAYERS, 'expansion_ratio': 4, 'max_seq_len': SEQ, 'vocab_size': VOCAB, 'attn_config': {'attn_impl': 'torch'}},
    'tokenizer': {'name': 'llmfoundry://gpt2'},
    'train_loader': {'name': 'text', 'drop_last': True, 'num_workers': 0, 'dataset': {'local': 'nowhere', 'split': 'train', 'max_seq_len': SEQ, 'shuffle': True}},
    'optimizer': {'name': 'decoupled_adamw', 'lr': 1e-4}, 'scheduler': {'name': 'constant_with_warmup', 't_warmup': '0ba'}, 'max_duration': '3ba', 'max_seq_len': SEQ,
    'global_train_batch_size': 32, 'device_train_microbatch_size': 4, 'precision': 'fp32',
}  # fmt: skip
# MPT without biases removed: embedding, positions, and per block two norms, Wqkv, out_proj, up and down with biases; the last norm.
PARAMETERS = VOCAB * D + SEQ * D + LAYERS * (2 * 2 * D + 3 * D * D + 3 * D + D * D + D + 4 * D * D + 4 * D + 4 * D * D + D) + 2 * D


def planned(*overrides: str, devices: int = 1, device: str = 'cpu', config: dict | None = None) -> dict:
    from llmfoundry.command_utils.plan.command import make_plan
    from llmfoundry.command_utils.plan.fake_model import Target

    return make_plan(config or CONFIG, overrides, Target(device, devices), 10**12, alternatives=False)


@pytest.fixture(scope='module')
def one() -> dict:
    return planned()


def test_amounts_of_memory_are_read_and_written():
    assert [arithmetic.parse_bytes(text) for text in ('80GB', '24 GiB', '512m', '7')] == [80 * 10**9, 24 * 2**30, 512 * 10**6, 7]
    assert [arithmetic.format_bytes(size) for size in (1_390_000_000, 12, 45_600_000)] == ['1.39 GB', '12 B', '45.6 MB']
    for text in ('much', '0GB', '3 parsecs'):
        with pytest.raises(ValueError, match='80GB'):
            arithmetic.parse_bytes(text)


def test_the_peak_of_a_log_and_how_it_divides():
    events = [Event(0, 100), Event(1, 30), Event(2, 50), Event(2, 0), Event(3, 40), Event(1, 0)]
    log = EventLog(events, [(0, 'start'), (1, 'forward'), (2, 'loss'), (4, 'backward')], {0: 'parameter'})
    found = arithmetic.peak(log)
    assert (found.in_use, found.phase, found.activations_kept, found.loss_bytes) == (180, 'loss', 30, 50)
    assert found.division == {'parameter': 100, 'gradient': 0, 'optimizer': 0, 'buffer': 0, 'communication': 0, 'activations': 80}


def test_ddp_buckets_hold_every_gradient_once_and_are_closed_when_full():
    sizes = [3 * 2**20] * 40
    buckets = arithmetic.ddp_buckets(sizes)
    assert sum(buckets) == sum(sizes) and buckets[0] == 3 * 2**20 and buckets[1] == 27 * 2**20


@pytest.mark.parametrize(('budget', 'expected'), [(100, 0), (110, 1), (155, 5), (10_000, 16)])
def test_the_largest_microbatch_lies_on_the_line_through_two(budget, expected):
    assert arithmetic.largest_microbatch({2: 120, 4: 140}, budget, 16) == expected


def test_equal_layers_extrapolate_linearly():
    def at(layers: int) -> arithmetic.Peak:
        return arithmetic.Peak(7 * layers + 5, 'loss', {**dict.fromkeys(arithmetic.KINDS, 0), 'parameter': 7 * layers + 5}, 2 * layers, 9)

    assert arithmetic.extrapolate(at(4), at(6), (4, 6), 80) == at(80)


def test_cores_are_shared_among_processes():
    assert [threads_per_process(*pair) for pair in ((2, 2), (2, 1), (8, 3), (1, 4))] == [1, 2, 2, 1]


def test_parameters_gradients_and_adam_state_by_hand(one):
    assert one['at_peak_bytes']['parameter'] == 4 * PARAMETERS
    assert one['at_peak_bytes']['gradient'] == 4 * PARAMETERS
    assert 8 * PARAMETERS <= one['at_peak_bytes']['optimizer'] < 8.01 * PARAMETERS
    assert one['total_bytes'] == sum(one['at_peak_bytes'].values()) + one['base_bytes'] + one['allocator_holes_bytes']


def test_activations_grow_with_the_microbatch_and_shrink_with_recomputation(one):
    larger, recomputing = planned('device_train_microbatch_size=8'), planned('fsdp_config.activation_checkpointing=true')
    assert larger['activations_kept_bytes'] == pytest.approx(2 * one['activations_kept_bytes'], rel=0.02)
    assert larger['total_bytes'] > one['total_bytes']
    assert recomputing['activations_kept_bytes'] < one['activations_kept_bytes'] / 3


def test_sharding_divides_what_is_per_weight():
    """In a process of its own, since tests of training leave a process group in this one."""
    run_in_process(_check_sharding)


def _check_sharding():
    whole, sharded = planned(devices=2), planned('fsdp_config.sharding_strategy=FULL_SHARD', devices=2)
    for kind in ('parameter', 'optimizer'):
        assert sharded['at_peak_bytes'][kind] == pytest.approx(whole['at_peak_bytes'][kind] / 2, rel=0.01)
    assert whole['at_peak_bytes']['communication'] == 4 * PARAMETERS  # buckets of DDP
    wide = planned('fsdp_config.sharding_strategy=FULL_SHARD', devices=8, device='cuda')
    assert wide['at_peak_bytes']['parameter'] == pytest.approx(4 * PARAMETERS / 8, rel=0.01)


def test_an_amount_that_is_none_and_a_model_that_cannot_be_reached_are_problems_of_the_config(monkeypatch):
    from llmfoundry.command_utils.plan.command import plan

    with pytest.raises(ConfigError, match='80GB'):
        plan('x.yaml', [], None, 'lots', None, False)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    with pytest.raises(ConfigError, match='pretrained_model_name_or_path'):
        planned(config={**CONFIG, 'model': {'name': 'hf_causal_lm', 'pretrained_model_name_or_path': 'nobody/nothing-here'}})


def test_help_needs_no_torch_and_a_bad_yaml_is_reported_as_by_validate(tmp_path):
    code = "import sys\nfrom llmfoundry.cli import app\ntry:\n    app(['plan', '--help'])\nexcept SystemExit:\n    pass\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, check=False).returncode == 0
    path = tmp_path / 'bad.yaml'
    path.write_text(json.dumps({**CONFIG, 'precission': 'fp32'}))
    command = [sys.executable, '-c', "import sys; from llmfoundry.cli import app; app(['plan', sys.argv[1]])", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and 'precission' in done.stderr and 'Traceback' not in done.stderr


@pytest.mark.parametrize('row', ['MPT d512 x 6', 'Llama 100M, LoRA'])
def test_what_is_planned_is_what_training_takes(row, tmp_path, monkeypatch):
    """Two rows of ``plan_check.py`` at a smaller size, each trained in a process of its own: heaps that keep what is freed, or a step that keeps what it should not, break it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    plan_runs, plan_check = importlib.import_module('plan_runs'), importlib.import_module('plan_check')
    run = next(run for run in plan_runs.RUNS if run.name == row)
    run = dataclasses.replace(run, microbatch=max(run.microbatch // 4, 1), microbatches=2)
    plan_runs.write_data(tmp_path, run.seq_len)
    config = {**plan_runs.base_config(run, tmp_path), 'max_duration': '2ba'}
    (rank,) = plan_runs.measure_run(config, 1, tmp_path / 'run', 300)
    planned = plan_check.predict(tmp_path / 'run' / 'config.yaml', 1)
    assert planned['total_bytes'] == pytest.approx(rank['peak_bytes'], rel=0.1)
    assert planned['total_bytes'] - planned['base_bytes'] > 0.4 * planned['total_bytes'], 'too small to show anything'
