"""Merges a PEFT adapter into its base model layer by layer, without ever holding the model.

The architecture is built on the meta device with the adapter on it. A merged weight is made when the writer asks for it: the layer gets its base weights from the memory-mapped
files, PEFT merges that one layer, its output is compared with that of the unmerged layer on random inputs, and it is dropped once written. So memory is one shard of output, one layer
and the adapter, for a model of any size. PEFT's ``merge_and_unload`` needs the whole model; it is used where layers depend on each other or on how training started.
"""

from __future__ import annotations

import copy
import functools
import logging
from dataclasses import dataclass
from typing import Any, Callable, Mapping

import torch
from torch import nn

from llmfoundry.checkpoint.reader import LazyTensor, lazy_tensors
from llmfoundry.errors import CheckpointError, ParityError
from llmfoundry.models.hf.adapters import import_peft

__all__ = ['LAYER_TOLERANCE', 'Merged', 'merge_layer_by_layer', 'merge_whole', 'merges_layer_by_layer']

log = logging.getLogger(__name__)

# fp32 rounding of one matrix product, relative to the norm of the output; a wrong scaling or a transposed factor gives far more.
LAYER_TOLERANCE = 1e-4
_BY_LAYER = ('LORA', 'LOHA', 'LOKR', 'IA3', 'HRA')
# Other starts (PiSSA, OLoRA, ...) take something out of the base weights, which only PEFT's own loading repeats.
_PLAIN_STARTS = (None, True, False, 'gaussian')
_PROBE_ROWS, _SEED = 4, 17

Device = Callable[[str], 'torch.device | str']


@dataclass(frozen=True)
class Merged:
    """A merged model that is still to be written.

    Attributes:
        weights: name in the base model -> merged weight, made when it is loaded.
        is_untied: embedding and head were one weight and no longer are, since the adapter changed one of them.
    """

    weights: Mapping[str, LazyTensor]
    is_untied: bool = False


def merges_layer_by_layer(config: Any) -> bool:
    """Whether each layer of an adapter with this config can be merged alone."""
    needs_more = ('target_parameters', 'trainable_token_indices', 'layer_replication', 'megatron_config', 'layers_pattern_replication')
    start = getattr(config, 'init_lora_weights', None)
    return config.peft_type.value in _BY_LAYER and start in _PLAIN_STARTS and not any(getattr(config, key, None) for key in needs_more)


def merge_layer_by_layer(shell: Any, adapted: Any, base: Mapping[str, LazyTensor], adapter: Mapping[str, torch.Tensor], device: Device) -> Merged:
    """Merges lazily.

    Args:
        shell: the base model as it was before the adapter: name in its state dict -> parameter (on the meta device).
        adapted: the ``PeftModel`` made of it, on the meta device too.
        base: name in the base model -> weight; of tied names one is enough.
        adapter: name in the adapter's file -> weight.
        device: name of a module -> where to merge it.

    Raises:
        CheckpointError: a weight of the base model is missing.
    """
    names_by_id: dict[int, list[str]] = {}
    for name, tensor in shell.items():
        names_by_id.setdefault(id(tensor), []).append(name)
    source = _Source(adapted, names_by_id, base, adapter)
    inner, weights, changed = adapted.get_base_model(), {}, set()
    wrapper_class = import_peft('an adapter').utils.other.ModulesToSaveWrapper
    prefix = next(name for name, module in adapted.named_modules() if module is inner)
    inside = ()
    for path, module in inner.named_modules():
        if path and path.startswith(inside):
            continue
        made: dict[str, LazyTensor] = {}
        if isinstance(module, import_peft('an adapter').tuners.tuners_utils.BaseTunerLayer):
            for leaf, tensor in module.get_base_layer().state_dict(keep_vars=True).items():
                load = functools.partial(_merged_weight, module, f'{prefix}.{path}', leaf, source, device)
                made[f'{path}.{leaf}'] = LazyTensor(tuple(tensor.shape), source.dtype(f'{prefix}.{path}.base_layer.{leaf}'), load)
        elif isinstance(module, wrapper_class):
            for leaf in module.modules_to_save['default'].state_dict():
                made[f'{path}.{leaf}'] = source.lazy(f'{prefix}.{path}.modules_to_save.default.{leaf}')
        else:
            own = {**dict(module.named_parameters(recurse=False, remove_duplicate=False)), **dict(module.named_buffers(recurse=False))}
            full = {f'{path}.{leaf}'.lstrip('.'): f'{prefix}.{path}.{leaf}'.replace('..', '.') for leaf in own}
            weights.update({name: source.lazy(name_in_adapted) for name, name_in_adapted in full.items() if name in shell})
            continue
        inside = (*inside, f'{path}.')
        weights.update(made)
        changed |= set(made)
    untied = [names for names in names_by_id.values() if len(names) > 1 and changed & set(names)]
    for names in names_by_id.values():
        for second in names[1:]:
            if names not in untied:
                weights.pop(second, None)
    return Merged({name: weights[name] for name in shell if name in weights}, bool(untied))


@dataclass(frozen=True)
class _Source:
    """Finds the weight of a name in the adapted model: in the adapter's file, else in the base model."""

    adapted: Any
    names_by_id: Mapping[int, list[str]]
    base: Mapping[str, LazyTensor]
    adapter: Mapping[str, torch.Tensor]

    @functools.cached_property
    def _tensors(self) -> dict[str, torch.Tensor]:
        return self.adapted.state_dict(keep_vars=True)

    @functools.cached_property
    def _name_in_file(self) -> dict[int, str]:
        # PEFT's own renaming on the way to a file, inverted: it hands on the tensors that it is given.
        saved = import_peft('an adapter').get_peft_model_state_dict(self.adapted, state_dict=dict(self._tensors), save_embedding_layers=False)
        return {id(tensor): name for name, tensor in saved.items()}

    def lazy(self, name: str) -> LazyTensor:
        tensor = self._tensors[name]
        in_base = self.names_by_id.get(id(tensor), [])
        # Resized embeddings come under their names in the base model; so does a head in modules_to_save, which is another tensor.
        claimed = set(self._name_in_file.values())
        embeddings = [f for n in in_base if (f := f'base_model.model.{n}') not in claimed]
        for in_file in (self._name_in_file.get(id(tensor)), *embeddings):
            if in_file is not None and in_file in self.adapter:
                return lazy_tensors({name: self.adapter[in_file]})[name]
        present = [n for n in in_base if n in self.base]
        if not present:
            raise CheckpointError(f'neither the base model nor the adapter has a weight for {name!r}')
        found = self.base[present[0]]
        if found.shape != tuple(tensor.shape):
            raise CheckpointError(f'{present[0]!r} of the base model has shape {list(found.shape)}, its config asks for {list(tensor.shape)}')
        return found

    def dtype(self, name: str) -> torch.dtype:
        return self.lazy(name).dtype


def _merged_weight(layer: nn.Module, name: str, leaf: str, source: _Source, device: Device) -> torch.Tensor:
    """The weight (or bias) of one layer after merging, in fp32 on the CPU."""
    where = device(name.removeprefix('base_model.model.'))
    real = copy.deepcopy(layer).to_empty(device=where).eval()
    state = {own: source.lazy(f'{name}.{own}').load().to(where) for own in layer.state_dict()}
    real.load_state_dict({own: t.float() if t.is_floating_point() else t for own, t in state.items()}, assign=True)
    with torch.no_grad():
        probe = _probe(real.get_base_layer(), where)
        before = real(probe)
        real.merge(safe_merge=True)
        difference = (real.get_base_layer()(probe) - before).norm() / before.norm().clamp_min(1e-30)
    if not difference <= LAYER_TOLERANCE:
        raise ParityError(f'{name}: after merging the output of the layer differs by {difference:.1e} of its norm (allowed {LAYER_TOLERANCE:.0e}); the adapter holds NaN, or PEFT merges this kind wrongly')
    merged = real.get_base_layer().state_dict()[leaf].detach().cpu()
    real.to_empty(device='meta')  # modules in reference cycles would hold their memory until the collector comes
    return merged


def _probe(layer: nn.Module, device: torch.device | str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    weight = layer.get_parameter('weight')
    if isinstance(layer, nn.Embedding):
        return torch.randint(0, weight.shape[0], (1, _PROBE_ROWS), generator=generator).to(device)
    # Conv1D of GPT-2 keeps its weight as (in, out).
    width = weight.shape[0] if type(layer).__name__ == 'Conv1D' else weight.shape[1]
    return torch.randn(1, _PROBE_ROWS, width, generator=generator).to(device)


def merge_whole(model: Any, adapter: str) -> Merged:
    """Merges with the whole base model in memory.

    Args:
        model: the base model with its weights, in fp32.
        adapter: folder or Hub repository of the adapter.
    """
    adapted = import_peft('an adapter').PeftModel.from_pretrained(model, adapter).eval()
    was_tied = _is_tied(model)
    merged = adapted.merge_and_unload(safe_merge=True)
    weights = lazy_tensors(merged.state_dict())
    is_untied = was_tied and not _is_tied(merged)
    if was_tied and not is_untied:
        seen: dict[int, str] = {}
        for name, parameter in merged.named_parameters(remove_duplicate=False):
            if seen.setdefault(id(parameter), name) != name:
                weights.pop(name, None)
    return Merged(weights, is_untied)


def _is_tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight
