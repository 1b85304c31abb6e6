"""Data from and checkpoints to a real S3 server over HTTP, with a proxy that fails on purpose, and kills in the middle of uploads: the losses are those of the local run."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator

import pytest
import torch
from safetensors.torch import load as load_safetensors

from llmfoundry.callbacks.checkpoint_saver import AtomicCheckpointSaver
from llmfoundry.callbacks.save_target import staging_folder
from llmfoundry.checkpoint.integrity import damage
from llmfoundry.checkpoint.output_mirror import LIST_NAME
from llmfoundry.checkpoint.remote_store import RemoteStore
from llmfoundry.errors import CheckpointError
from tests.helpers.composer_checkpoints import build_mpt, gpt2_tokenizer, training_data
from tests.helpers.s3_server import FaultyProxy, Rule, S3Server, faulty_proxy, s3_server
from tests.helpers.tiny_hf import save_model
from tests.helpers.train_runs import losses_in, make_data, tiny_config
from tests.helpers.warm_launcher import Job, WarmLauncher

STEPS = 12
SHARDED = {'state_dict_type': 'sharded', 'mixed_precision': 'FULL'}


@dataclass
class World:
    """What the tests of this module share."""

    folder: Path
    server: S3Server
    launcher: WarmLauncher

    def config(self, **changes: Any) -> dict[str, Any]:
        """Dropout, Adam, an epoch boundary after step 8; local data."""
        return tiny_config(self.folder / 'data', max_duration=f'{STEPS}ba', run_name='r', save_interval='3ba', **changes)

    def start(self, name: str, config: dict[str, Any], ranks: int | None, environment: dict[str, str]) -> Job:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        (folder / 'config.yaml').write_text(json.dumps({**config, 'loggers': {'jsonl': {'path': str(folder / 'metrics.jsonl')}}}))
        return self.launcher.start(folder, [str(folder / 'config.yaml')], ranks, **environment)

    def losses(self, name: str) -> list[float]:
        found = losses_in(self.folder / name)
        return [found[step] for step in sorted(found)]

    def leftovers(self, uri: str) -> list[str]:
        """What is left on this machine of checkpoints on their way to ``uri``."""
        own = staging_folder(uri, 'r', 0)
        return [p.name for folder in own.parent.glob(f'{own.name[:-1]}*') for p in [folder, *folder.rglob('*')]]


@pytest.fixture(scope='module')
def world(launcher: WarmLauncher, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp('store')
    make_data(folder / 'data', num_train=8 * 8)
    with s3_server() as server:
        store = RemoteStoreAt(server, 's3://runs/data/train')
        for path in (folder / 'data' / 'train').iterdir():
            store.upload(path, path.name)
        yield World(folder, server, launcher)


def RemoteStoreAt(server: S3Server, uri: str) -> RemoteStore:  # noqa: N802  (a constructor)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        return RemoteStore(uri)


@pytest.fixture
def proxy(world: World) -> Iterator[FaultyProxy]:
    with faulty_proxy(world.server) as started:
        yield started


def _kill_in_upload(job: Job, proxy: FaultyProxy) -> None:
    """SIGKILL to all processes of the job while the proxy keeps one of their uploads."""
    deadline = time.monotonic() + 300
    while not proxy.held.wait(0.05):
        job.server.collect(0.0)
        assert job.code is None and time.monotonic() < deadline, job.output()[-3000:]
    os.killpg(job.pid, signal.SIGKILL)
    job.wait(60)


def test_streamed_saved_killed_in_an_upload_and_resumed(world: World, proxy: FaultyProxy) -> None:
    """One process; data and checkpoints on S3; 500, 503, slow answers and cut connections in both directions; the upload of the third checkpoint never ends."""
    assert world.start('local', world.config(), None, {}).wait(300) == 0
    config = world.config(save_folder='s3://runs/{run_name}/ck', save_num_checkpoints_to_keep=2)
    config['train_loader']['dataset'].update(remote='s3://runs/data', local=str(world.folder / 'cache'), download_retry=4)
    faults = [
        Rule('GET|HEAD', r'data/train/index', times=2, status=503), Rule('GET', r'data/train/shard', times=2, cut_after=700), Rule('GET|HEAD', r'data/train/shard', times=1, status=500),
        Rule('GET', r'data/train/shard', times=1, delay_s=1.0), Rule('PUT', r'ep0-ba3-rank0\.pt', times=2, status=503), Rule('PUT', r'ep0-ba6-rank0\.pt', times=1, cut_after=100_000),
        Rule('PUT', r'latest-rank0', times=1, status=500),
    ]  # fmt: skip
    proxy.add(*faults, Rule('PUT|POST', r'ep1-ba9-rank0\.pt', hold=True))
    job = world.start('remote', config, None, proxy.environment)
    _kill_in_upload(job, proxy)
    assert all(rule.seen == rule.times for rule in faults), [rule for rule in faults if rule.seen < rule.times]
    assert world.server.keys('r/ck/') == ['r/ck/ep0-ba3-rank0.pt', 'r/ck/ep0-ba6-rank0.pt', 'r/ck/latest-rank0.pt.symlink'], 'nothing names what did not arrive'
    assert world.server.read('r/ck/latest-rank0.pt.symlink') == b'r/ck/ep0-ba6-rank0.pt'
    assert 'ep1-ba9-rank0.pt' in world.leftovers('s3://runs/{run_name}/ck'), 'the kill came while the file was being sent'

    proxy.add(Rule('GET', r'ep0-ba6-rank0\.pt', times=2, cut_after=50_000), Rule('PUT', r'ep1-ba12-rank0\.pt', times=2, status=500))
    assert world.start('remote', config, None, proxy.environment).wait(300) == 0, (world.folder / 'remote/out.txt').read_text()[-4000:]
    assert 's3://runs/r/ck/ep0-ba6-rank0.pt, the newest whole checkpoint' in (world.folder / 'remote/out.txt').read_text()
    assert world.losses('remote') == world.losses('local') and len(world.losses('local')) == STEPS
    assert world.server.keys('r/ck/') == ['r/ck/ep1-ba12-rank0.pt', 'r/ck/ep1-ba9-rank0.pt', 'r/ck/latest-rank0.pt.symlink'], 'the two newest are kept, also those of the killed run count'
    assert world.leftovers('s3://runs/{run_name}/ck') == [] and world.server.unfinished_uploads() == []
    (world.folder / 'back.pt').write_bytes(world.server.read('r/ck/ep1-ba12-rank0.pt'))
    assert damage(world.folder / 'back.pt') is None


def test_shards_of_two_ranks_killed_in_an_upload_and_resumed(world: World, proxy: FaultyProxy) -> None:
    """Rank 1's part of the second checkpoint never arrives, so its metadata is not sent either and the first stays the newest."""
    assert world.start('local2', world.config(fsdp_config=SHARDED), 2, {}).wait(300) == 0
    config = world.config(save_folder='s3://runs/s', fsdp_config=SHARDED, save_num_checkpoints_to_keep=1)
    proxy.add(Rule('PUT|POST', r'ep0-ba6/__1_0\.distcp', hold=True), Rule('PUT', r's/ep0-ba3/', times=3, status=503))
    _kill_in_upload(world.start('shards', config, 2, proxy.environment), proxy)
    assert [k for k in world.server.keys('s/') if 'ba6' in k] in ([], ['s/ep0-ba6/__0_0.distcp'])
    assert world.server.read('s/latest-sharded-rank0.symlink') == b's/ep0-ba3'

    assert world.start('shards', config, 2, proxy.environment).wait(300) == 0, (world.folder / 'shards/out.txt').read_text()[-4000:]
    assert world.losses('shards') == world.losses('local2') and len(world.losses('local2')) == STEPS
    newest = [f's/ep1-ba12/{name}' for name in ('.metadata', '.metadata.sha256', '__0_0.distcp', '__1_0.distcp')]
    assert world.server.keys('s/') == [*newest, 's/latest-sharded-rank0.symlink']
    assert world.server.read('s/latest-sharded-rank0.symlink') == b's/ep1-ba12' and world.leftovers('s3://runs/s') == []


def _trainer(**arguments: Any) -> Any:
    """Composer's Trainer of a tiny MPT, two batches per epoch."""
    from composer import Trainer
    from composer.optim import DecoupledAdamW

    model = build_mpt(gpt2_tokenizer())
    return Trainer(
        model=model, train_dataloader=training_data(), optimizers=DecoupledAdamW(model.parameters(), lr=1e-3), progress_bar=False, log_to_console=False,
        save_filename='ep{epoch}-ba{batch}-rank{rank}.pt', **arguments,
    )


def _saver(folder: Path) -> AtomicCheckpointSaver:
    return AtomicCheckpointSaver(folder=str(folder), remote='s3://runs/{run_name}', remote_file_name='x', latest_remote_file_name='y', save_interval='1ba')


def test_composer_itself_finds_what_we_wrote(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Names, layout and links are Composer's: its own Trainer resumes from them."""
    for name, value in world.server.environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path / 'here')  # Composer puts what it downloads into a folder called s3:
    ours = _trainer(callbacks=[_saver(tmp_path / 'staged')], run_name='c', max_duration='2ba')
    ours.fit()
    ours.close()
    assert world.server.keys('c/') == ['c/ep0-ba1-rank0.pt', 'c/ep0-ba2-rank0.pt', 'c/latest-rank0.pt.symlink']
    theirs = _trainer(save_folder='s3://runs/{run_name}', run_name='c', autoresume=True, max_duration='3ba')
    assert int(theirs.state.timestamp.batch) == 2
    for (name, a), b in zip(ours.state.model.named_parameters(), theirs.state.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    theirs.close()


def test_an_upload_that_is_refused_ends_training_and_keeps_what_was_there(world: World, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in proxy.environment.items():
        monkeypatch.setenv(name, value)
    proxy.add(Rule('PUT', 'ep0-ba2', times=1000, status=403))
    trainer = _trainer(callbacks=[_saver(tmp_path / 'staged')], run_name='d', max_duration='6ba')
    with pytest.raises(CheckpointError, match=r"'s3://runs/d/ep0-ba2-rank0\.pt' could not be uploaded: .*access is refused \(AccessDenied\).*Earlier checkpoints are untouched"):
        trainer.fit()
    assert int(trainer.state.timestamp.batch) < 6, 'at a following step, not at the end'
    trainer.close()
    assert world.server.keys('d/') == ['d/ep0-ba1-rank0.pt', 'd/latest-rank0.pt.symlink'] and world.server.read('d/latest-rank0.pt.symlink') == b'd/ep0-ba1-rank0.pt'


def test_a_refused_key_ends_the_run_before_its_first_step(world: World, proxy: FaultyProxy) -> None:
    proxy.add(Rule('PUT', 'refused', times=1000, status=403))
    assert world.start('refused', world.config(save_folder='s3://runs/refused'), None, proxy.environment).wait(300) == 1
    out = (world.folder / 'refused/out.txt').read_text()
    assert 'RemoteStoreError' in out and "access is refused (AccessDenied) for bucket 'runs'" in out and 'AWS_SECRET_ACCESS_KEY' in out and 'Traceback' not in out
    assert world.losses('refused') == []


@pytest.mark.parametrize(
    ('remote', 'rule', 'said'),
    [
        ('s3://runs/data', Rule('GET|HEAD', 'data/train/index', times=10**6, status=403), "s3://runs/data/train: the index could not be read from there: access is refused (403) for bucket 'runs'"),
        ('s3://nobody/data', None, "the index could not be read from there: bucket 'nobody' does not exist at this address"),
        ('s3://runs/data', Rule('GET|HEAD', 'data/.*shard', times=10**6, status=403), "the shard could not be prepared from s3://runs/data: access is refused (403) for bucket 'runs'"),
        ('s3://runs/data', Rule('GET|HEAD', 'data/.*shard', times=10**6, status=503), 'Is the server reachable?'),
    ],
    ids=['refused index', 'no bucket', 'refused shard', 'store gone'],
)  # fmt: skip
def test_data_that_cannot_be_had_end_the_run_with_the_cause(world: World, proxy: FaultyProxy, tmp_path: Path, remote: str, rule: Rule | None, said: str) -> None:
    if rule:
        proxy.add(Rule(rule.method, rule.path, rule.times, rule.status))
    config = world.config()
    config['train_loader']['dataset'] |= {'remote': remote, 'local': str(tmp_path / 'cache')}
    name = f'unread-{tmp_path.name}'
    assert world.start(name, config, None, proxy.environment).wait(300) == 1
    out = (world.folder / name / 'out.txt').read_text()
    assert said in out and 'S3_ENDPOINT_URL' in out and 'AWS_SECRET_ACCESS_KEY' in out and 'Traceback' not in out, out[-3000:]
    assert world.losses(name) == []


def test_copies_of_a_local_folder(world: World, proxy: FaultyProxy, tmp_path: Path) -> None:
    """``additional_output_paths``: what is in the folder is in the bucket, what retention removed is gone there too, whatever the server did meanwhile."""
    proxy.add(Rule('PUT|POST', 'copies/', times=3, status=500), Rule('PUT|POST', 'copies/.*ba9', cut_after=1 << 12))
    config = world.config(save_folder=str(tmp_path / 'ckpt'), save_num_checkpoints_to_keep=1, additional_output_paths=['s3://runs/copies'])
    job = world.start('copies', config, None, proxy.environment)
    assert job.wait(300) == 0, job.output()[-3000:]
    here = {p.name: p.read_bytes() for p in (tmp_path / 'ckpt').iterdir() if p.is_file() and not p.is_symlink()}
    assert list(here) == ['ep1-ba12-rank0.pt']
    there = {key.removeprefix('copies/'): key for key in world.server.keys('copies/')}
    assert sorted(there) == sorted([LIST_NAME, 'ep1-ba12-rank0.pt', 'latest-rank0.pt.symlink'])
    assert world.server.read(there['ep1-ba12-rank0.pt']) == here['ep1-ba12-rank0.pt']
    assert world.server.read(there['latest-rank0.pt.symlink']) == b'copies/ep1-ba12-rank0.pt'


def test_adapters_in_a_bucket(world: World, proxy: FaultyProxy, tmp_path: Path) -> None:
    base = save_model(tmp_path / 'base', 'llama', vocab_size=50304, max_position_embeddings=64)
    lora = {'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'r': 2, 'lora_alpha': 8, 'target_modules': ['q_proj', 'v_proj']}
    model = {'name': 'hf_causal_lm', 'pretrained_model_name_or_path': base, 'pretrained': True, 'peft_config': lora}
    job = world.start('adapters', {**world.config(save_folder='s3://runs/adapters', save_num_checkpoints_to_keep=1), 'model': model}, None, proxy.environment)
    assert job.wait(300) == 0, job.output()[-3000:]
    keys = world.server.keys('adapters/')
    assert [key for key in keys if key.endswith('.pt')] == ['adapters/ep1-ba12-rank0.pt']
    adapter = [key for key in keys if '/adapter/' in key]
    assert all(key.startswith('adapters/adapter/ba12/') for key in adapter) and len(adapter) >= 4
    weights = load_safetensors(world.server.read('adapters/adapter/ba12/adapter_model.safetensors'))
    assert any('lora_B' in name and weight.abs().sum() > 0 for name, weight in weights.items())
