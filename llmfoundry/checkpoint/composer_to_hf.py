"""From a Composer checkpoint to a Hugging Face folder: config, safetensors, tokenizer, generation settings, and for MPT the model's code.

The script and the callback both end in ``write_folder``, so there is one way to export. A folder appears under its name only after it was written in full
and passed the parity gate. The price is reading the model three times (write, reference, probe); ``check_parity=False`` saves two.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Mapping

import torch

from llmfoundry.checkpoint.export_adapter import ExportOptions, export_adapter
from llmfoundry.checkpoint.hf_folder import appears_whole, merge_generation_config, tokenizer_for, write_config, write_model_card
from llmfoundry.checkpoint.hub_export import portable_config, unportable_layers, write_model_code
from llmfoundry.checkpoint.parity import ParityReport, Reference, check_parity, compute_logits, probe_batch
from llmfoundry.checkpoint.reader import Checkpoint, LazyTensor, open_checkpoint
from llmfoundry.checkpoint.trained_model import build_config, build_shell, check_weights, fill, is_mpt
from llmfoundry.checkpoint.weights import drop_tied, write_safetensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ['ExportOptions', 'convert_checkpoint', 'export_checkpoint', 'write_folder']

log = logging.getLogger(__name__)


def convert_checkpoint(composer_path: str, output: str | Path, options: ExportOptions | None = None, local_copy: str | None = None) -> ParityReport | None:
    """Converts the checkpoint at ``composer_path`` into the new folder ``output``.

    Args:
        composer_path: local file, folder of shards, or URI.
        output: local folder that does not exist.
        local_copy: where to keep a downloaded checkpoint.

    Returns:
        The figures of the parity gate, or None if it was off.

    Raises:
        FileExistsError: ``output`` exists.
        RuntimeError: not a Composer checkpoint, or without Hugging Face metadata; its subclasses CheckpointError, UnsafeCheckpointError and ParityError.
    """
    options = options or ExportOptions()
    output = Path(output)
    if output.exists() and not options.overwrite:
        raise FileExistsError(f'The output folder {str(output)!r} exists already. Choose another name or remove it first.')
    with open_checkpoint(composer_path, local_copy, options.allowed_classes) as checkpoint:
        return export_checkpoint(checkpoint, output, options)


def export_checkpoint(
    checkpoint: Checkpoint,
    output: Path,
    options: ExportOptions,
    tokenizer: PreTrainedTokenizerBase | None = None,
    finish: Callable[[Path], None] | None = None,
) -> ParityReport | None:
    """Writes an open checkpoint into ``output``, all or nothing.

    Args:
        tokenizer: replaces the tokenizer files that the checkpoint carries.
        finish: called with the written folder before it is checked and takes its name.
    """
    if checkpoint.peft_config is not None:
        export_adapter(checkpoint, output, options, tokenizer, finish)
        return None
    mpt = is_mpt(checkpoint)
    config = build_config(checkpoint, options.trust_remote_code)
    shell = build_shell(checkpoint, config, options.trust_remote_code)
    check_weights(shell, checkpoint.weights, checkpoint.source)
    weights = drop_tied(shell, checkpoint.weights)
    for layer in unportable_layers(checkpoint.config) if mpt else ():
        log.warning(f'{layer} comes from a plug-in; the exported folder loads only where that plug-in registers it')
    with appears_whole(output, options.overwrite) as folder:
        exported_config = portable_config(checkpoint.config) if mpt else {'architectures': [checkpoint.class_name], **checkpoint.config}
        found = tokenizer_for(folder, checkpoint, options.trust_remote_code, tokenizer)
        write_folder(folder, weights, exported_config, found, options, checkpoint.generation_config)
        if mpt:
            write_model_code(folder)
        write_model_card(folder, output.name, has_code=mpt)
        if finish is not None:
            finish(folder)
        if options.check_parity and config.is_encoder_decoder:
            log.warning('the parity gate knows causal LMs only; the exported encoder-decoder was not compared with the trained model')
            return None
        return _gate(folder, checkpoint, weights, found, options) if options.check_parity else None


def write_folder(
    folder: Path,
    weights: Mapping[str, LazyTensor],
    config: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    options: ExportOptions,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Writes weights, config.json and generation_config.json into an existing folder.

    Args:
        generation: contents of the generation_config.json that the model came with.
    """
    complete = dict(config)
    for key in ('eos_token_id', 'bos_token_id', 'pad_token_id'):
        if complete.get(key) is None and tokenizer is not None and getattr(tokenizer, key) is not None:
            complete[key] = getattr(tokenizer, key)
    write_safetensors(folder, weights, options.dtype, options.max_shard_size)
    merge_generation_config(folder, generation, complete, tokenizer)
    write_config(folder, complete, str(options.dtype).removeprefix('torch.'))


def _gate(
    folder: Path,
    checkpoint: Checkpoint,
    weights: Mapping[str, LazyTensor],
    tokenizer: PreTrainedTokenizerBase | None,
    options: ExportOptions,
) -> ParityReport:
    """Runs the trained model, frees it, and compares the folder with what it computed."""

    def logits(rounded_to: torch.dtype) -> torch.Tensor:
        config = build_config(checkpoint, options.trust_remote_code)
        return compute_logits(fill(build_shell(checkpoint, config, options.trust_remote_code), weights, rounded_to), probe)

    content = checkpoint.config
    limit = next((content[k] for k in ('max_seq_len', 'max_position_embeddings', 'n_positions') if content.get(k)), None)
    vocabulary = content.get('vocab_size') or content['text_config']['vocab_size']
    probe = probe_batch(vocabulary, limit)
    trained = logits(options.dtype)
    reference = Reference(trained, None if options.dtype == torch.float32 else logits(torch.float32), tokenizer)
    report = check_parity(folder, reference, probe, options.dtype, options.trust_remote_code or is_mpt(checkpoint))
    log.info(str(report))
    return report
