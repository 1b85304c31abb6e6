"""Public import paths of the initialisation helpers, which live beside this package."""

from llmfoundry.lazy import lazy_exports

_NAMES = {
    'generic_param_init_fn_': 'llmfoundry.models.param_init',
    'init_empty_weights': 'llmfoundry.models.meta_device',
    'init_on_device': 'llmfoundry.models.meta_device',
}

__getattr__, __dir__, __all__ = lazy_exports(__name__, _NAMES, ('config_moe_args', 'param_init_fns'))
