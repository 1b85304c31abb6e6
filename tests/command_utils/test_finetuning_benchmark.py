"""The benchmark of the finetuning loader runs and counts what it should."""

from __future__ import annotations

import json

from llmfoundry.command_utils import finetuning_benchmark


def test_rows_are_reproducible_consecutive_text():
    rows = list(finetuning_benchmark.prompt_response_rows(300))
    assert rows == list(finetuning_benchmark.prompt_response_rows(300))
    assert rows[0] != next(finetuning_benchmark.prompt_response_rows(1, seed=1))
    assert all(row['prompt'] and row['response'].startswith(' ') for row in rows)


def test_every_row_is_counted_cold_and_cached(tmp_path, capsys):
    finetuning_benchmark.main(['--rows', '150', '--max_seq_len', '256', '--batch_size', '2', '--folder', str(tmp_path)])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found['rows'] == 150
    cold, cached = found['ours/cold'], found['ours/cached']
    assert cold['examples'] == cached['examples'] == 150
    assert cold['tokens'] == cached['tokens'] > 150 * 20
    assert 0.9 < cold['fill'] <= 1 and cold['first_batch_s'] > 0 and cached['tokens_per_s'] > 0
    assert not list(tmp_path.iterdir())
