"""Whatever a config holds, loading it ends in a config or in a ConfigError, never in another exception."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmfoundry.config.load import load_train_config
from llmfoundry.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
FULL = yaml.safe_load((ROOT / 'yamls' / 'pretrain' / 'gpt-neo-125m_eval.yaml').read_text())
MPT = yaml.safe_load((ROOT / 'yamls' / 'pretrain' / 'testing-moe.yaml').read_text())
MPT['eval_loader'] = [{**MPT['eval_loader'], 'label': 'a'}]
MPT['train_loader']['dataset']['streams'] = {'a': {'local': './a', 'proportion': 0.5}}
MPT['model']['attn_config'] = {'rope': True, 'rope_impl': 'hf', 'rope_hf_config': {'type': 'linear', 'factor': 2.0}, 'attn_type': 'grouped_query_attention', 'kv_n_heads': 2}
MPT['model']['init_config'] = {'name': 'baseline_', 'init_std': 0.02, 'emb_init_uniform_lim': [0, 1]}
MPT['model']['block_overrides'] = {'order': [{'name': 'default', 'repeat': 4}], 'overrides': {'x': {'attn_config': {'sliding_window_size': 8}}}}
MPT['optimizer']['param_groups'] = [{'param_str_match': 'norm', 'weight_decay': 0.0}]
MPT['profiler'] = {'schedule': {'wait': 1}, 'json_trace_handler': {'folder': 'x'}}
MPT['metadata'], MPT['loggers'], MPT['compile_config'], MPT['tp_config'] = {'a': 1}, {'wandb': {}}, {'mode': 'default'}, {'strategy': 'ffn', 'tensor_parallel_degree': 2}
MPT['fsdp_config'] |= {'mixed_precision': {'param_dtype': 'bf16'}, 'load_planner': {'x': {}}}

junk = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.floats(allow_nan=True, allow_infinity=True), st.sampled_from(['', 'x', '${a.b}', '${max_seq_len}', '???', '1e3', '10ba', '${', 'auto', 'meta']),
    st.lists(st.integers(), max_size=2), st.just([{'a': 1}]), st.dictionaries(st.sampled_from(['name', 'x', 'type', 'label']), st.one_of(st.none(), st.integers(), st.text(max_size=3)), max_size=2),
)  # fmt: skip


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values below ``node``."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [place for key, value in items for place in [(*path, key), *places(value, (*path, key))]]


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_value_in_any_place(data: st.DataObject) -> None:
    config = copy.deepcopy(data.draw(st.sampled_from([FULL, MPT])))
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(places(config)))
        parent = config
        for key in path[:-1]:
            parent = parent[key]
        if data.draw(st.booleans()):
            parent[path[-1]] = data.draw(junk)
        elif isinstance(parent, dict):
            del parent[path[-1]]
        if not places(config):
            return
    try:
        load_train_config(config)
    except ConfigError as e:
        assert e.problems and all(str(p).strip() for p in e.problems)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(overrides=st.lists(st.one_of(
    st.text(max_size=12),
    st.builds('{}={}'.format, st.sampled_from(['model', 'model.d_model', 'eval_loader.0.label', 'train_loader.dataset.streams.a', 'a..b', '[0]', 'seed', 'x.y', '', 'variables.data_local', 'optimizer.betas.0']),
              st.one_of(st.text(max_size=6), st.sampled_from(['null', '{}', '[]', '${seed}', '"', '{a: [}', '1', '???', 'a=b', '${oc.env:HOME}']))),
), max_size=3))  # fmt: skip
def test_any_override(overrides: list[str]) -> None:
    try:
        load_train_config(copy.deepcopy(MPT), overrides)
    except ConfigError as e:
        assert e.problems


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_damage_to_the_text(tmp_path: Path, data: st.DataObject) -> None:
    text = (ROOT / 'yamls' / 'pretrain' / 'testing.yaml').read_text()
    at = data.draw(st.integers(0, len(text)))
    text = text[:at] + data.draw(st.sampled_from(['\t', ':', '{', '"', "'", '\n', '- ', '&a ', '*a', '!!x ', '%', '<<: ', '\x00', '🙂', '? ', '---\n', '# '])) + text[at + data.draw(st.integers(0, 3)) :]
    path = tmp_path / 'c.yaml'
    path.write_text(text, encoding='utf-8')
    try:
        load_train_config(path)
    except ConfigError as e:
        assert e.problems
