"""Exports a Composer checkpoint of a run with an adapter: the adapter in PEFT's own format, or merged into its base model.

The adapter's names in a file are PEFT's business, so the model is built once more without weights, with the adapter on it, and PEFT saves it from there. The base model for
merging comes from the checkpoint if it was saved whole (``should_save_peft_only: false``), else from the folder or repository that the adapter names.
"""

from __future__ import annotations

import json
import logging
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Mapping

import torch
from transformers import GenerationConfig

from llmfoundry.checkpoint.adapters import write_adapter
from llmfoundry.checkpoint.base_model import BaseModel, open_base_model
from llmfoundry.checkpoint.hf_folder import appears_whole, tokenizer_for
from llmfoundry.checkpoint.hub_export import portable_config, write_model_code
from llmfoundry.checkpoint.merge_adapter import MergeOptions, merge_into
from llmfoundry.checkpoint.reader import Checkpoint
from llmfoundry.checkpoint.trained_model import build_config, build_shell, is_mpt
from llmfoundry.checkpoint.weights import DTYPES, name_list, parse_size
from llmfoundry.errors import CheckpointError
from llmfoundry.models.hf.adapters import FROZEN_NAMES, RESIZED, add_adapter, import_peft

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ['ExportOptions', 'export_adapter']

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportOptions:
    """How to export.

    Attributes:
        precision: fp32, fp16 or bf16 (or torch's names), of the floating-point weights.
        max_shard_size: largest file of weights.
        trust_remote_code: whether code that an architecture or tokenizer has on the Hub may run. Our own MPT code needs no permission.
        check_parity: compare the written folder with the trained model, see ``parity``.
        overwrite: replace an existing folder, in one step at the end.
        allowed_classes: classes beyond Composer's own that the checkpoint may hold.
        merge_adapter: of a run with an adapter, write the merged model; otherwise the adapter alone, in PEFT's format.
        base_model: folder or Hub name of the base model to merge into, where the checkpoint does not hold it; None takes the one that the adapter names.
    """

    precision: str = 'fp32'
    max_shard_size: str | int = '5GB'
    trust_remote_code: bool = False
    check_parity: bool = True
    overwrite: bool = False
    allowed_classes: tuple[str, ...] = field(default=())
    merge_adapter: bool = False
    base_model: str | None = None

    def __post_init__(self) -> None:
        if self.precision not in DTYPES:
            raise ValueError(f'output precision {self.precision!r} is unknown; choose one of {sorted(DTYPES)}')
        parse_size(self.max_shard_size)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]


def export_adapter(
    checkpoint: Checkpoint,
    output: Path,
    options: ExportOptions,
    tokenizer: PreTrainedTokenizerBase | None = None,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Writes the adapter of an open checkpoint, or the merged model, into ``output``, all or nothing.

    Args:
        tokenizer: replaces the tokenizer files that the checkpoint carries.
        finish: called with the written folder before it takes its name.

    Raises:
        CheckpointError: weights of the adapter are missing, or the base model cannot be found.
    """
    shell = build_shell(checkpoint, build_config(checkpoint, options.trust_remote_code), options.trust_remote_code)
    setattr(shell, RESIZED, checkpoint.has_resized_embeddings)
    if checkpoint.generation_config is not None:
        shell.generation_config = GenerationConfig.from_dict(checkpoint.generation_config)
    names = {id(tensor): name for name, tensor in reversed(shell.state_dict(keep_vars=True).items())}
    peft = import_peft('the adapter of the checkpoint')
    config = peft.get_peft_config(dict(checkpoint.peft_config or {}))
    adapted = add_adapter(shell, config)
    tensors = adapted.state_dict(keep_vars=True)
    frozen = getattr(adapted, FROZEN_NAMES)
    missing = [name for name in tensors if name not in frozen and name not in checkpoint.weights]
    if missing:
        raise CheckpointError(f'{checkpoint.source!r} lacks weights of its adapter: {name_list(missing)}')
    weights = {name: checkpoint.weights[name].load() for name in tensors if name not in frozen}
    base = {names[id(tensor)]: checkpoint.weights[name] for name, tensor in tensors.items() if id(tensor) in names and name in checkpoint.weights}
    adapted.load_state_dict(weights, strict=False, assign=True)
    dtype = None if options.merge_adapter else options.dtype
    if not options.merge_adapter:
        with appears_whole(output, options.overwrite) as folder:
            _write_adapter(folder, checkpoint, adapted, weights, options, tokenizer, dtype)
            if finish is not None:
                finish(folder)
        return
    with tempfile.TemporaryDirectory(prefix='adapter-') as temporary:
        folder = Path(temporary) / 'adapter'
        folder.mkdir()
        _write_adapter(folder, checkpoint, adapted, weights, options, tokenizer, dtype)
        has_base = set(base) >= {names[id(t)] for name, t in tensors.items() if name in frozen and id(t) in names}
        found = _base_from_checkpoint(checkpoint, Path(temporary) / 'base', options) if has_base else open_base_model(_base_name(checkpoint, config, options), options.trust_remote_code)
        merging = MergeOptions(precision=options.precision, max_shard_size=options.max_shard_size, trust_remote_code=options.trust_remote_code, overwrite=options.overwrite)
        merge_into(found, str(folder), output, merging, base if has_base else None, finish)


def _write_adapter(
    folder: Path, checkpoint: Checkpoint, adapted: Any, weights: Mapping[str, torch.Tensor], options: ExportOptions, tokenizer: Any, dtype: torch.dtype | None,
) -> None:
    write_adapter(folder, adapted, weights, None, dtype)
    tokenizer_for(folder, checkpoint, options.trust_remote_code, tokenizer)


def _base_name(checkpoint: Checkpoint, config: Any, options: ExportOptions) -> str:
    name = options.base_model or config.base_model_name_or_path
    if not name:
        raise CheckpointError(f'{checkpoint.source!r} holds an adapter alone and does not name its base model; name it with --base_model')
    return name


def _base_from_checkpoint(checkpoint: Checkpoint, folder: Path, options: ExportOptions) -> BaseModel:
    """The base model that the checkpoint holds, as a folder without weights."""
    folder.mkdir()
    content: Mapping[str, Any] = {'architectures': [checkpoint.class_name], **checkpoint.config}
    if is_mpt(checkpoint):
        content = portable_config(checkpoint.config)
        write_model_code(folder)
    (folder / 'config.json').write_text(json.dumps(content), encoding='utf-8')
    return BaseModel(checkpoint.source, folder, build_config(checkpoint, options.trust_remote_code), options.trust_remote_code)
