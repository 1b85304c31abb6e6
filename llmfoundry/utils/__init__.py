"""Import paths of plug-ins: re-exports of what lives in other rooms, no logic."""

from __future__ import annotations

from llmfoundry.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        'CROSS_ENTROPY_IGNORE_INDEX': 'llmfoundry.utils.consts',
        'DownloadingIterable': 'llmfoundry.utils.data_prep_utils',
        'ExperimentalWarning': 'llmfoundry.experimental',
        'TypedRegistry': 'llmfoundry.registry',
        'VersionedDeprecationWarning': 'llmfoundry.experimental',
        'add_metrics_to_eval_loaders': 'llmfoundry.builders',
        'build_algorithm': 'llmfoundry.builders',
        'build_callback': 'llmfoundry.builders',
        'build_composer_model': 'llmfoundry.builders',
        'build_eval_loaders': 'llmfoundry.builders',
        'build_evaluators': 'llmfoundry.builders',
        'build_logger': 'llmfoundry.builders',
        'build_metric': 'llmfoundry.builders',
        'build_optimizer': 'llmfoundry.builders',
        'build_scheduler': 'llmfoundry.builders',
        'build_tokenizer': 'llmfoundry.builders',
        'calculate_batch_size_info': 'llmfoundry.utils.config_utils',
        'construct_from_registry': 'llmfoundry.registry',
        'create_registry': 'llmfoundry.registry',
        'edit_files_for_hf_compatibility': 'llmfoundry.checkpoint.flatten_imports',
        'experimental_class': 'llmfoundry.experimental',
        'experimental_function': 'llmfoundry.experimental',
        'import_file': 'llmfoundry.registry',
        'load_prompts': 'llmfoundry.command_utils.inference.prompts',
        'load_prompts_from_file': 'llmfoundry.command_utils.inference.prompts',
        'log_config': 'llmfoundry.utils.config_utils',
        'merge_shard_groups': 'llmfoundry.utils.data_prep_utils',
        'pop_config': 'llmfoundry.utils.config_utils',
        'process_init_device': 'llmfoundry.utils.config_utils',
        'save_registry': 'llmfoundry.registry',
        'update_batch_size_info': 'llmfoundry.utils.config_utils',
    },
    ('builders', 'config_utils', 'consts', 'data_prep_utils', 'exceptions', 'prompt_files', 'registry_utils', 'warnings'),
)
