"""The gate of every export: the written folder must compute what the trained model computes.

The folder is loaded by plain ``transformers`` in another process without ``llmfoundry`` (``parity_probe``), and its logits on fixed token ids are compared with
those of the model rebuilt from the checkpoint. Two bounds apply:

* exactness: both sides in fp32 from the same (for bf16 and fp16: rounded) weights may differ by ``LOGIT_TOLERANCE`` times the largest logit, at least 1. That is fp32
  rounding; a wrong head order, a lost norm or a changed attention gives far more.
* rounding: an export in bf16 or fp16 may differ from the unrounded model by ``ROUNDING_TOLERANCE``, root mean square over that of the logits. bf16 keeps 8 bits, fp16 11.

Tokenizer, special tokens, vocabulary and chat template are compared as values. Costs one fp32 copy of the model at a time, on the CPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from llmfoundry.checkpoint import parity_probe
from llmfoundry.checkpoint.weights import name_list
from llmfoundry.errors import ParityError
from llmfoundry.models.hf.load import DTYPE_KEY

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ['LOGIT_TOLERANCE', 'PROBE_TEXTS', 'ROUNDING_TOLERANCE', 'ParityReport', 'Reference', 'check_parity', 'compute_logits', 'probe_batch']

LOGIT_TOLERANCE = 1e-5
ROUNDING_TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 1e-2}
PROBE_TEXTS = ('It is a truth universally acknowledged, that', ' def f(x):\n\treturn x  # 1234567', 'Caf\u00e9 \u4f60\u597d \U0001f642')
_PROBE_LENGTH, _PADDING, _SEED = 32, 5, 17
_STDERR_CHARACTERS = 4000


@dataclass(frozen=True)
class Reference:
    """What the trained model computes, and what its tokenizer is.

    ``logits``: (batch, seq, vocab) in fp32, of weights rounded to the output precision; ``unrounded``: of the weights as trained, None if that is the same.
    """

    logits: torch.Tensor
    unrounded: torch.Tensor | None
    tokenizer: PreTrainedTokenizerBase | None


@dataclass
class ParityReport:
    """Figures of a passed gate."""

    max_logit_difference: float
    largest_logit: float
    rounding_rms: float
    facts: dict[str, Any] = field(repr=False, default_factory=dict)

    def __str__(self) -> str:
        return (
            f'parity: logits differ by at most {self.max_logit_difference:.2e} (largest logit {self.largest_logit:.3g}), rounding {self.rounding_rms:.2e} rms; '
            'tokenizer, special tokens and vocabulary agree'
        )


def probe_batch(vocab_size: int, max_seq_len: int | None = None) -> dict[str, torch.Tensor]:
    """Fixed token ids, (2, seq), drawn over the whole vocabulary; the second row is padded on the left."""
    length = min(_PROBE_LENGTH, max_seq_len - 2) if max_seq_len else _PROBE_LENGTH
    length = max(length, 2)
    generator = torch.Generator().manual_seed(_SEED)
    input_ids = torch.randint(0, vocab_size, (2, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, : min(_PADDING, length - 1)] = 0
    return {'input_ids': input_ids, 'attention_mask': attention_mask}


def compute_logits(model: PreTrainedModel, probe: dict[str, torch.Tensor]) -> torch.Tensor:
    """(batch, seq, vocab) logits in fp32."""
    with torch.no_grad():
        return model(input_ids=probe['input_ids'], attention_mask=probe['attention_mask']).logits.float()


def _run_probe(folder: Path, work: Path, trust_remote_code: bool) -> None:
    """Starts the other process.

    Raises:
        ParityError: it failed, with the end of what it printed.
    """
    environment = {**os.environ, 'HF_MODULES_CACHE': str(work / 'modules'), 'TOKENIZERS_PARALLELISM': 'false'}
    # The launcher's variables would make transformers expect other processes.
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE', 'NODE_RANK', 'MASTER_ADDR', 'MASTER_PORT'):
        environment.pop(name, None)
    command = [sys.executable, parity_probe.__file__, str(folder.resolve()), str(work)]
    done = subprocess.run(command, env=environment, cwd=work, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ParityError(
            f'The exported folder does not load or run in a process without llmfoundry (exit status {done.returncode}, trust_remote_code={trust_remote_code}):\n'
            f'{done.stderr[-_STDERR_CHARACTERS:]}',
        )


def check_parity(folder: Path, reference: Reference, probe: dict[str, torch.Tensor], dtype: torch.dtype, trust_remote_code: bool) -> ParityReport:
    """Loads ``folder`` elsewhere and compares it with ``reference``.

    Args:
        dtype: precision of the exported weights.
        trust_remote_code: whether the other process may run the code in the folder; true for our own MPT code.

    Raises:
        ParityError: names what differs and by how much.
    """
    with tempfile.TemporaryDirectory(prefix='parity-') as name:
        work = Path(name)
        save_file({k: v.contiguous() for k, v in probe.items()}, work / 'probe.safetensors')
        options = {'trust_remote_code': trust_remote_code, 'has_tokenizer': reference.tokenizer is not None, 'texts': PROBE_TEXTS, 'dtype_key': DTYPE_KEY}
        (work / 'options.json').write_text(json.dumps(options), encoding='utf-8')
        _run_probe(folder, work, trust_remote_code)
        logits = load_file(work / 'logits.safetensors')['logits']
        facts = json.loads((work / 'facts.json').read_text(encoding='utf-8'))
    problems = _key_problems(facts) + _token_problems(facts, reference)
    kept = probe['attention_mask'].bool()
    report, logit_problems = _compare_logits(logits, reference, kept, dtype)
    if problems + logit_problems:
        raise ParityError('The exported model differs from the trained one:\n  ' + '\n  '.join(problems + logit_problems))
    report.facts = facts
    return report


def _key_problems(facts: dict[str, Any]) -> list[str]:
    return [f'{what}: {name_list(facts[what])}' for what in ('missing_keys', 'unexpected_keys', 'mismatched_keys') if facts[what]]


def _token_problems(facts: dict[str, Any], reference: Reference) -> list[str]:
    problems = []
    if facts['vocab_size'] != reference.logits.shape[-1]:
        problems.append(f'vocabulary: {facts["vocab_size"]} rows of embeddings, trained with {reference.logits.shape[-1]}')
    if reference.tokenizer is None:
        return problems
    wanted = parity_probe.tokenizer_facts(reference.tokenizer, PROBE_TEXTS)
    found = facts['tokenizer']
    problems += [f'tokenizer {key}: {_short(found[key])} instead of {_short(wanted[key])}' for key in wanted if found[key] != json.loads(json.dumps(wanted[key]))]
    if found['length'] > facts['vocab_size']:
        problems.append(f'the tokenizer has {found["length"]} tokens, the model only {facts["vocab_size"]}')
    for key in ('eos_token_id', 'bos_token_id'):
        generation = facts['generation'][key]
        allowed = generation if isinstance(generation, list) else [generation]
        if wanted[key] is not None and wanted[key] not in allowed:
            problems.append(f'generation_config.{key} is {generation}, the tokenizer has {wanted[key]}')
    return problems


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + '...'


def _rms(tensor: torch.Tensor) -> float:
    return tensor.double().pow(2).mean().sqrt().item()


def _compare_logits(found: torch.Tensor, reference: Reference, kept: torch.Tensor, dtype: torch.dtype) -> tuple[ParityReport, list[str]]:
    wanted = reference.logits
    if found.shape != wanted.shape:
        return ParityReport(float('inf'), 0.0, 0.0), [f'logits have shape {tuple(found.shape)} instead of {tuple(wanted.shape)}']
    # Padded positions see nothing, so their logits mean nothing.
    found, wanted = found[kept], wanted[kept]
    unrounded = wanted if reference.unrounded is None else reference.unrounded[kept]
    largest = wanted.abs().max().item()
    difference = (found - wanted).abs().max().item()
    rounding = _rms(found - unrounded) / max(_rms(unrounded), 1e-30)
    problems = []
    if not (torch.isfinite(found).all() and torch.isfinite(wanted).all()):
        problems.append('logits are not finite: the checkpoint holds NaN or infinite weights, or they overflow')
    elif difference > LOGIT_TOLERANCE * max(1.0, largest):
        problems.append(f'logits differ by up to {difference:.3e} (largest logit {largest:.3g}, allowed {LOGIT_TOLERANCE * max(1.0, largest):.1e})')
    elif reference.unrounded is not None and rounding > ROUNDING_TOLERANCE[dtype]:
        problems.append(f'rounding to {dtype} changes the logits by {rounding:.2e} rms (allowed {ROUNDING_TOLERANCE[dtype]:.0e}); export in a higher precision')
    return ParityReport(difference, largest, rounding), problems
