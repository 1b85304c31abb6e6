"""The conversion script: flags, exit status, remote checkpoints, uploads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.utils import ObjectStore

from llmfoundry.checkpoint import upload
from llmfoundry.checkpoint.reader import open_checkpoint
from llmfoundry.command_utils.inference.convert_composer_to_hf import ConvertArgs, convert_composer_to_hf, main, parse_args
from llmfoundry.errors import ParityError
from tests.helpers.composer_checkpoints import MPT_VARIANTS, build_mpt, gpt2_tokenizer

SCRIPT = Path(__file__).resolve().parents[2] / 'scripts' / 'inference' / 'convert_composer_to_hf.py'


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with what the converter reads of a checkpoint; the Trainer's own files are converted in tests/checkpoint."""
    model = build_mpt(gpt2_tokenizer(), **MPT_VARIANTS['alibi'])
    path = tmp_path_factory.mktemp('checkpoint') / 'ep0-ba2-rank0.pt'
    torch.save({'state': {'model': model.state_dict(), 'integrations': {'huggingface': model.get_metadata()}}, 'rng': []}, path)
    return path


def test_flags() -> None:
    args = parse_args(['--composer_path', 'a.pt', '--hf_output_path', 'b'])
    assert args == ConvertArgs('a.pt', 'b') and args.output_precision == 'fp32' and not args.trust_remote_code
    args = parse_args(
        '--composer_path a --hf_output_path b --local_checkpoint_save_location c --output_precision bf16 --hf_repo_for_upload me/x --test_uploaded_model --trust_remote_code '
        '--max_shard_size 1GB --skip_parity --allow_class a.B --allow_class c.D'.split(),
    )
    assert args == ConvertArgs('a', 'b', 'c', 'bf16', 'me/x', True, True, '1GB', True, ('a.B', 'c.D'))


@pytest.mark.parametrize('flags', [['--composer_path', 'x'], ['--composer_path', 'x', '--hf_output_path', 'y', '--output_precision', 'int8']])
def test_usage_errors(flags: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        parse_args(flags)
    assert error.value.code == 2


def test_the_script_converts_and_tells_how_to_load(checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), '--composer_path', str(checkpoint), '--hf_output_path', 'my-model', '--output_precision', 'bf16']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 'parity: logits differ by at most' in done.stdout and "from_pretrained('my-model', trust_remote_code=True)" in done.stdout
    assert (tmp_path / 'my-model' / 'model.safetensors').exists() and (tmp_path / 'my-model' / 'modeling_mpt.py').exists()
    assert os.listdir(tmp_path) == ['my-model'], 'nothing else is left in the working directory'


def test_failures_exit_with_one_message(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error_of(path: Path, *more: str) -> str:
        assert main(['--composer_path', str(path), '--hf_output_path', str(tmp_path / 'out'), *more]) == 1
        return capsys.readouterr().err

    assert error_of(tmp_path / 'absent.pt').startswith('FileNotFoundError: No checkpoint at')
    (tmp_path / 'cut.pt').write_bytes(checkpoint.read_bytes()[:5000])
    assert 'truncated' in error_of(tmp_path / 'cut.pt')
    torch.save({'weights': 1}, tmp_path / 'other.pt')
    assert '"state" is not an available key' in error_of(tmp_path / 'other.pt')
    assert '--hf_repo_for_upload' in error_of(checkpoint, '--test_uploaded_model')
    assert 'is not a size' in error_of(checkpoint, '--max_shard_size', 'huge')
    assert not (tmp_path / 'out').exists()
    (tmp_path / 'out').mkdir()
    assert error_of(checkpoint).startswith('FileExistsError')


class FakeStore(ObjectStore):
    """An object store in a local folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.uploaded: list[str] = []

    def get_object_size(self, object_name: str) -> int:
        if not (self.root / object_name).is_file():
            raise FileNotFoundError(object_name)
        return (self.root / object_name).stat().st_size

    def list_objects(self, prefix: str) -> list[str]:
        return sorted(str(p.relative_to(self.root)) for p in self.root.rglob('*') if p.is_file() and str(p.relative_to(self.root)).startswith(prefix))

    def download_object(self, object_name: str, filename: str, overwrite: bool = False, callback: Any = None) -> None:
        if not (self.root / object_name).is_file():
            raise FileNotFoundError(object_name)
        shutil.copyfile(self.root / object_name, filename)

    def upload_object(self, object_name: str, filename: str, callback: Any = None) -> None:
        target = self.root / object_name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(filename, target)
        self.uploaded.append(object_name)


def test_remote_checkpoints_and_outputs(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FakeStore(tmp_path / 'bucket')
    store.upload_object('runs/1/ep0-ba2-rank0.pt', str(checkpoint))
    monkeypatch.setattr('composer.utils.file_helpers.maybe_create_object_store_from_uri', lambda uri: store)
    kept = tmp_path / 'kept' / 'checkpoint.pt'
    convert_composer_to_hf(ConvertArgs('s3://bucket/runs/1/ep0-ba2-rank0.pt', 's3://bucket/models/mine', str(kept), skip_parity=True))
    assert kept.stat().st_size == checkpoint.stat().st_size
    assert store.uploaded[-1] == 'models/mine/config.json' and 'models/mine/model.safetensors' in store.uploaded
    with pytest.raises(FileNotFoundError), open_checkpoint('s3://bucket/runs/2/absent.pt'):
        pass


def test_hub_upload_and_its_check(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the Hub's client replaced by copies between folders."""
    calls: list[str] = []

    class Api:
        def create_repo(self, repo: str, private: bool, repo_type: str, exist_ok: bool) -> None:
            assert private and exist_ok
            calls.append(f'create {repo}')

        def upload_folder(self, folder_path: str, repo_id: str, repo_type: str) -> None:
            shutil.copytree(folder_path, tmp_path / repo_id)

    monkeypatch.setattr(upload.huggingface_hub, 'HfApi', Api)
    monkeypatch.chdir(tmp_path)
    flags = ConvertArgs(str(checkpoint), 'one', hf_repo_for_upload='me/repo', test_uploaded_model=True, skip_parity=True)
    with pytest.raises(ValueError, match='pass --trust_remote_code to allow it'):
        convert_composer_to_hf(flags)
    assert calls == []
    convert_composer_to_hf(ConvertArgs(**{**vars(flags), 'hf_output_path': 'two', 'trust_remote_code': True}))
    assert calls == ['create me/repo'] and (tmp_path / 'me' / 'repo' / 'config.json').exists()
    _change_a_weight(tmp_path / 'me' / 'repo')
    with pytest.raises(ParityError, match='differs from .* in transformer.norm_f.weight'):
        upload.check_uploaded_model(tmp_path / 'two', 'me/repo', True)


def _change_a_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / 'model.safetensors')
    weights['transformer.norm_f.weight'] += 1
    save_file(weights, folder / 'model.safetensors', metadata={'format': 'pt'})
