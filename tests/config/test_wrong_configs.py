"""A table of wrong configs, each with the exact lines that a user reads. Line numbers are those of the base config in ``base_config``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.base_config import edited, problems_of

Edits = tuple[tuple[str, str], ...]

# (what is wrong, replacements in the YAML text, overrides on the command line, exact report)
CASES: list[tuple[str, Edits, tuple[str, ...], list[str]]] = [
    ('top-level key misspelt', (('global_train_batch_size: 8', 'global_train_batch_sise: 8'),), (), [
        "global_train_batch_sise (c.yaml:39): unknown key (did you mean 'global_train_batch_size'?)",
    ]),
    ('model key misspelt', (('  d_model: 16', '  d_modl: 16'),), (), [
        "model.d_modl (c.yaml:6): unknown key (did you mean 'd_model'?)",
    ]),
    ('attention key misspelt', (('    attn_impl: torch', '    atn_impl: torch'),), (), [
        "model.attn_config.atn_impl (c.yaml:12): unknown key (did you mean 'attn_impl'?)",
    ]),
    ('dataset key misspelt', (('    shuffle: true', '    shufle: true'),), (), [
        "train_loader.dataset.shufle (c.yaml:22): unknown key (did you mean 'shuffle'?)",
    ]),
    ('stream key misspelt', (('    local: ${variables.data_local}\n    split: train\n', '    streams:\n      a:\n        locl: ./a\n'),), (), [
        "train_loader.dataset.streams.a.locl (c.yaml:22): unknown key (did you mean 'local'?)",
    ]),
    ('loader key misspelt', (('  num_workers: 0', '  num_worker: 0'),), (), [
        "train_loader.num_worker (c.yaml:25): unknown key (did you mean 'num_workers'?)",
    ]),
    ('optimizer key misspelt', (('  betas: [0.9, 0.95]', '  beta: [0.9, 0.95]'),), (), [
        "optimizer.beta (c.yaml:33): unknown key (did you mean 'betas'?)",
    ]),
    ('scheduler key misspelt', (('  t_warmup: 2ba', '  t_warm_up: 2ba'),), (), [
        "scheduler.t_warm_up (c.yaml:28): unknown key (did you mean 't_warmup'?)",
    ]),
    ('algorithm key misspelt', (('    clipping_threshold: 1.0', '    clipping_treshold: 1.0'),), (), [
        "algorithms.gradient_clipping.clipping_treshold (c.yaml:37): unknown key (did you mean 'clipping_threshold'?)",
    ]),
    ('callback key misspelt', (('    window_size: 10', '    windowsize: 10'),), (), [
        "callbacks.speed_monitor.windowsize (c.yaml:45): unknown key (did you mean 'window_size'?)",
    ]),
    ('callback argument where there is none', (('  lr_monitor: {}', '  lr_monitor: {every: 3}'),), (), [
        'callbacks.lr_monitor.every (c.yaml:43): unknown key (it takes no arguments)',
    ]),
    ('callback unknown', (('  speed_monitor:', '  sped_monitor:'),), (), [
        "callbacks.sped_monitor (c.yaml:44): 'sped_monitor' is not in the registry llmfoundry -> callbacks (did you mean 'speed_monitor'?)",
    ]),
    ('logger key misspelt', (), ('loggers.wandb.projekt=x',), [
        "loggers.wandb.projekt (command line): unknown key (did you mean 'project'?)",
    ]),
    ('tokenizer key', (('  kwargs:', '  kwarg:'),), (), [
        "tokenizer.kwarg (c.yaml:15): unknown key (did you mean 'kwargs'?)",
    ]),
    ('ffn key', (), ('model.ffn_config.ffn_hiden_size=3',), [
        "model.ffn_config.ffn_hiden_size (command line): unknown key (did you mean 'ffn_hidden_size'?)",
    ]),
    ('fsdp key', (), ('fsdp_config.shardingstrategy=FULL_SHARD',), [
        "fsdp_config.shardingstrategy (command line): unknown key (did you mean 'sharding_strategy'?)",
    ]),
    ('integer expected', (('max_seq_len: 64\n', 'max_seq_len: long\n'),), (), [
        "max_seq_len (c.yaml:3): expected an integer, got 'long'",
    ]),
    ('number in quotes', (('  lr: 6e-4', "  lr: '6e-4'"),), (), [
        "optimizer.lr (c.yaml:32): expected a number, got '6e-4' (remove the quotes)",
    ]),
    ('log level unknown', (), ('python_log_level=trace',), [
        "python_log_level (command line): expected one of 'debug', 'info', 'warning', 'error', 'critical', got 'trace'",
    ]),
    ('console interval in tokens', (), ('console_log_interval=1000tok',), [
        "console_log_interval (command line): must be at least 1 and in epochs or batches ('1ep', '1ba'), got '1000tok'",
    ]),
    ('kind of clipping unknown', (('    clipping_type: norm', '    clipping_type: norms'),), (), [
        "algorithms.gradient_clipping.clipping_type (c.yaml:36): expected one of 'norm', 'value', 'adaptive', got 'norms'",
    ]),
    ('seed and timeout out of range', (), ('seed=-1', 'dist_timeout=0'), [
        'seed (command line): must lie in 0 ... 2**32 - 1, got -1',
        'dist_timeout (command line): must be a positive number of seconds, got 0',
    ]),
    ('bool expected', (), ('save_overwrite=sure',), [
        "save_overwrite (command line): expected true or false, got 'sure'",
    ]),
    ('mapping expected', (('  lr_monitor: {}', '  lr_monitor: 3'),), (), [
        'callbacks.lr_monitor (c.yaml:43): expected a mapping, got 3',
    ]),
    ('list expected', (), ('load_ignore_keys=a',), [
        "load_ignore_keys (command line): expected a list of strings or null, got 'a'",
    ]),
    ('block is text', (), ('optimizer=adam',), [
        "optimizer (command line): expected a mapping, got 'adam'",
    ]),
    ('bad precision', (('precision: amp_bf16', 'precision: bf16'),), (), [
        "precision (c.yaml:41): expected one of 'fp32', 'amp_fp16', 'amp_bf16', 'amp_fp8', got 'bf16'",
    ]),
    ('bad time', (('max_duration: 10ba', 'max_duration: 10 batches'),), (), [
        "max_duration (c.yaml:38): expected a time such as '100ba' (units ep, iter, ba, sp, tok, dur, sec; fractions with dur only), got '10 batches'",
    ]),
    ('fractional batches', (('max_duration: 10ba', 'max_duration: 1.5ba'),), (), [
        "max_duration (c.yaml:38): expected a time such as '100ba' (units ep, iter, ba, sp, tok, dur, sec; fractions with dur only), got '1.5ba'",
    ]),
    ('zero duration', (('max_duration: 10ba', 'max_duration: 0ba'),), (), [
        "max_duration (c.yaml:38): must be a positive time in a unit other than 'dur', got '0ba'",
    ]),
    ('bad scheduler time', (('  t_warmup: 2ba', '  t_warmup: 2 steps'),), (), [
        "scheduler.t_warmup (c.yaml:28): expected a time such as '100ba' (units ep, iter, ba, sp, tok, dur, sec; fractions with dur only), got '2 steps'",
    ]),
    ('no global batch', (('global_train_batch_size: 8\n', ''),), (), [
        'global_train_batch_size: missing: set the number of samples per optimizer step over all devices',
    ]),
    ('microbatch negative', (('device_train_microbatch_size: 4', 'device_train_microbatch_size: -4'),), (), [
        "device_train_microbatch_size (c.yaml:40): must be positive or 'auto', got -4",
    ]),
    ('microbatch word', (('device_train_microbatch_size: 4', 'device_train_microbatch_size: big'),), (), [
        "device_train_microbatch_size (c.yaml:40): expected an integer, a number or 'auto', got 'big'",
    ]),
    ('unknown optimizer', (('  name: decoupled_adamw', '  name: adamw'),), (), [
        "optimizer.name (c.yaml:31): 'adamw' is not in the registry llmfoundry -> optimizers (did you mean 'decoupled_adamw'?)",
    ]),
    ('unknown model', (('  name: mpt_causal_lm', '  name: mpt'),), (), [
        "model.name (c.yaml:5): 'mpt' is not in the registry llmfoundry -> models (did you mean 'mpt_causal_lm'?)",
    ]),
    ('model missing', (), ('model=null',), [
        'model (command line): expected a mapping, got null',
    ]),
    ('missing name', (('  name: decoupled_adamw\n', ''),), (), [
        'optimizer.name (c.yaml:30): missing: this key is mandatory (a name from the registry llmfoundry -> optimizers)',
    ]),
    ('missing scheduler argument', (('  t_warmup: 2ba\n', ''),), (), [
        'scheduler.t_warmup (c.yaml:26): missing: this key is mandatory',
    ]),
    ('max_duration missing', (('max_duration: 10ba\n', ''),), (), [
        'max_duration: missing: this key is mandatory (an integer or a string)',
    ]),
    ('mandatory marker', (), ('model.vocab_size=???',), [
        "model.vocab_size (command line): missing: '???' marks a value that has to be given",
    ]),
    ('heads', (('  n_heads: 2', '  n_heads: 3'),), (), [
        'model.d_model (c.yaml:6): must be divisible by n_heads, got d_model 16 and n_heads 3',
    ]),
    ('kv heads', (), ('model.attn_config.attn_type=grouped_query_attention', 'model.attn_config.kv_n_heads=3',), [
        'model.attn_config.kv_n_heads (command line): must be positive and divide n_heads 2, got 3',
    ]),
    ('global nope', (), ('model.attn_config.nope=true',), [
        'model.attn_config.nope (command line): cannot be set for all layers; set it in block_overrides',
    ]),
    ('rope type', (), ('model.attn_config.rope_hf_config.type=yarn',), [
        "model.attn_config.rope_hf_config.type (command line): expected one of 'no_scaling', 'linear', 'dynamic', 'llama3', got 'yarn'",
    ]),
    ('dropout', (), ('model.resid_pdrop=1.5',), [
        'model.resid_pdrop (command line): a probability lies in [0, 1], got 1.5',
    ]),
    ('norm', (), ('model.norm_type=layer_norm',), [
        "model.norm_type (command line): 'layer_norm' is not in the registry llmfoundry -> norms (did you mean 'layernorm'?)",
    ]),
    ('triton', (), ('model.attn_config.attn_impl=triton',), [
        "model.attn_config.attn_impl (command line): 'triton' is not in the registry llmfoundry -> attention_implementations (the triton kernel was removed; use flash or torch)",
    ]),
    ('geglu', (), ('model.ffn_config.ffn_type=mptgeglu',), [
        "model.ffn_config.ffn_type (command line): 'mptgeglu' is not in the registry llmfoundry -> ffns (renamed to 'mptglu')",
    ]),
    ('moved', (), ('model.attn_impl=flash',), [
        'model.attn_impl (command line): unknown key (write it as model.attn_config.attn_impl)',
    ]),
    ('seq longer than model', (('    max_seq_len: ${max_seq_len}\n  drop', '    max_seq_len: 128\n  drop'),), (), [
        'train_loader.dataset.max_seq_len (c.yaml:23): must not exceed model.max_seq_len 64, got 128',
    ]),
    ('no data', (('    local: ${variables.data_local}\n', ''),), (), [
        'train_loader.dataset (c.yaml:19): names no data: give local (a folder, to which remote is copied if given) or streams',
    ]),
    ('local and streams', (), ('train_loader.dataset.streams.a.local=x',), [
        'train_loader.dataset.local (c.yaml:20): cannot be set together with streams; put local into each stream',
    ]),
    ('eval label', (('precision: amp_bf16', 'precision: amp_bf16\neval_loader:\n- name: text\n  num_workers: 0\n  drop_last: false\n  dataset: {local: ./v, max_seq_len: 64}'),), (), [
        'eval_loader.0.label (c.yaml:43): missing: each element of a list of evaluation loaders needs a label, which names its metrics eval/<label>',
    ]),
    ('eval twice', (), ('eval_loader.name=text', 'eval_loaders=[]',), [
        'eval_loader.dataset: missing: this key is mandatory (a mapping)',
        'eval_loader.drop_last: missing: this key is mandatory (true or false)',
        'eval_loader.num_workers: missing: this key is mandatory (an integer)',
        'eval_loaders (command line): cannot be set together with eval_loader; keep eval_loader',
    ]),
    ('interpolation', (('    local: ${variables.data_local}', '    local: ${variables.data_locl}'),), (), [
        "train_loader.dataset.local (c.yaml:20): ${variables.data_locl}: there is no key 'variables.data_locl' to interpolate (did you mean 'variables.data_local'?)",
    ]),
    ('env', (('  data_local: ./data', '  data_local: ${oc.env:HOME}'),), (), [
        'variables.data_local (c.yaml:2): ${oc.env:HOME}: environment variables cannot be read from a config, for safety; pass the value on the command line (key=value)',
    ]),
    ('resolver', (('  data_local: ./data', '  data_local: ${now:x}'),), (), [
        "variables.data_local (c.yaml:2): ${now:x}: there is no resolver 'now'",
    ]),
    ('loop', (('max_seq_len: 64\n', 'max_seq_len: ${model.max_seq_len}\n'),), (), [
        'max_seq_len (c.yaml:3): ${model.max_seq_len}: recursive interpolation detected',
        'model.max_seq_len (c.yaml:9): ${max_seq_len}: recursive interpolation detected',
        'tokenizer.kwargs.model_max_length (c.yaml:16): ${max_seq_len}: recursive interpolation detected',
        'train_loader.dataset.max_seq_len (c.yaml:23): ${max_seq_len}: recursive interpolation detected',
    ]),
    ('duplicate', (('precision: amp_bf16', 'precision: amp_bf16\nmax_seq_len: 32'),), (), [
        'max_seq_len (c.yaml:42): the key is given twice in the same block, first on line 3; delete one',
    ]),
    ('tab', (('  d_model: 16', '\td_model: 16'),), (), [
        "yaml (c.yaml:6): not valid YAML: found character '\\t' that cannot start any token; indent with spaces, not tabs",
    ]),
    ('colon', (('  d_model: 16', '  d_model 16'),), (), [
        "yaml (c.yaml:6): not valid YAML: could not find expected ':'; is a ':' missing after a key?",
    ]),
    ('unclosed', (('[0.9, 0.95]', '[0.9, 0.95'),), (), [
        "yaml (c.yaml:34): not valid YAML: expected ',' or ']', but got ':'",
    ]),
    ('non-string key', (('  d_model: 16', '  5: 16'),), (), [
        'model.5 (c.yaml:6): keys must be text, got 5 (integer); put it in quotes',
    ]),
    ('on key', (('  lr_monitor: {}', '  on: {}'),), (), [
        'callbacks.on (c.yaml:43): keys must be text, got on (boolean); put it in quotes',
    ]),
    ('override no equals', (), ('save_overwrite',), [
        'save_overwrite (command line): expected an override of the form key=value',
    ]),
    ('override unknown', (), ('model.d_modl=3',), [
        "model.d_modl (command line): unknown key (did you mean 'd_model'?)",
    ]),
    ('override index', (('precision: amp_bf16', 'precision: amp_bf16\ncode_paths: []'),), ('code_paths.3=x',), [
        'code_paths.3 (command line): cannot be set: list index out of range',
    ]),
    ('profiler', (('device_train_microbatch_size: 4', 'device_train_microbatch_size: auto'),), ('profiler.schedule.wait=1',), [
        "device_train_microbatch_size (c.yaml:40): 'auto' and `profiler` cannot be combined, because the search for a size would be profiled; give a number",
    ]),
    ('profiler schedule', (), ('profiler.json_trace_handler.folder=x',), [
        'profiler.schedule: missing: this key is mandatory',
    ]),
    ('autoresume', (), ('autoresume=true',), [
        'autoresume (command line): needs run_name, to find the newest checkpoint of this run',
        'autoresume (command line): needs save_folder, to find the newest checkpoint of this run',
    ]),
    ('only hf', (), ('only_hf_checkpoint=true',), [
        'only_hf_checkpoint (command line): needs the callback hf_checkpointer, which writes the checkpoint',
    ]),
    ('optimizer params', (), ('optimizer.params=[]',), [
        'optimizer.params (command line): is set by the trainer; delete the key',
    ]),
    ('betas', (('[0.9, 0.95]', '[0.9, 1.95]'),), (), [
        'optimizer.betas (c.yaml:33): expected two numbers in [0, 1], got [0.9, 1.95]',
    ]),
    ('warmup', (), ('scheduler.t_warmup=20ba', 'scheduler.t_max=10ba',), [
        'scheduler.t_warmup (command line): must not exceed t_max 10ba, got 20ba',
    ]),
    ('metadata', (), ('metadata.seed=3',), [
        'metadata.seed (command line): is also a key of the config, so the flattened log would hold two values; rename it or set flatten_metadata: false',
    ]),
    ('mesh', (), ('fsdp_config.device_mesh=[2]',), [
        'fsdp_config.device_mesh (command line): is made by Composer; set data_parallel_shard_degree and data_parallel_replicate_degree',
    ]),
    ('strategy', (), ('fsdp_config.sharding_strategy=FULLSHARD',), [
        "fsdp_config.sharding_strategy (command line): expected one of 'FULL_SHARD', 'SHARD_GRAD_OP', 'NO_SHARD', 'HYBRID_SHARD', '_HYBRID_SHARD_ZERO2', got 'FULLSHARD'",
    ]),
    ('init device', (), ('model.init_device=cuda',), [
        "model.init_device (command line): expected one of 'cpu', 'meta', 'mixed', got 'cuda'",
    ]),
    ('loss fn', (), ('model.loss_fn=cross_entropy',), [
        "model.loss_fn (command line): expected one of 'fused_crossentropy', 'torch_crossentropy', got 'cross_entropy'",
    ]),
    ('text_denoising', (), ('train_loader.name=text_denoising',), [
        "train_loader.name (command line): 'text_denoising' is not in the registry llmfoundry -> dataloaders (removed in release 0.7; use text)",
    ]),
    ('workers', (('  num_workers: 0', '  num_workers: -1'),), (), [
        'train_loader.num_workers (c.yaml:25): must be 0 or more, got -1',
    ]),
    ('dmoe', (), ('model.ffn_config.ffn_type=torch_dmoe', 'model.ffn_config.moe_num_experts=4',), [
        'model.ffn_config (command line): ffn_type torch_dmoe needs the keys moe_top_k, mlp_type, moe_jitter_eps, moe_normalize_expert_weights, uniform_expert_assignment',
    ]),
    ('compile', (), ('compile_config.full_graph=true',), [
        "compile_config.full_graph (command line): unknown key (did you mean 'fullgraph'?)",
    ]),
    ('encoding', (), ('train_loader.dataset.token_encoding_type=float32',), [
        "train_loader.dataset.token_encoding_type (command line): expected one of 'int8', 'int16', 'int32', 'int64', 'uint8', 'uint16', 'uint32', 'uint64', got 'float32'",
    ]),
    ('3 at once', (('  d_model: 16', '  d_modl: 16'), ('precision: amp_bf16', 'precision: bf16'),), ('seed=x',), [
        "model.d_modl (c.yaml:6): unknown key (did you mean 'd_model'?)",
        "precision (c.yaml:41): expected one of 'fp32', 'amp_fp16', 'amp_bf16', 'amp_fp8', got 'bf16'",
        "seed (command line): expected an integer, got 'x'",
    ]),
    ('key of another kind of ffn', (), ('model.ffn_config.moe_top_k=2',), [
        'model.ffn_config.moe_top_k (command line): is not a key of ffn_type mptmlp, which takes ffn_type, ffn_hidden_size, ffn_act_fn',
    ]),
    ('argument that a callback would silently drop', (), ('callbacks.nan_monitor.every=2',), [
        'callbacks.nan_monitor.every (command line): unknown key (it takes no arguments)',
    ]),
]  # fmt: skip


def test_table_is_long() -> None:
    assert len(CASES) == 88


@pytest.mark.parametrize(('edits', 'overrides', 'expected'), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_exact_report(tmp_path: Path, edits: Edits, overrides: tuple[str, ...], expected: list[str]) -> None:
    assert problems_of(tmp_path, edited(*edits), overrides) == expected


def test_base_config_is_valid(tmp_path: Path) -> None:
    assert problems_of(tmp_path) == []
