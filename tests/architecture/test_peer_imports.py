"""Import paths that existing plug-ins use. Each line: module, then the names that it must offer."""

from __future__ import annotations

import importlib

import pytest

PATHS = """
llmfoundry: ComposerHFCausalLM, MPTConfig, MPTForCausalLM, callbacks, data, models, optim, registry, tokenizers, utils
llmfoundry: StreamingFinetuningDataset, StreamingTextDataset, MPTPreTrainedModel, MPTModel, ComposerMPTCausalLM, DecoupledLionW
llmfoundry: algorithms, cli, eval, interfaces, loggers, metrics, tp
llmfoundry.callbacks: HuggingFaceCheckpointer, RunTimeoutCallback
llmfoundry.callbacks.curriculum_learning_callback: CurriculumLearning, CurriculumLearningState
llmfoundry.callbacks.eval_output_logging_callback: EvalOutputLogging
llmfoundry.callbacks.kill_loss_spike_callback: KillLossSpike
llmfoundry.callbacks.loss_perp_v_len_callback: LossPerpVLen
llmfoundry.command_utils: TRAIN_CONFIG_KEYS, TrainConfig, convert_dataset_hf, convert_dataset_json, train, validate_config
llmfoundry.command_utils: train_from_yaml, convert_dataset_hf_from_args, convert_dataset_json_from_args, convert_text_to_mds_from_args
llmfoundry.command_utils: convert_finetuning_dataset, convert_finetuning_dataset_from_args
llmfoundry.command_utils.data_prep.convert_finetuning_dataset: get_columns_and_format
llmfoundry.command_utils.data_prep.convert_text_to_mds: DONE_FILENAME, convert_text_to_mds, download_and_convert, is_already_processed, merge_shard_groups, write_done_file
llmfoundry.command_utils.train: train
llmfoundry.data: SUPPORTED_MDS_ENCODING_TYPES, StreamingTextDataset, build_dataloader, build_finetuning_dataloader
llmfoundry.data.finetuning: build_finetuning_dataloader
llmfoundry.data.finetuning.collator: Seq2SeqFinetuningCollator, validate_target_settings
llmfoundry.data.finetuning.dataloader: build_finetuning_dataloader
llmfoundry.data.finetuning.tasks: HUGGINGFACE_FOLDER_EXTENSIONS, QA_format_preprocessor, SUPPORTED_EXTENSIONS, StreamingFinetuningDataset, dataset_constructor
llmfoundry.data.finetuning.tasks: is_valid_ift_example, messages_format_preprocessor, tokenize_formatted_example
llmfoundry.data.packing: BinPackCollator, auto_packing_ratio
llmfoundry.data.text_data: ConcatenatedSequenceCollatorWrapper, StreamingTextDataset, build_text_dataloader
llmfoundry.data.utils: LossGeneratingTokensCollatorWrapper, get_tokens_per_batch_func
llmfoundry.interfaces.callback_with_config: CallbackWithConfig
llmfoundry.layers_registry: norms, param_init_fns
llmfoundry.metrics: TokenAccuracy
llmfoundry.models.hf: BaseHuggingFaceModel
llmfoundry.models.hf.hf_base: BaseHuggingFaceModel
llmfoundry.models.hf.hf_causal_lm: ComposerHFCausalLM
llmfoundry.models.hf.hf_fsdp: prepare_hf_model_for_fsdp, rgetattr
llmfoundry.models.hf.hf_t5: ComposerHFT5
llmfoundry.models.layers: attention, blocks, build_alibi_bias
llmfoundry.models.layers.attention: apply_temperature_tuning, attn_bias_shape, build_attn_bias, check_alibi_support, flash_attn_fn, gen_slopes, is_flash_v2_installed
llmfoundry.models.layers.attention: scaled_multihead_dot_product_attention
llmfoundry.models.layers.blocks: MPTBlock
llmfoundry.models.layers.dmoe: dMoE
llmfoundry.models.layers.ffn: quickgelu_activation
llmfoundry.models.layers.layer_builders: build_attention_layer, build_ffn, build_norm
llmfoundry.models.mpt: MPTConfig, MPTForCausalLM, MPTModel
llmfoundry.models.mpt.configuration_mpt: MPTConfig
llmfoundry.models.mpt.modeling_mpt: CROSS_ENTROPY_IGNORE_INDEX, ComposerMPTCausalLM, LlamaRotaryEmbeddingFoundry, MPTForCausalLM, PartialLlamaConfig, apply_sequence_id
llmfoundry.models.mpt.modeling_mpt: gen_attention_mask_in_length, gen_flash_attn_padding_info, gen_rotary_embedding, gen_sequence_id_info
llmfoundry.models.utils: generic_param_init_fn_, init_empty_weights, init_on_device
llmfoundry.models.utils.config_moe_args: config_megablocks_moe_args, get_megablocks_device_mesh
llmfoundry.models.utils.param_init_fns: embedding_init, fc_init, fused_param_init_helper, multihead_attention_init, stacked_param_init_helper
llmfoundry.optim.scheduler: InverseSquareRootWithWarmupScheduler
llmfoundry.registry: callbacks, callbacks_with_config, config_transforms, load_planners, save_planners, tokenizers
llmfoundry.tokenizers: TiktokenTokenizerWrapper, get_date_string
llmfoundry.tokenizers.tiktoken: TiktokenTokenizerWrapper, bytes_to_unicode
llmfoundry.tokenizers.utils: get_date_string
llmfoundry.utils: build_tokenizer, edit_files_for_hf_compatibility, prompt_files, registry_utils
llmfoundry.utils: build_algorithm, build_callback, build_composer_model, build_eval_loaders, build_evaluators, build_logger, build_metric, build_optimizer, build_scheduler
llmfoundry.utils: add_metrics_to_eval_loaders, calculate_batch_size_info, update_batch_size_info, process_init_device, log_config, pop_config, merge_shard_groups
llmfoundry.utils: DownloadingIterable, load_prompts, load_prompts_from_file, VersionedDeprecationWarning, ExperimentalWarning, experimental_function, experimental_class
llmfoundry.utils: CROSS_ENTROPY_IGNORE_INDEX
llmfoundry.utils.builders: add_metrics_to_eval_loaders, build_callback, build_composer_model, build_dataloader, build_eval_loaders, build_evaluators, build_load_planner, build_logger
llmfoundry.utils.builders: build_optimizer, build_save_planner, build_tokenizer, build_tp_strategies
llmfoundry.utils.config_utils: EVAL_CONFIG_KEYS, TRAIN_CONFIG_KEYS, TrainConfig, log_dataset_uri, make_dataclass_and_log_config, process_init_device, to_dict_container, to_list_container
llmfoundry.utils.config_utils: update_batch_size_info, update_config_with_batch_size_info
llmfoundry.utils.consts: CROSS_ENTROPY_IGNORE_INDEX
llmfoundry.utils.exceptions: ALLOWED_PROMPT_KEYS, ALLOWED_RESPONSE_KEYS, CannotUnicodeDecodeFile, ChatTemplateError, ConsecutiveRepeatedChatRolesError, DatasetTooSmallError
llmfoundry.utils.exceptions: IncorrectMessageKeyQuantityError, InputFolderMissingDataError, InvalidContentTypeError, InvalidExampleTypeError, InvalidLastChatMessageRoleError
llmfoundry.utils.exceptions: InvalidMessageTypeError, InvalidPromptTypeError, InvalidResponseTypeError, InvalidRoleError, LossSpikeError, MisconfiguredHfDatasetError
llmfoundry.utils.exceptions: NotEnoughDatasetSamplesError, OutputFolderNotEmptyError, StoragePermissionError, UnknownExampleTypeError
llmfoundry.utils.registry_utils: TypedRegistry, construct_from_registry, save_registry
llmfoundry.utils.warnings: ExperimentalWarning
"""
LINES = [line for line in PATHS.strip().splitlines()]


def test_number_of_paths() -> None:
    assert sum(len(line.split(': ')[1].split(', ')) for line in LINES) >= 212


@pytest.mark.parametrize('line', LINES, ids=lambda line: line.split(':')[0])
def test_path(line: str) -> None:
    module, names = line.split(': ')
    loaded = importlib.import_module(module)
    missing = []
    for name in names.split(', '):
        try:
            getattr(loaded, name)
        except (AttributeError, ImportError) as e:
            missing.append(f'{module}.{name}: {e}')
    assert not missing, '\n'.join(missing)
