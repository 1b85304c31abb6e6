"""Sends an exported folder to the Hugging Face Hub or an object store, and checks what arrived on the Hub."""

from __future__ import annotations

import functools
import importlib
import logging
import posixpath
from pathlib import Path

import huggingface_hub
import torch
import transformers

from llmfoundry.data.network_faults import with_retries
from llmfoundry.errors import ParityError

__all__ = ['check_uploaded_model', 'fetch_license', 'upload_folder', 'upload_to_hub']

log = logging.getLogger(__name__)


def upload_folder(folder: Path, uri: str) -> None:
    """Copies every file of ``folder`` below ``uri`` with Composer's object store client; config.json last, so that a broken upload does not look like a model. Faults of the network are outlived.

    Raises:
        ValueError: ``uri`` is a local path.
    """
    helpers = importlib.import_module('composer.utils.file_helpers')
    store = helpers.maybe_create_object_store_from_uri(uri)
    if store is None:
        raise ValueError(f'{uri!r} is a local path, not the URI of an object store')
    _, _, prefix = helpers.parse_uri(uri)
    files = sorted((p for p in folder.rglob('*') if p.is_file()), key=lambda p: (p.name == 'config.json', str(p)))
    for path in files:
        name = posixpath.join(prefix, path.relative_to(folder).as_posix())
        log.info(f'Uploading {path.name} to {uri}')
        with_retries(functools.partial(store.upload_object, name, str(path)), f'uploading {name} to {uri}')


def upload_to_hub(folder: Path, repo: str) -> str:
    """Creates the private repository ``repo`` if it does not exist and uploads the folder; returns its address."""
    api = huggingface_hub.HfApi()
    log.info(f'Uploading {folder} to the Hugging Face Hub as {repo} (private unless it exists already)')
    api.create_repo(repo, private=True, repo_type='model', exist_ok=True)
    api.upload_folder(folder_path=str(folder), repo_id=repo, repo_type='model')
    return f'https://huggingface.co/{repo}'


def check_uploaded_model(folder: Path, repo: str, trust_remote_code: bool) -> None:
    """Downloads ``repo`` and compares every weight, and the tokenizer's vocabulary if there is one, with ``folder``.

    Args:
        trust_remote_code: whether the code in the repository and the folder may run; MPT needs it.

    Raises:
        ParityError: parameter counts, names, values or vocabularies differ.
    """
    ours = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust_remote_code)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=trust_remote_code)
    count, uploaded = (sum(p.numel() for p in m.parameters()) for m in (ours, theirs))
    if count != uploaded:
        raise ParityError(f'{repo} has {uploaded:,} parameters, {str(folder)!r} has {count:,}')
    local, remote = ours.state_dict(), theirs.state_dict()
    different = sorted(set(local) ^ set(remote)) or [n for n in local if not torch.equal(local[n], remote[n])]
    if different:
        raise ParityError(f'{repo} differs from {str(folder)!r} in {", ".join(different[:8])}')
    if (folder / 'tokenizer_config.json').exists():
        vocabularies = [transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code).get_vocab() for place in (folder, repo)]
        if vocabularies[0] != vocabularies[1]:
            raise ParityError(f'the tokenizer of {repo} has another vocabulary than that of {str(folder)!r}')
    log.info(f'{repo} equals {folder}: {count:,} parameters')


def fetch_license(folder: Path, base_model: str) -> None:
    """Copies the license files of the Hub model ``base_model`` into ``folder``; without a name, a network or a license, does nothing but say so."""
    if not base_model or Path(base_model).exists() or '://' in base_model or huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    try:
        names = [n for n in huggingface_hub.list_repo_files(base_model) if posixpath.basename(n).upper().startswith(('LICENSE', 'LICENCE', 'NOTICE'))]
        for name in names:
            path = huggingface_hub.hf_hub_download(base_model, name)
            (folder / posixpath.basename(name)).write_bytes(Path(path).read_bytes())
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as e:
        log.warning(f'The license of {base_model} could not be fetched: {e}')
