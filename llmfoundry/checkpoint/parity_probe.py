"""Runs an exported folder in a process of its own, in which ``llmfoundry`` cannot be imported, and writes down what it computes.

Started by ``parity`` as a script, never imported: ``python parity_probe.py FOLDER WORK_FOLDER``. It stands for the machine of somebody who has transformers and
nothing of ours.
"""

import json
import os
import sys
from pathlib import Path


def block(package: str) -> None:
    """Makes ``import package`` fail, and takes this file's own folder off the path."""
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [p for p in sys.path if os.path.abspath(p or os.getcwd()) != here]
    sys.modules[package] = None  # type: ignore[assignment]


def tokenizer_facts(tokenizer, texts):
    """What must not change on the way: the special tokens, the size, the chat template and the ids of the probe texts."""
    return {
        'eos_token_id': tokenizer.eos_token_id,
        'bos_token_id': tokenizer.bos_token_id,
        'pad_token_id': tokenizer.pad_token_id,
        'length': len(tokenizer),
        'chat_template': tokenizer.chat_template,
        'ids': [tokenizer(text)['input_ids'] for text in texts],
    }


def main(folder: str, work_folder: str) -> None:
    """Loads the folder in fp32, writes logits.safetensors and facts.json into ``work_folder``."""
    block('llmfoundry')
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    work = Path(work_folder)
    options = json.loads((work / 'options.json').read_text(encoding='utf-8'))
    probe = load_file(work / 'probe.safetensors')
    trust = options['trust_remote_code']
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=trust, output_loading_info=True, **{options['dtype_key']: torch.float32}
    )
    model.eval()
    facts = {
        'missing_keys': sorted(info['missing_keys']),
        'unexpected_keys': sorted(info['unexpected_keys']),
        'mismatched_keys': sorted(map(str, info['mismatched_keys'])),
        'vocab_size': model.get_input_embeddings().weight.shape[0],
        'class': type(model).__name__,
        'generation': {k: getattr(model.generation_config, k) for k in ('eos_token_id', 'bos_token_id', 'pad_token_id')},
    }
    with torch.no_grad():
        logits = model(input_ids=probe['input_ids'], attention_mask=probe['attention_mask']).logits
        generated = model.generate(input_ids=probe['input_ids'][:1], attention_mask=probe['attention_mask'][:1], max_new_tokens=2, do_sample=False, pad_token_id=0)
    facts['generated'] = generated[0, probe['input_ids'].shape[1] :].tolist()
    if options['has_tokenizer']:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
        facts['tokenizer'] = tokenizer_facts(tokenizer, options['texts'])
    save_file({'logits': logits.float().contiguous()}, work / 'logits.safetensors')
    (work / 'facts.json').write_text(json.dumps(facts), encoding='utf-8')


if __name__ == '__main__':
    main(sys.argv[1], sys.argv[2])
