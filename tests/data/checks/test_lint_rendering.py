"""What a person sees: the tokens of a row in the terminal and in the HTML page, and the summary."""

from __future__ import annotations

import pickle
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from llmfoundry.data.checks import render_html as page_module
from llmfoundry.data.checks.findings import LintReport
from llmfoundry.data.checks.mask_linter import lint
from llmfoundry.data.checks.mask_rules import MaskSettings
from llmfoundry.data.checks.pieces import pieces_of
from llmfoundry.data.checks.render_html import render_html
from llmfoundry.data.checks.render_terminal import render_report, render_row, visible
from llmfoundry.data.checks.rows import LintRow
from llmfoundry.data.checks.tokenizer_facts import TokenizerFacts, render_chat, token_facts
from llmfoundry.errors import MaskLintError
from tests.helpers.chat_rows import TALK, TOOL_TALK, chat_row, tokenizer_with
from tests.helpers.tokenizers import gpt2_tokenizer

EVIL = '<script>alert("x")</script><img src=http://evil/x.png onerror=1>&amp;\x1b[2J\u202e'


@pytest.fixture(scope='module')
def chatml() -> tuple[object, TokenizerFacts]:
    tokenizer = tokenizer_with('chatml')
    return tokenizer, token_facts(tokenizer, render_chat(tokenizer))


def report_of(tokenizer: object, rows: list[LintRow]) -> LintReport:
    return lint(rows, tokenizer, MaskSettings(target_responses='all'), 'train_loader', render_chat(tokenizer))


class _Page(HTMLParser):
    """Elements and the text that each token element holds."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.trained: list[tuple[str, str]] = []
        self.text: list[str] = []
        self._open: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ('meta', 'br', 'hr'):
            self._open.append((tag, dict(attrs).get('title') or ''))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self._open and self._open[-1][0] == 'b' and self._open[-1][1]:
            self.trained.append((data, self._open[-1][1]))


def page_of(html: str) -> _Page:
    page = _Page()
    page.feed(html)
    page.close()
    assert not page._open, 'every element is closed'
    return page


def test_terminal_without_colour(chatml: tuple) -> None:
    tokenizer, facts = chatml
    assert render_row(chat_row(tokenizer, TALK[:2]), facts, color=False) == """\
row 0: 21 tokens, 5 trained
<|im_start|>user
What is the capital of France?<|im_end|>
<|im_start|>assistant
[[Paris|.|<|im_end|>|\\n|<|im_end|>]]"""


def test_terminal_with_colour(chatml: tuple) -> None:
    tokenizer, facts = chatml
    shown = render_row(chat_row(tokenizer, TALK[:2]), facts, color=True)
    trained = re.findall(r'\x1b\[30;(?:42|102)m(.*?)\x1b\[0m', shown)
    assert trained == ['Paris', '.', '<|im_end|>', '\\n', '', '<|im_end|>']
    assert '[[' not in shown


def test_characters_of_several_tokens_are_whole() -> None:
    tokenizer = gpt2_tokenizer()
    ids = np.array(tokenizer('維也納 😀 naïve', add_special_tokens=False)['input_ids'])
    row = LintRow('0', ids, np.ones(len(ids), bool))
    pieces = pieces_of(row, token_facts(tokenizer))
    assert ''.join(p.text for p in pieces) == '維也納 😀 naïve'
    assert len(pieces) < len(ids) and [p.start for p in pieces[1:]] == [p.stop for p in pieces[:-1]]


def test_sentencepiece_spaces_are_kept() -> None:
    """Decoding one token of such a tokenizer drops the space in front of it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.Unigram([('<unk>', 0.0), ('▁the', -1.0), ('▁cat', -1.0), ('s', -1.0), ('a', -2.0), ('</s>', -3.0)], 0))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token='<unk>', eos_token='</s>')
    ids = np.array([1, 2, 3])
    assert tokenizer.decode([2]) == 'cat'
    pieces = pieces_of(LintRow('0', ids, np.ones(3, bool)), token_facts(tokenizer))
    assert [p.text for p in pieces] == [' the', ' cat', 's']


def test_roles_of_tokens(chatml: tuple) -> None:
    tokenizer, facts = chatml
    pieces = pieces_of(chat_row(tokenizer, TOOL_TALK), facts)
    by_role = {role: ''.join(p.text for p in pieces if p.role == role) for role in ('system', 'user', 'tool', 'assistant')}
    assert by_role == {m['role']: m['content'] for m in TOOL_TALK}


def test_counts_per_role(chatml: tuple) -> None:
    tokenizer, _ = chatml
    counts = report_of(tokenizer, [chat_row(tokenizer, TALK), chat_row(tokenizer, TOOL_TALK)]).counts
    assert dict(counts.messages) == {'user': 3, 'assistant': 3, 'system': 1, 'tool': 1}
    assert counts.role_trained['assistant'] == counts.role_tokens['assistant'] > 0
    assert counts.role_trained['user'] == counts.role_trained['system'] == counts.role_trained['tool'] == 0 < counts.role_tokens['tool']
    assert sum(counts.role_tokens.values()) == counts.tokens and sum(counts.role_trained.values()) == counts.trained_tokens
    assert (counts.rows, counts.turns, counts.trained_turns) == (2, 3, 3)


def test_control_characters_cannot_reach_the_terminal() -> None:
    assert visible('a\x1b[2J\u202eb\x07\n\tc') == 'a\\x1b[2J\\u202eb\\x07\n\tc'


def test_long_rows_and_packed_rows(chatml: tuple) -> None:
    tokenizer, facts = chatml
    ids = np.array(tokenizer('a b c d e f g h i j k l m n o p')['input_ids'])
    row = LintRow('0', ids, np.zeros(len(ids), bool))
    assert '... 12 tokens left out ...' in render_row(row, facts, color=False, max_tokens=4)
    numbers = np.array([0] * 8 + [1] * 6 + [-1] * 2)
    shown = render_row(LintRow('0', ids, np.zeros(len(ids), bool), real=numbers >= 0, sequence_id=numbers), facts, color=False)
    assert '--- document 1: tokens 8 to 13 ---' in shown and shown.endswith('(2 tokens of padding)')


def test_html_page(chatml: tuple) -> None:
    tokenizer, facts = chatml
    row = chat_row(tokenizer, TALK[:2], append_eos=False)
    row.targets[-2:] = False
    report = report_of(tokenizer, [row])
    page = page_of(render_html([(report, [row], facts)], 'run.yaml'))
    assert [text for text, _ in page.trained] == ['Paris', '.']
    assert re.fullmatch(r'token 16, id \d+, assistant', page.trained[0][1])
    assert 'response-not-trained' in page.text
    assert ('class', 'template hit') in page.attributes
    assert dict(page.attributes).keys().isdisjoint({'src', 'href', 'onclick', 'onload', 'onerror'})


def test_html_escapes_data_and_loads_nothing(chatml: tuple) -> None:
    tokenizer, facts = chatml
    row = chat_row(tokenizer, [{'role': 'user', 'content': EVIL}, {'role': 'assistant', 'content': EVIL}], append_eos=False, name=EVIL)
    row.targets[-3:] = False
    html = render_html([(report_of(tokenizer, [row]), [row], facts)], EVIL)
    page = page_of(html)
    assert set(page.tags) <= {'html', 'head', 'meta', 'title', 'style', 'body', 'h1', 'h2', 'h3', 'h4', 'p', 'b', 'i', 'section', 'table', 'tr', 'th', 'td', 'div', 'strong', 'code', 'br', 'em', 'pre', 'span', 'hr'}
    assert 'script' not in page.tags and 'img' not in page.tags and 'url(' not in html and '@import' not in html
    assert '\x1b' not in html and '\u202e' not in html
    shown = ''.join(text for text, _ in page.trained)
    assert shown.startswith('<script>alert("x")</script>')


def test_html_of_very_many_tokens_is_cut(chatml: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, facts = chatml
    rows = [chat_row(tokenizer, TALK[:2], name=str(i)) for i in range(10)]
    rows[8].targets[:] = False
    monkeypatch.setattr(page_module, '_TOKENS_PER_SECTION', 70)
    text = ''.join(page_of(render_html([(report_of(tokenizer, rows), rows, facts)], 'x')).text)
    assert re.findall(r'row (\d+): ', text.partition('Rows')[2]) == ['0', '1', '8'] and '7 more rows are left out' in text


def test_report_lists_rows_with_errors_and_counts(chatml: tuple) -> None:
    tokenizer, facts = chatml
    rows = [chat_row(tokenizer, TALK, name=str(i)) for i in range(9)]
    rows[7].targets[:] = False
    report = report_of(tokenizer, rows)
    shown = render_report(report, rows, facts, color=False, show=2)
    assert [line for line in shown.splitlines() if line.startswith('row ')] == ['row 0: 51 tokens, 19 trained', 'row 1: 51 tokens, 19 trained', 'row 7: 51 tokens, 0 trained']
    assert 'error no-target (row 7)' in shown and '2 errors, 0 warnings' in shown
    assert re.search(r'trained tokens +152 \(33\.1%\)', shown)


def test_one_error_lists_every_rule_once(chatml: tuple) -> None:
    tokenizer, _ = chatml
    rows = [chat_row(tokenizer, TALK, name=str(i)) for i in range(20)]
    for row in rows:
        row.targets[:] = False
    with pytest.raises(MaskLintError) as raised:
        report_of(tokenizer, rows).raise_if_errors()
    text = str(raised.value)
    assert raised.value.rules == ('no-target', 'response-not-trained')
    assert text.count('error no-target') == 1 and '(rows 0, 1, 2, 3, 4, 5, 6, 7 and 12 more)' in text
    assert text.startswith('train_loader: ') and text.count('remedy: ') == 2
    report_of(tokenizer, [chat_row(tokenizer, TALK)]).raise_if_errors()


def test_reports_and_errors_travel_between_ranks(chatml: tuple) -> None:
    """Rank 0 looks, the others get what it found."""
    tokenizer, _ = chatml
    row = chat_row(tokenizer, TALK)
    row.targets[:] = False
    report = report_of(tokenizer, [row])
    assert pickle.loads(pickle.dumps(report)) == report
    with pytest.raises(MaskLintError) as raised:
        report.raise_if_errors()
    copied = pickle.loads(pickle.dumps(raised.value))
    assert (str(copied), copied.rules) == (str(raised.value), raised.value.rules)
