"""Tries packing ratios on the data of a training config, to choose ``packing_ratio`` for data that are packed batch by batch.

For data sets that are read through Hugging Face datasets, ``packing: true`` needs no ratio and fills rows better than any; the last line printed says how far.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Mapping, Sequence

import yaml

from llmfoundry.config.load import load_dict
from llmfoundry.data.packing import best_fit
from llmfoundry.data.packing_profile import PackingProfile, example_lengths, profile_packing
from llmfoundry.errors import ConfigError, ConfigProblem, DataError, UserError
from llmfoundry.tokenizers.build import build_tokenizer

__all__ = ['main', 'profile_config']


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description='Print padding and waste of packing ratios, for the data of a training config.')
    parser.add_argument('--yaml-path', required=True, help='training config, or cluster launch file with `parameters`')
    parser.add_argument('--num-devices', type=int, required=True, help='devices of the run; global_train_batch_size is divided by it')
    parser.add_argument('--min', type=float, required=True, help='lowest packing ratio, at least 1')
    parser.add_argument('--max', type=float, required=True, help='highest packing ratio')
    parser.add_argument('--num-packing-ratios', type=int, default=20, help='how many ratios (default: %(default)s)')
    return parser


def _read_config(path: str) -> dict[str, Any]:
    """The config with its interpolations resolved; of a cluster launch file, its ``parameters``."""
    try:
        text = Path(path).read_text(encoding='utf-8')
    except OSError as e:
        raise ConfigError([ConfigProblem('--yaml-path', f'{path}: {e.strerror}')]) from None
    raw = yaml.safe_load(text)
    config, _, _ = load_dict(raw['parameters'] if isinstance(raw, Mapping) and isinstance(raw.get('parameters'), Mapping) else path)
    missing = [key for key in ('global_train_batch_size', 'tokenizer', 'train_loader') if not config.get(key)]
    if missing:
        raise ConfigError([ConfigProblem(key, 'is missing') for key in missing], source=path)
    return config


def profile_config(path: str, num_devices: int, min_ratio: float, max_ratio: float, num_packing_ratios: int = 20) -> tuple[list[PackingProfile], float]:
    """Profiles the ``train_loader`` of a config.

    Args:
        path: of the YAML file.
        num_devices: devices of the run.
        min_ratio: the lowest ratio.
        max_ratio: the highest ratio.
        num_packing_ratios: how many ratios.

    Returns:
        One profile for each ratio, and the share of positions that ``packing: true`` would fill, on the same examples.

    Raises:
        ValueError: numbers out of range, or a config without what is needed.
    """
    if num_devices < 1:
        raise ValueError(f'--num-devices must be at least 1, got {num_devices}')
    if min_ratio < 1:
        raise ValueError(f'--min must be at least 1, got {min_ratio}')
    if max_ratio < min_ratio:
        raise ValueError(f'--max must be at least --min, {min_ratio}, got {max_ratio}')
    if num_packing_ratios < 1:
        raise ValueError(f'--num-packing-ratios must be at least 1, got {num_packing_ratios}')
    config = _read_config(path)
    device_batch, rest = divmod(config['global_train_batch_size'], num_devices)
    if rest or not device_batch:
        raise ValueError(f'global_train_batch_size {config["global_train_batch_size"]} is not a multiple of --num-devices {num_devices}')
    tokenizer = build_tokenizer(config['tokenizer']['name'], config['tokenizer'].get('kwargs') or {})
    loader = config['train_loader']
    profiles = list(profile_packing(loader, tokenizer, min_ratio, max_ratio, num_packing_ratios, device_batch))
    lengths = example_lengths(loader, tokenizer, device_batch, max_ratio)
    capacity = int(loader['dataset'].get('max_seq_len', 2048))
    return profiles, sum(lengths) / max(1, len(best_fit(lengths, capacity)) * capacity)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = _parser().parse_args(argv)
    try:
        profiles, fill = profile_config(args.yaml_path, args.num_devices, args.min, args.max, args.num_packing_ratios)
    except (ValueError, ConfigError, DataError, UserError) as e:
        print(f'error: {e}')
        return 1
    print(f'{"packing_ratio":>13} {"% padding":>10} {"% waste":>10}')
    for profile in profiles:
        shown = ['too few examples'] if profile.padding_percent is None or profile.waste_percent is None else [f'{profile.padding_percent:10.2f}', f'{profile.waste_percent:10.2f}']
        print(' '.join([f'{profile.packing_ratio:13.2f}', *shown]))
    print(f'packing: true leaves {100 * (1 - fill):.2f} % padding and wastes nothing (Hugging Face data and local files)')
    return 0
