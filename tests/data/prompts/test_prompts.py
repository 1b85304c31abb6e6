"""Each prompt format renders one conversation to an expected text; wording, examples, stop strings and retention."""

from __future__ import annotations

import pytest

from llmfoundry.data.prompts import (
    FORMATS,
    PROMPTS,
    ChatMLFormat,
    Conversation,
    DefaultPrompt,
    FewShotQA,
    Llama2Format,
    Message,
    Prompt,
    PromptFormat,
    Role,
    StandaloneQuestion,
    UserAssistantFormat,
    ZeroShotQA,
    default_format,
)

# One message with a system message and two contexts: whole, and without its response.
RENDERED = {
    'PromptFormat': ('S\nA\nB\nQ?\nR.', 'S\nA\nB\nQ?'),
    'UserAssistantFormat': ('S\nUser: A\nB\nQ?\nAssistant: R.', 'S\nUser: A\nB\nQ?\nAssistant:'),
    'RedpajamaFormat': ('S\n<human>: A\nB\nQ?\n<bot>: R.', 'S\n<human>: A\nB\nQ?\n<bot>:'),
    'VicunaFormat': ('<s>S\nUSER: A\nB\nQ?\nASSISTANT: R.</s>', '<s>S\nUSER: A\nB\nQ?\nASSISTANT:'),
    'Llama2Format': ('<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nA\nB\nQ? [/INST] R. </s>', '<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nA\nB\nQ? [/INST]'),
    'TogetherLlama2Format': ('[INST]  <<SYS>>\nS\n<</SYS>>\n\nA\nB\nQ?  [/INST] R.', '[INST]  <<SYS>>\nS\n<</SYS>>\n\nA\nB\nQ?  [/INST]'),
    'ChatMLFormat': (
        '<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nA\nB\nQ?<|im_end|>\n<|im_start|>assistant\nR.<|im_end|>',
        '<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nA\nB\nQ?<|im_end|>\n<|im_start|>assistant',
    ),
    'DollyFormat': ('S\n\n### Instruction:\nA\nB\nQ?\n\n### Response:\nR.', 'S\n\n### Instruction:\nA\nB\nQ?\n\n### Response:'),
}
STOP_STRINGS = {
    'PromptFormat': [],
    'UserAssistantFormat': ['User:', 'Assistant:'],
    'RedpajamaFormat': ['<human>:', '<bot>:'],
    'VicunaFormat': ['USER:', 'ASSISTANT:'],
    'Llama2Format': ['[INST]', '[/INST]', '<<SYS>>', '<</SYS>>'],
    'TogetherLlama2Format': ['[INST]', '[/INST]', '<<SYS>>', '<</SYS>>'],
    'ChatMLFormat': ['<|im_start|>user', '<|im_end|>', '<|im_start|>assistant', '<|im_start|>system'],
    'DollyFormat': ['### Instruction:', '### Response:'],
}


def test_every_format_and_prompt_is_here() -> None:
    assert set(RENDERED) == set(STOP_STRINGS) == set(FORMATS)
    assert set(PROMPTS) == {'Prompt', 'DefaultPrompt', 'ZeroShotQA', 'FewShotQA', 'StandaloneQuestion'}


@pytest.mark.parametrize('name', FORMATS)
def test_rendered_text(name: str) -> None:
    prompt = Prompt(system_message=' S ', format=FORMATS[name]())
    whole, without_response = RENDERED[name]
    assert prompt.render(' Q? ', ' R. ', ['A', 'B']) == whole
    assert prompt.render('Q?', None, ['A', 'B']) == without_response
    assert whole.startswith(without_response)
    assert prompt.stop_strings == STOP_STRINGS[name]


@pytest.mark.parametrize('name', FORMATS)
def test_generation_text_is_a_prefix_of_the_training_text(name: str) -> None:
    for cls in PROMPTS.values():
        prompt = cls(format=FORMATS[name]())
        history = [{'input': 'a', 'response': 'b'}]
        assert prompt.render('Q', 'R', ['C'], history).startswith(prompt.render('Q', None, ['C'], history))


def test_several_turns_have_bos_and_eos_each() -> None:
    prompt = Prompt(system_message='S', format=Llama2Format())
    assert prompt.render('q2', None, history=[Message('q1', 'a1')]) == '<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nq1 [/INST] a1 </s><s>[INST] q2 [/INST]'


def test_examples_come_first_and_take_the_system_message() -> None:
    style = UserAssistantFormat(examples=Role('Examples:\n', '\nEnd.'))
    prompt = Prompt(system_message='S', examples=[{'input': 'a', 'response': 'b', 'contexts': ['c']}], format=style)
    assert prompt.render('q', 'r') == 'Examples:\nS\nUser: c\na\nAssistant: b\nEnd.\nUser: q\nAssistant: r'


def test_contexts_and_system_outside_or_inside_the_input_role() -> None:
    outside = UserAssistantFormat(nested_contexts=False, contexts=Role('<c>', '</c>'), content_separator=' | ')
    assert Prompt('S', format=outside).render('q', contexts=['a', 'b']) == 'S\n<c>a | b</c>\nUser: q\nAssistant:'
    inside = UserAssistantFormat(nested_system=True, system=Role('(', ')'), content_separator=' | ')
    assert Prompt('S', format=inside).render('q', contexts=['a', 'b']) == 'User: (S) | a | b | q\nAssistant:'


def test_templates() -> None:
    prompt = DefaultPrompt(context_template='[{index}] {text}')
    assert prompt.render('q', 'r', ['x', 'y']) == '[1] x\n[2] y\nInput: q\nResponse: r'
    assert DefaultPrompt().render('q', None, ['x']) == 'Context: x\nInput: q\nResponse:'
    assert Prompt(text_key='body', input_template='{body}!', context_template='{body}', response_template='{body}').render('{q}', 'r') == '{q}!\nr'
    assert Prompt(input_template='{question} ({unit})').render({'question': 'How far?', 'unit': 'km'}) == 'How far? (km)'
    with pytest.raises(ValueError, match="input_template='Input:' has no place for the text: write {text} where it belongs"):
        Prompt(input_template='Input:')
    with pytest.raises(ValueError, match=r"the template '\{question\}' asks for 'question'; there is text"):
        Prompt(input_template='{question}').render('q')


def test_question_prompts() -> None:
    assert ZeroShotQA().render('Why?', None, ['x']).endswith('Context 1: x\nQuestion: Why?\nAnswer:')
    few = FewShotQA()
    assert few.render('Why?').startswith(few.system_message + '\nContext 1: ') and few.render('Why?').count('Question:') == 3
    assert few.render('Why?').count(few.system_message) == 1
    assert StandaloneQuestion().render('And there?').endswith('Follow-up question: And there?\nStandalone question:')


def test_roles_from_yaml_values() -> None:
    style = PromptFormat(input={'prefix': ' > ', 'strip_text': False}, response='< ', strip_stop_strings=False)
    assert Prompt(format=style).render(' q ', 'r') == '>  q \n< r'
    assert style.stop_strings == [' > ', '< ']
    with pytest.raises(TypeError, match='a role is a mapping with prefix, suffix and strip_text, or the prefix alone; got int 3'):
        PromptFormat(input=3)
    with pytest.raises(TypeError, match='contexts is a list of texts, got str'):
        Prompt(examples=[{'input': 'a', 'contexts': 'b'}])
    with pytest.raises(TypeError, match='a message is a mapping with input, response and contexts, got'):
        Prompt(examples=[{'question': 'a'}])


def test_conversation_forgets_old_turns_and_contexts() -> None:
    talk = Conversation(DefaultPrompt(format=ChatMLFormat()), message_retention=2, context_retention=1)
    for turn in range(3):
        text = talk.ask(f'q{turn}', [f'c{turn}'])
        assert text.endswith(f'Context: c{turn}\nInput: q{turn}<|im_end|>\n<|im_start|>assistant\nResponse:')
        talk.answer(f'a{turn}')
    assert 'q0' not in talk.render() and 'c1' not in talk.render() and 'a1' in talk.render() and 'c2' in talk.render()
    assert (Conversation().message_retention, Conversation().context_retention) == (5, 1)
    assert Conversation(context_retention=0, messages=[Message('q', None, ('c',))]).render() == 'Input: q\nResponse:'
    with pytest.raises(ValueError, match='there is no question that waits for an answer'):
        talk.answer('again')
    with pytest.raises(ValueError, match='message_retention must be at least 1'):
        Conversation(message_retention=0)


@pytest.mark.parametrize(('model', 'expected'), [
    ('lmsys/vicuna-13b-v1.5', 'VicunaFormat'), ('meta-llama/Llama-2-7b-hf', 'PromptFormat'), ('meta-llama/Llama-2-70b-chat-hf', 'Llama2Format'),
    ('togethercomputer/LLaMA-2-7B-32K', 'PromptFormat'), ('togethercomputer/Llama-2-7B-32K-Instruct', 'TogetherLlama2Format'),
    ('togethercomputer/RedPajama-INCITE-7B-Chat', 'RedpajamaFormat'), ('mosaicml/mpt-7b-instruct', 'DollyFormat'), ('mosaicml/mpt-30b-chat', 'ChatMLFormat'),
])  # fmt: skip
def test_format_of_a_family(model: str, expected: str) -> None:
    assert type(default_format(model)).__name__ == expected
    assert default_format('my/own-model') is None
