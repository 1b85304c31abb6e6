"""From a base model and a PEFT adapter to one Hugging Face folder: merged safetensors, config, tokenizer and generation settings.

The folder appears under its name only when it is whole. Nothing is guessed about the base: an adapter of another model is refused, by shape and layer where these
tell, else by name. The weights are merged in fp32 and written in the precision of the base model unless another is asked for.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Mapping

import torch
import transformers

from llmfoundry.checkpoint.base_model import BaseModel, open_base_model
from llmfoundry.checkpoint.hf_folder import appears_whole, merge_generation_config, write_config, write_model_card
from llmfoundry.checkpoint.merge import Merged, merge_layer_by_layer, merge_whole, merges_layer_by_layer
from llmfoundry.checkpoint.reader import LazyTensor
from llmfoundry.checkpoint.trained_model import fill
from llmfoundry.checkpoint.weights import DTYPES, parse_size, write_safetensors
from llmfoundry.errors import AdapterMismatchError
from llmfoundry.models.hf.adapters import add_adapter, check_adapter_fits, is_same_base, read_adapter

__all__ = ['MergeOptions', 'merge_adapter', 'merge_into', 'parse_device_map']

log = logging.getLogger(__name__)

_COPIED = ('*.py', 'LICENSE*', 'LICENCE*', 'NOTICE*')


@dataclass(frozen=True)
class MergeOptions:
    """How to merge.

    Attributes:
        tokenizer: name or path of the tokenizer to save; None takes the adapter's, else the base model's.
        device_map: where layers are merged: None or ``auto`` (a GPU if there is one), a device, or JSON that maps module names to devices.
        precision: ``auto`` (the base model's), or a name that ``convert_composer_to_hf`` takes.
        max_shard_size: largest file of weights.
        trust_remote_code: whether code in the base model's repository may run.
        any_base: go on where the adapter names a base model of another name.
        overwrite: replace an existing folder, in one step at the end.
    """

    tokenizer: str | None = None
    device_map: str | None = None
    precision: str = 'auto'
    max_shard_size: str | int = '5GB'
    trust_remote_code: bool = False
    any_base: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.precision != 'auto' and self.precision not in DTYPES:
            raise ValueError(f'precision {self.precision!r} is unknown; choose auto or one of {sorted(DTYPES)}')
        parse_size(self.max_shard_size)
        parse_device_map(self.device_map)


def merge_adapter(basemodel: str, peftmodel: str, outpath: str | Path, options: MergeOptions | None = None) -> None:
    """Merges the adapter ``peftmodel`` into ``basemodel`` and writes the new folder ``outpath``.

    Args:
        basemodel: local folder or Hub repository.
        peftmodel: the same, of the adapter.
        outpath: local folder that does not exist.
        options: see there.

    Raises:
        FileExistsError: ``outpath`` exists.
        AdapterMismatchError: (a ValueError) the adapter was made for another base model.
        ValueError: no adapter, or one that cannot be merged (prompt learning).
        CheckpointError: the base model cannot be found or lacks weights; ParityError: a merged layer computes something else.
    """
    options, output = options or MergeOptions(), Path(outpath)
    if output.exists() and not options.overwrite:
        raise FileExistsError(f'The output folder {str(output)!r} exists already. Choose another name or remove it first.')
    config, _ = read_adapter(peftmodel)
    base = open_base_model(basemodel, options.trust_remote_code)
    if not options.any_base and not is_same_base(config.base_model_name_or_path, basemodel):
        raise AdapterMismatchError(
            f'The adapter {peftmodel!r} was made for another base model: it names {config.base_model_name_or_path!r}, and would be merged into {basemodel!r}. '
            'Give that base model, or pass --any_base if the two are the same model under different names.',
        )
    merge_into(base, peftmodel, output, options)


def merge_into(
    base: BaseModel, peftmodel: str, output: Path, options: MergeOptions, base_weights: Mapping[str, LazyTensor] | None = None, finish: Callable[[Path], None] | None = None,
) -> None:
    """``merge_adapter`` for a base model that is open, whatever its name.

    Args:
        base_weights: weights by name instead of those in the base model's folder.
        finish: called with the written folder before it takes its name.
    """
    config, adapter = read_adapter(peftmodel)
    if config.is_prompt_learning:
        raise ValueError(f'{peftmodel!r} is a {config.peft_type.value} adapter: it learns a prompt, not weights, so it cannot be merged; load it with PeftModel.from_pretrained.')
    merged = _merge(base, config, adapter, peftmodel, options, base_weights)
    with appears_whole(output, options.overwrite) as folder:
        _write(folder, output.name, base, peftmodel, merged, options)
        if finish is not None:
            finish(folder)


def _merge(
    base: BaseModel, config: Any, adapter: Mapping[str, torch.Tensor], peftmodel: str, options: MergeOptions, base_weights: Mapping[str, LazyTensor] | None,
) -> Merged:
    embeddings = [tensor.shape[0] for name, tensor in adapter.items() if name.endswith(('embed_tokens.weight', 'wte.weight', 'embed_in.weight', 'shared.weight')) and 'lora_' not in name]
    if embeddings and embeddings[0] != base.config.vocab_size:
        log.info('the adapter brings embeddings of %d rows, the base model has %d', embeddings[0], base.config.vocab_size)
        base.config.vocab_size = embeddings[0]
    model = base.shell()
    shell = model.state_dict(keep_vars=True)
    config.inference_mode = True
    try:
        adapted = add_adapter(model, config)
    except ValueError as e:
        raise AdapterMismatchError(f'The adapter {peftmodel!r} was made for another base model (it names {config.base_model_name_or_path!r}) than {base.name!r}: {e}') from e
    check_adapter_fits(adapted, {name: tuple(tensor.shape) for name, tensor in adapter.items()}, peftmodel, base.name)
    if merges_layer_by_layer(config):
        weights = base.weights(shell) if base_weights is None else base_weights
        return merge_layer_by_layer(shell, adapted, weights, adapter, parse_device_map(options.device_map))
    return merge_whole(base.load() if base_weights is None else fill(base.shell(), base_weights), peftmodel)


def _write(folder: Path, name: str, base: BaseModel, peftmodel: str, merged: Merged, options: MergeOptions) -> None:
    dtype = _most_common_dtype(merged.weights) if options.precision == 'auto' else DTYPES[options.precision]
    tokenizer = _tokenizer(base, peftmodel, options)
    content = {**base.content, **({'vocab_size': base.config.vocab_size} if 'vocab_size' in base.content else {}), **({'tie_word_embeddings': False} if merged.is_untied else {})}
    for pattern in _COPIED if base.content.get('auto_map') else _COPIED[1:]:
        for path in base.folder.glob(pattern):
            shutil.copyfile(path, folder / path.name)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    given = next((json.loads(path.read_text(encoding='utf-8')) for path in _generation_files(base, peftmodel) if path.is_file()), None)
    merge_generation_config(folder, given, content, tokenizer)
    write_safetensors(folder, merged.weights, dtype, options.max_shard_size)
    write_model_card(folder, name, has_code=bool(base.content.get('auto_map')))
    write_config(folder, content, str(dtype).removeprefix('torch.'))


def _generation_files(base: BaseModel, peftmodel: str) -> tuple[Path, Path]:
    return Path(peftmodel) / 'generation_config.json', base.folder / 'generation_config.json'


def _tokenizer(base: BaseModel, peftmodel: str, options: MergeOptions) -> Any:
    """The tokenizer that is saved: the one asked for, else that of the adapter, else that of the base model; None (with a warning) where none has one."""
    if options.tokenizer is not None:
        return transformers.AutoTokenizer.from_pretrained(options.tokenizer, trust_remote_code=options.trust_remote_code)
    for place in (peftmodel, base.folder):
        # The config of the base model decides the class, which an adapter folder does not have.
        if Path(place).is_dir() and not (Path(place) / 'tokenizer_config.json').is_file():
            continue
        try:
            return transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=options.trust_remote_code)
        except (OSError, ValueError) as e:
            log.info('no tokenizer in %s: %s', place, e)
    log.warning('neither the adapter nor the base model has a tokenizer, so the merged folder has none; --tokenizer names one')
    return None


def _most_common_dtype(weights: Mapping[str, LazyTensor]) -> torch.dtype:
    sizes: Counter[torch.dtype] = Counter()
    for weight in weights.values():
        if weight.dtype.is_floating_point:
            sizes[weight.dtype] += weight.numel
    return sizes.most_common(1)[0][0]


def parse_device_map(device_map: str | None) -> Any:
    """From ``auto``, a device, or JSON like ``{"": "cpu", "model.layers.0": 0}`` to a function: module name -> device where it is merged.

    Raises:
        ValueError: another form.
    """
    default = 'cuda' if torch.cuda.is_available() else 'cpu'
    if device_map is None or device_map == 'auto':
        return lambda name: default
    try:
        if not device_map.lstrip().startswith('{'):
            device = torch.device(device_map)
            return lambda name: device
        places = {str(name): torch.device(f'cuda:{place}' if isinstance(place, int) else 'cpu' if place == 'disk' else place) for name, place in json.loads(device_map).items()}
    except (ValueError, RuntimeError, TypeError, AttributeError) as e:
        raise ValueError(f"device_map: {device_map!r} is not auto, cpu, cuda, or JSON that maps module names to devices such as '{{\"\": \"cpu\"}}'. Cause: {e}") from e

    def find(name: str) -> Any:
        matching = [prefix for prefix in places if prefix == '' or name == prefix or name.startswith(f'{prefix}.')]
        return places[max(matching, key=len)] if matching else default

    return find
