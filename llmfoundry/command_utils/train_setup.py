"""What has to happen to the process before anything of a run is built: plug-ins, logging, environment, seeds, names.

Each function does one row of the order of events that ``train`` lists.
"""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any, Iterable, Mapping

from llmfoundry import dist
from llmfoundry.errors import ConfigError, ConfigProblem
from llmfoundry.registry import import_file

__all__ = ['configure_logging', 'configure_process', 'import_code_paths', 'merge_metadata', 'say', 'seed_everything', 'warn_about_transformer_engine']

log = logging.getLogger(__name__)

LOG_FORMAT = '%(asctime)s: rank{rank}[%(process)d][%(threadName)s]: %(levelname)s: %(name)s: %(message)s'
FOLLOWING_LOGGERS = ('llmfoundry', 'streaming')


def say(lines: Iterable[str]) -> None:
    """Prints lines once per run (rank 0), whatever the log level: what was derived, replaced or ignored."""
    if dist.get_global_rank() == 0:
        for line in lines:
            print(line, flush=True)


def import_code_paths(code_paths: Iterable[str] | None) -> None:
    """Executes the user's files, so that they can register components.

    Raises:
        FileNotFoundError: no such file.
        RuntimeError: a file failed; its error is the cause.
    """
    for path in code_paths or ():
        import_file(path)


def configure_logging(python_log_level: str | None) -> None:
    """Timestamp, rank, process and thread on every log line; sets our level and Streaming's. None leaves logging alone."""
    if python_log_level is None:
        return
    logging.basicConfig(format=LOG_FORMAT.format(rank=dist.get_global_rank()), force=True)
    for name in FOLLOWING_LOGGERS:
        logging.getLogger(name).setLevel(python_log_level.upper())


def configure_process(max_split_size_mb: int | None, expandable_segments: bool, cuda_load_lazy: bool) -> None:
    """Sets CUDA's allocator and loading through the environment, and the fast matrix product for float32.

    A value that the user exported wins: an allocator setting that someone typed is there for a reason.
    """
    options = []
    if max_split_size_mb is not None:
        options.append(f'max_split_size_mb:{max_split_size_mb}')
    if expandable_segments:
        options.append('expandable_segments:True')
    if options:
        exported = os.environ.setdefault('PYTORCH_CUDA_ALLOC_CONF', ','.join(options))
        if exported != ','.join(options):
            log.info('PYTORCH_CUDA_ALLOC_CONF=%s was exported and is kept (the config asks for %s)', exported, ','.join(options))
    if cuda_load_lazy:
        os.environ['CUDA_MODULE_LOADING'] = 'LAZY'

    import torch

    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    else:
        # pin_memory stays true in YAMLs that are shared with GPU machines.
        warnings.filterwarnings('ignore', message=".*'pin_memory' argument is set as true but no accelerator")
    # A warmup of 0ba is how YAMLs say "none".
    warnings.filterwarnings('ignore', message='The warmup duration is 0')
    # torch announces, at every save of a sharded state dict, a change of its own internals.
    warnings.filterwarnings('ignore', category=UserWarning, message='torch.distributed.*_base is a private function')
    warnings.filterwarnings('ignore', category=FutureWarning, module='torch.distributed')


def seed_everything(seed: int) -> None:
    """Seeds Python, numpy and torch before anything random is built."""
    from composer.utils import reproducibility

    reproducibility.seed_all(seed)


def merge_metadata(logged_cfg: Mapping[str, Any], metadata: Mapping[str, Any] | None, flatten: bool) -> dict[str, Any]:
    """The config as it is logged, with the ``metadata`` block's keys at the top level if ``flatten``.

    Raises:
        ConfigError: (a ValueError) a metadata key that is a config key too.
    """
    merged = dict(logged_cfg)
    if not metadata or not flatten:
        return merged
    clashes = sorted(k for k in metadata if merged.get(k) is not None)
    if clashes:
        raise ConfigError([ConfigProblem(f'metadata.{k}', 'is a key of the config too, so the logged value would be ambiguous. Rename it or set flatten_metadata: false.') for k in clashes])
    merged.pop('metadata', None)
    return {**merged, **metadata}


def warn_about_transformer_engine(config: Mapping[str, Any]) -> None:
    """Warns where fp8 and TransformerEngine layers are not used together as they should be; te_ln_mlp also turns off errors of torch's compiler, as it needs."""
    model = config.get('model') or {}
    fc_type = model.get('fc_type')
    fc_name = fc_type.get('name') if isinstance(fc_type, Mapping) else fc_type
    ffn_type = (model.get('ffn_config') or {}).get('ffn_type') or ''
    uses_te = fc_name == 'te' or str(ffn_type).startswith('te_')
    if 'fp8' in str(config.get('precision')) and not uses_te:
        warnings.warn('precision: fp8 has an effect on TransformerEngine layers only, and neither model.fc_type nor model.ffn_config.ffn_type is one')
    if ffn_type == 'te_ln_mlp':
        warnings.warn('model.ffn_config.ffn_type: te_ln_mlp cannot be compiled by torch, so errors of torch._dynamo are suppressed')
        import torch._dynamo

        torch._dynamo.config.suppress_errors = True
