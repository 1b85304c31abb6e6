"""Chat templates in the manner of known models pass; templates that are wrong in one way each are named."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llmfoundry.data.checks.findings import ERROR, WARNING
from llmfoundry.data.checks.mask_linter import lint
from llmfoundry.data.checks.mask_rules import MaskSettings
from llmfoundry.data.checks.rows import LintRow, Turn
from llmfoundry.data.checks.template_rules import check_conversation, check_prompt_tokens, check_template, roles_of
from llmfoundry.data.checks.tokenizer_facts import render_chat, token_facts
from tests.helpers.chat_rows import CHATML, SPECIALS, TALK, TOOL_TALK, chat_row, tokenizer_with
from tests.helpers.tokenizers import gpt2_tokenizer, neox_tokenizer, smollm2_tokenizer

TALKS = {'two turns': TALK, 'tool': TOOL_TALK}
HEADER = "<|im_start|>{{ m['role'] }}\n"
GENERATION = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# The end of an answer is written with the next header.
END_IN_NEXT_HEADER = "{% for m in messages %}{% if not loop.first %}<|im_end|>\n{% endif %}" + HEADER + "{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<|im_end|>\n<|im_start|>assistant\n{% endif %}"
NO_END = "{% for m in messages %}" + HEADER + "{{ m['content'] }}\n{% endfor %}" + GENERATION
# As templates of reasoning models do it: only the last answer keeps its thoughts.
REWRITES = "{% for m in messages %}" + HEADER + "{% if m['role'] == 'assistant' and loop.last %}<think>hm</think>{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}" + GENERATION
OTHER_PROMPT = CHATML.replace('<|im_start|>assistant\n{% endif %}', '<|im_start|>assistant\n<think>\n{% endif %}')
NO_GENERATION_PROMPT = "{% for m in messages %}" + HEADER + "{{ m['content'] }}<|im_end|>\n{% endfor %}"
RAISES = "{{ raise_exception('only system and user') }}"
PLAIN_END = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} ### End\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
DOUBLE_BOS = '{{ bos_token }}{{ bos_token }}' + CHATML


def found(style: str, template: str | None = None, responses: str = 'all', with_turns: bool = True) -> dict[str, str]:
    """Rule -> severity for a tokenizer over the two-turn talk."""
    tokenizer = tokenizer_with(style, template)
    render = render_chat(tokenizer)
    try:
        rows = [chat_row(tokenizer, TALK, responses, with_turns=with_turns)]
    except Exception:  # noqa: BLE001 - a template that fails renders no rows
        rows = []
    report = lint(rows, tokenizer, MaskSettings(target_responses=responses), render=render, conversations=[('0', TALK)])
    return {f.rule: f.severity for f in report.findings}


@pytest.mark.parametrize('responses', ['all', 'last'])
@pytest.mark.parametrize('style', SPECIALS)
@pytest.mark.parametrize('talk', TALKS)
def test_good_templates_have_no_findings(style: str, talk: str, responses: str) -> None:
    if style == 'llama2' and talk == 'tool':
        pytest.skip('that template knows users and assistants only')
    tokenizer = tokenizer_with(style)
    render = render_chat(tokenizer)
    for with_turns in (True, False):
        rows = [chat_row(tokenizer, TALKS[talk], responses, with_turns=with_turns)]
        report = lint(rows, tokenizer, MaskSettings(target_responses=responses), render=render, conversations=[('0', TALKS[talk])])
        # GPT-NeoX reads two line breaks before a word as two tokens, and as one where the text is cut after them; Llama 3's own tokenizer does not.
        expected = ['prompt-tokens-differ'] if (style, talk, with_turns) == ('llama3', 'two turns', True) else []
        assert [f.rule for f in report.findings] == expected


def test_a_real_chat_tokenizer_has_no_findings() -> None:
    tokenizer = smollm2_tokenizer()
    report = lint([chat_row(tokenizer, TALK)], tokenizer, MaskSettings(target_responses='all'), render=render_chat(tokenizer), conversations=[('0', TALK)])
    assert report.findings == []
    assert ('ends a turn', "'<|im_end|>' (id 2)") in report.facts


@pytest.mark.parametrize('with_turns', [True, False])
def test_end_in_the_next_header(with_turns: bool) -> None:
    """The classic: each answer looks complete in the text, but its end is never trained."""
    rules = found('chatml', END_IN_NEXT_HEADER, with_turns=with_turns)
    assert rules == {'template-without-end': WARNING, 'terminator-not-trained': ERROR}


def test_no_end_at_all() -> None:
    assert found('chatml', NO_END) == {'template-without-end': WARNING, 'unterminated-turn': ERROR}
    # Where only the last answer is trained, the eos that is appended ends it.
    assert found('chatml', NO_END, 'last') == {'template-without-end': WARNING}


def test_gemma_whose_end_of_turn_is_masked() -> None:
    """The answer and the eos at the end of the row are trained, what ends a turn in a chat is not."""
    tokenizer = tokenizer_with('gemma')
    row = chat_row(tokenizer, TALK[:2], with_turns=False)
    row.targets[row.ids == tokenizer.convert_tokens_to_ids('<end_of_turn>')] = False
    rules = [f.rule for f in lint([row], tokenizer, MaskSettings(), render=render_chat(tokenizer)).findings]
    assert rules == ['terminator-not-trained']


def test_rewritten_history() -> None:
    assert found('chatml', REWRITES) == {'history-rewritten': ERROR}


def test_other_prompt_for_generation() -> None:
    assert found('chatml', OTHER_PROMPT)['generation-prompt-differs'] == ERROR


def test_header_as_part_of_the_answer() -> None:
    assert found('chatml', NO_GENERATION_PROMPT) == {'header-trained': WARNING}


def test_template_that_raises() -> None:
    assert found('chatml', RAISES) == {'template-fails': ERROR}
    tokenizer = tokenizer_with('chatml', RAISES)
    finding = check_template(tokenizer, render_chat(tokenizer), token_facts(tokenizer))[0]
    assert 'only system and user' in finding.seen


def test_plain_words_as_end() -> None:
    rules = found('chatml', PLAIN_END)
    assert rules == {'template-without-end': WARNING}


def test_double_bos_of_a_template() -> None:
    assert found('chatml', DOUBLE_BOS) == {'double-bos': ERROR}


def test_template_tokens_that_the_tokenizer_does_not_have() -> None:
    """ChatML with GPT-2, as used where a tokenizer has no template of its own."""
    for tokenizer in (gpt2_tokenizer(), neox_tokenizer()):
        render = render_chat(tokenizer, CHATML)
        findings = check_template(tokenizer, render, token_facts(tokenizer, render))
        assert [(f.rule, f.severity) for f in findings] == [('split-special-token', WARNING)]
        assert '<|im_start|>' in findings[0].seen and '<|im_end|>' in findings[0].seen


def test_conversations_of_the_data_are_rendered() -> None:
    """A template may be right for two plain turns and wrong for what the data hold."""
    tokenizer = tokenizer_with('chatml', CHATML.replace('<|im_start|>{{', "{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}<|im_start|>{{", 1))
    report = lint([], tokenizer, MaskSettings(), render=render_chat(tokenizer), conversations=[('3', TALK), ('4', TOOL_TALK)])
    assert [(f.rule, f.row) for f in report.findings] == [('template-fails', '4')]


def test_the_difference_is_shown() -> None:
    tokenizer = tokenizer_with('chatml', OTHER_PROMPT)
    finding = check_conversation(TALK, render_chat(tokenizer), '9')[0]
    assert finding.row == '9'
    assert finding.seen == "message 1: the prompt for generation goes on with '<think>\\n' where the text for training has 'Paris.<|im_end|>\\n'"


def test_history_that_is_tokenised_otherwise_when_it_is_asked_for() -> None:
    """Nothing but a line break keeps the messages apart, and a token reaches across it."""
    tokenizer = tokenizer_with('chatml', "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token if loop.last and m['role'] == 'assistant' else '\n' }}{% endfor %}"
                               "{% if add_generation_prompt %}assistant:{% endif %}")  # fmt: skip
    good = chat_row(tokenizer, TALK[:2])
    render = render_chat(tokenizer)
    assert check_prompt_tokens(tokenizer, good, TALK[:2], render) == []
    split = replace(good, ids=np.concatenate([tokenizer('us')['input_ids'] + tokenizer('er')['input_ids'], good.ids[1:]]), turns=(Turn(0, good.turns[0].middle + 1, good.turns[0].stop + 1),))
    finding = check_prompt_tokens(tokenizer, split, TALK[:2], render)[0]
    assert (finding.rule, finding.severity, finding.position) == ('prompt-tokens-differ', WARNING, 0)
    assert finding.seen.startswith("from token 0 on, the history is tokenised as ['us', 'er', ':'] in training and as ['user', ':', ")


def test_a_template_for_other_roles_is_asked_with_the_data() -> None:
    """It refuses a conversation that begins with the user, as the data never do."""
    guard = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('say who you are') }}{% endif %}"
    tokenizer = tokenizer_with('chatml', guard + CHATML)
    render = render_chat(tokenizer)
    assert token_facts(tokenizer, render).terminator is None and token_facts(tokenizer, render, TOOL_TALK).terminator == '<|im_end|>'
    report = lint([chat_row(tokenizer, TOOL_TALK)], tokenizer, MaskSettings(), render=render, conversations=[('0', TOOL_TALK)])
    assert report.findings == []


def test_templates_that_rewrite_only_longer_chats_are_right_for_short_ones() -> None:
    tokenizer = tokenizer_with('chatml', REWRITES)
    report = lint([chat_row(tokenizer, TALK[:2])], tokenizer, MaskSettings(), render=render_chat(tokenizer), conversations=[('0', TALK[:2])])
    assert report.findings == []


def test_labels_that_repeat_the_input() -> None:
    """Rows tokenised elsewhere without any -100 are read as prompt and answer."""
    tokenizer = tokenizer_with('chatml')
    ids = tokenizer('all of this is text')['input_ids']
    row = LintRow('0', np.array([*ids, *ids, tokenizer.eos_token_id]), np.array([False] * len(ids) + [True] * (len(ids) + 1)), turns=(Turn(0, len(ids), 2 * len(ids) + 1),))
    good = chat_row(tokenizer, TALK[:2], name='1')
    assert [(f.rule, f.severity) for f in lint([row], tokenizer, MaskSettings()).findings] == [('answer-repeats-prompt', ERROR)]
    assert [(f.rule, f.severity) for f in lint([row, good, good], tokenizer, MaskSettings()).findings] == [('answer-repeats-prompt', WARNING)]


def test_content_in_parts() -> None:
    assert roles_of([{'role': 'user', 'content': [{'type': 'text', 'text': 'a'}, {'type': 'image'}]}]) == (('user', 'a'),)


@pytest.mark.parametrize('content', ['', '  \n', [{'type': 'text', 'text': ''}]])
def test_an_assistant_that_says_nothing_is_a_warning(content: object) -> None:
    """Such a turn trains its terminator alone."""
    messages = [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': content}]
    findings = check_conversation(messages, lambda m, generation: 'x' * (1 + len(m)), '3')
    assert [(f.rule, f.severity, f.row) for f in findings] == [('empty-answer', 'warning', '3')]
