"""Optimizers and learning-rate schedules."""

from llmfoundry.lazy import lazy_exports

_NAMES = {
    'DecoupledAdaLRLion': 'llmfoundry.optim.adaptive_lion',
    'DecoupledAdamW': 'llmfoundry.optim.adamw',
    'DecoupledClipLion': 'llmfoundry.optim.adaptive_lion',
    'DecoupledLionW': 'llmfoundry.optim.lion',
    'InverseSquareRootWithWarmupScheduler': 'llmfoundry.optim.scheduler',
    'NoOp': 'llmfoundry.optim.no_op',
}

__getattr__, __dir__, __all__ = lazy_exports(__name__, _NAMES, ('adamw', 'adaptive_lion', 'lion', 'no_op', 'param_groups', 'scheduler'))
