"""Callbacks for the `callbacks` block, one class per file."""

from __future__ import annotations

from llmfoundry.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        'AsyncEval': 'llmfoundry.callbacks.async_eval_callback',
        'CurriculumLearning': 'llmfoundry.callbacks.curriculum_learning_callback',
        'DatasetSwap': 'llmfoundry.callbacks.dataset_swap_callback',
        'EnvironmentLoggingCallback': 'llmfoundry.callbacks.env_logging_callback',
        'EvalOutputLogging': 'llmfoundry.callbacks.eval_output_logging_callback',
        'FDiffMetrics': 'llmfoundry.callbacks.fdiff_callback',
        'GlobalLRScaling': 'llmfoundry.callbacks.global_lr_scaling',
        'HuggingFaceCheckpointer': 'llmfoundry.callbacks.hf_checkpointer',
        'KillLossSpike': 'llmfoundry.callbacks.kill_loss_spike_callback',
        'LayerFreezing': 'llmfoundry.callbacks.layer_freezing',
        'LossPerpVLen': 'llmfoundry.callbacks.loss_perp_v_len_callback',
        'MemoryMonitor': 'llmfoundry.callbacks.memory_monitor',
        'MoETokensPerExpert': 'llmfoundry.callbacks.moe_tokens_per_expert_callback',
        'MonolithicCheckpointSaver': 'llmfoundry.callbacks.monolithic_ckpt_callback',
        'RunTimeoutCallback': 'llmfoundry.callbacks.run_timeout_callback',
        'ScheduledGarbageCollector': 'llmfoundry.callbacks.scheduled_gc_callback',
        'SpeedMonitor': 'llmfoundry.callbacks.speed_monitor',
    },
)
