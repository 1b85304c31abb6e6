"""What a run does when something is wrong: one clear error, on every rank, before damage is done."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from llmfoundry import registry
from llmfoundry.errors import ConfigError, DataError, NaNLossError
from tests.helpers.mds import write_token_mds
from tests.helpers.train_runs import SEQ_LEN, make_data, run_config, start_training, tiny_config, train_losses

NAN_PLUGIN = """
import torch
from composer.core import Callback
from llmfoundry.registry import callbacks

class Poison(Callback):
    '''Makes one weight NaN before a step, on the last rank only, in the middle of its microbatches.'''
    def __init__(self, step: int):
        self.step = step
    def before_forward(self, state, logger):
        from composer.utils import dist
        if int(state.timestamp.batch) == self.step and dist.get_global_rank() == dist.get_world_size() - 1:
            state.batch['input_ids'] = state.batch['input_ids'].clone()
            self.hook = next(m for m in state.model.modules() if isinstance(m, torch.nn.Linear)).register_forward_hook(lambda m, i, o: o * float('nan'))
callbacks.register('poison', func=Poison)
"""


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp('failures'))


def _poisoned(data: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'plugin.py').write_text(NAN_PLUGIN)
    saving = {'save_folder': str(folder / 'ckpt'), 'save_interval': '1ba', 'run_name': 'r', 'autoresume': False}
    return tiny_config(data, code_paths=[str(folder / 'plugin.py')], callbacks={'poison': {'step': 3}}, **saving, **changes)


def test_nan_stops_before_the_step_and_nothing_is_saved_after_it(data: Path, tmp_path: Path) -> None:
    with registry.save_registry(), pytest.raises(NaNLossError, match='Train loss is nan at batch 4 on rank 0') as caught:
        run_config(_poisoned(data, tmp_path))
    assert (caught.value.batch, caught.value.rank) == (4, 0)
    assert sorted(p.name for p in (tmp_path / 'ckpt').glob('ep*')) == [f'ep0-ba{i}-rank0.pt' for i in (1, 2, 3)]
    weights = torch.load(tmp_path / 'ckpt/ep0-ba3-rank0.pt', weights_only=False)['state']['model']
    assert all(torch.isfinite(w).all() for w in weights.values() if w.is_floating_point())


def test_nan_on_one_rank_stops_both(data: Path, tmp_path: Path) -> None:
    """The rank that saw it is named by both; without the reduction, rank 0 would wait in the gradient's all-reduce or train on with NaN."""
    process = start_training(_poisoned(data, tmp_path), tmp_path, ranks=2)
    assert process.wait(300) != 0
    out = (tmp_path / 'out.txt').read_text()
    assert 'NaNLossError' in out and re.search(r'at batch 4 on rank 1\.', out), out[-3000:]
    assert not list((tmp_path / 'ckpt').glob('ep0-ba4*'))


def test_a_batch_without_targets_is_a_data_error(tmp_path: Path) -> None:
    """A callback of the user takes every target away."""
    write_token_mds(tmp_path / 'train', [[7] * SEQ_LEN] * 32)
    plugin = tmp_path / 'plugin.py'
    plugin.write_text(
        'from composer.core import Callback\nfrom llmfoundry.registry import callbacks\n\n'
        'class Mask(Callback):\n'
        "    def after_dataloader(self, state, logger):\n"
        "        state.batch['labels'][:] = -100\n"
        "        state.batch['loss_generating_tokens'] = [0] * len(state.batch['labels'])\n"
        "callbacks.register('mask', func=Mask)\n",
    )
    with registry.save_registry(), pytest.raises(DataError, match='no token of batch 1 has a target'):
        run_config(tiny_config(tmp_path, code_paths=[str(plugin)], callbacks={'mask': {}}))


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'save_folder': '/dev/null/x'}, r"save_folder: '/dev/null/x' cannot be written to \(NotADirectoryError: Not a directory\)"),
        ({'tokenizer': {'name': 'no/such-tokenizer'}}, 'no/such-tokenizer'),
        ({'precision': 'amp_fp16'}, "precision: 'amp_fp16' needs a CUDA GPU; on the CPU use amp_bf16 or fp32"),
        ({'loggers': {'mosaicml': {}}}, 'loggers.mosaicml: reports to the MosaicML platform'),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else '',
)
def test_errors_that_only_building_can_find(data: Path, changes: dict[str, Any], message: str) -> None:
    if 'amp_fp16' in message and torch.cuda.is_available():
        pytest.skip('a GPU has amp_fp16')
    with pytest.raises(ConfigError, match=message):
        run_config(tiny_config(data, **changes))


def test_a_vocabulary_that_is_too_small_is_found_before_the_data_are_read(data: Path) -> None:
    config = tiny_config(data / 'does-not-exist')
    config['model']['vocab_size'] = 50000
    with pytest.raises(ConfigError, match='model.vocab_size: 50000 is smaller than the 50257 tokens of the tokenizer'):
        run_config(config)


def test_errors_of_a_loader_say_which(data: Path) -> None:
    few = tiny_config(data, global_train_batch_size=128)
    with pytest.raises(Exception, match='samples') as caught:
        run_config(few)
    assert caught.value.location == 'TrainDataloader'
    config = tiny_config(data)
    config['eval_loader'] = {**config['train_loader'], 'dataset': {**config['train_loader']['dataset'], 'split': 'val'}}
    with pytest.raises(Exception, match='samples') as caught:
        run_config({**config, 'device_eval_batch_size': 64})
    assert caught.value.location == 'EvalDataloader'


def test_the_command_prints_one_block_and_exits_with_1(data: Path, tmp_path: Path) -> None:
    process = start_training(tiny_config(data, save_folder='/dev/null/x'), tmp_path, launcher=False)
    assert process.wait(200) == 1
    out = (tmp_path / 'out.txt').read_text()
    assert 'ERROR: ConfigError\n1 problem in the config:\n  save_folder: ' in out
    assert 'Traceback' not in out


def test_losses_are_logged_up_to_the_failure(data: Path) -> None:
    """The control of this file: without a poison the same run trains."""
    assert len(train_losses(run_config(tiny_config(data)))) == 6
