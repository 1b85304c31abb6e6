"""``llmfoundry data_prep``: the converters of scripts/data_prep as sub-commands, and ``austen`` for the shipped corpus.

Only signatures live here, so ``--help`` answers at once; flags may be written with underscores (as the scripts have them) or hyphens. Values of
``--splits`` may be separated by commas, by spaces, or given by repeating the flag.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from llmfoundry.typed_registry import resolve_target

__all__ = ['app']

_HOME = 'llmfoundry.command_utils.data_prep'
app = typer.Typer(help='Convert text to MDS shards.', no_args_is_help=True)


def _flag(name: str, help: str = '') -> Any:
    return typer.Option(f'--{name}', f'--{name.replace("_", "-")}', help=help)


def _switch(name: str, help: str = '') -> Any:
    return typer.Option(f'--{name}/--no-{name}', f'--{name.replace("_", "-")}', help=help, show_default=False)


def _run(target: str, **arguments: Any) -> None:
    command = resolve_target(f'{_HOME}.{target}')
    resolve_target(f'{_HOME}.options:exit_on_user_errors')(lambda: command(**arguments))


OutRoot = Annotated[str, _flag('out_root', 'Folder or URI of the shards.')]
Compression = Annotated[str | None, _flag('compression', 'Of the shards: zstd, gz, bz2, br, snappy, with a level as in zstd:7; "" for none.')]
Tokens = Annotated[int, _flag('concat_tokens', 'Cut into samples of this many tokens.')]
OptionalTokens = Annotated[int | None, _flag('concat_tokens', 'Tokenise, and cut into samples of this many tokens.')]
Tokenizer = Annotated[str, _flag('tokenizer', 'llmfoundry://gpt2, a local folder, or a name on the Hugging Face Hub.')]
OptionalTokenizer = Annotated[str | None, _flag('tokenizer', 'llmfoundry://gpt2, a local folder, or a name on the Hugging Face Hub.')]
BosText = Annotated[str | None, _flag('bos_text', 'Text to put before each document.')]
EosText = Annotated[str | None, _flag('eos_text', 'Text to put after each document.')]
NoWrap = Annotated[bool, _flag('no_wrap', 'Drop what is left of a document at each cut.')]
Processes = Annotated[int | None, _flag('processes', 'Tokenising processes (default: one per core); the shards do not depend on it.')]
OnBadRow = Annotated[str, _flag('on_bad_row', 'stop at an unusable row, or skip, count and list it.')]


@app.command('convert_dataset_hf', context_settings={'allow_extra_args': True})
def convert_dataset_hf(
    context: typer.Context,
    dataset: Annotated[str, _flag('dataset', 'allenai/c4 (or c4), the_pile, or a folder or URI with files per split.')],
    out_root: OutRoot,
    data_subset: Annotated[str | None, _flag('data_subset', 'Configuration on the Hub, such as en.')] = None,
    splits: Annotated[list[str], _flag('splits', 'Separated by commas or spaces.')] = ['train, train_small, val, val_small, val_xsmall'],  # noqa: B006
    compression: Compression = None,
    concat_tokens: OptionalTokens = None,
    tokenizer: OptionalTokenizer = None,
    tokenizer_kwargs: Annotated[str | None, _flag('tokenizer_kwargs', 'JSON object.')] = None,
    bos_text: BosText = None,
    eos_text: EosText = None,
    no_wrap: NoWrap = False,
    num_workers: Annotated[
        int | None, typer.Option('--num_workers', '--num-workers', '--processes', help='Tokenising processes (default: one per core).')
    ] = None,
    on_bad_row: OnBadRow = 'stop',
) -> None:
    """C4, the Pile, or a folder with files per split -> one folder of shards per split."""
    _run(
        'convert_dataset_hf:convert_dataset_hf_from_args',
        dataset=dataset,
        data_subset=data_subset,
        splits=[*splits, *context.args],
        out_root=out_root,
        compression=compression,
        concat_tokens=concat_tokens,
        tokenizer=tokenizer,
        tokenizer_kwargs=tokenizer_kwargs,
        bos_text=bos_text,
        eos_text=eos_text,
        no_wrap=no_wrap,
        processes=num_workers,
        on_bad_row=on_bad_row,
    )


@app.command('convert_dataset_json')
def convert_dataset_json(
    path: Annotated[str, _flag('path', 'File, folder or URI of .json/.jsonl, plain or compressed.')],
    out_root: OutRoot,
    concat_tokens: Tokens,
    tokenizer: Tokenizer,
    compression: Compression = 'zstd',
    split: Annotated[str, _flag('split', 'Which files of the folder, if their names carry split names.')] = 'train',
    bos_text: BosText = None,
    eos_text: EosText = None,
    no_wrap: NoWrap = False,
    processes: Processes = None,
    on_bad_row: OnBadRow = 'stop',
) -> None:
    """JSON rows with a "text" -> shards in OUT_ROOT."""
    _run(
        'convert_dataset_json:convert_dataset_json_from_args',
        path=path,
        out_root=out_root,
        compression=compression,
        concat_tokens=concat_tokens,
        split=split,
        tokenizer=tokenizer,
        bos_text=bos_text,
        eos_text=eos_text,
        no_wrap=no_wrap,
        processes=processes,
        on_bad_row=on_bad_row,
    )


@app.command('convert_finetuning_dataset')
def convert_finetuning_dataset(
    dataset: Annotated[str, _flag('dataset', 'Name on the Hub; json, csv or parquet with --data_files; or a file, folder or URI.')],
    out_root: OutRoot,
    data_subset: Annotated[str | None, _flag('data_subset', 'Configuration on the Hub.')] = None,
    splits: Annotated[list[str], _flag('splits', 'Separated by commas.')] = ['train,validation'],  # noqa: B006
    preprocessor: Annotated[
        str | None, _flag('preprocessor', 'Registered name, package.module:function, or a JSON map {"prompt": COLUMN, "response": COLUMN}.')
    ] = None,
    data_files: Annotated[list[str], _flag('data_files', 'One file per split, separated by commas.')] = [],  # noqa: B006
    skip_preprocessing: Annotated[
        bool, typer.Option('--skip-preprocessing', '--skip_preprocessing', help='The rows hold prompt and response, or messages, already.')
    ] = False,
    local: Annotated[str | None, _flag('local', 'Folder in which to keep a copy of the shards.')] = None,
    compression: Compression = None,
    num_workers: Annotated[int | None, _flag('num_workers', 'Processes that preprocess and tokenise (default: this one).')] = None,
    tokenizer: OptionalTokenizer = None,
    tokenizer_kwargs: Annotated[str | None, _flag('tokenizer_kwargs', 'JSON object.')] = None,
    max_seq_len: Annotated[int, _flag('max_seq_len', 'Examples with nothing to train within this many tokens are left out.')] = 2048,
    target_prompts: Annotated[str, _flag('target_prompts', 'none, all or length>=N.')] = 'none',
    target_responses: Annotated[str, _flag('target_responses', 'last or all.')] = 'last',
    encoder_decoder: Annotated[bool, _flag('encoder_decoder', 'The examples are for an encoder-decoder model.')] = False,
) -> None:
    """Finetuning data (Hub, files, folder or URI) -> one folder of shards per split, as texts or tokens."""
    _run(
        'convert_finetuning_dataset:convert_finetuning_dataset_from_args',
        dataset=dataset,
        data_subset=data_subset,
        splits=splits,
        preprocessor=preprocessor,
        data_files=data_files,
        skip_preprocessing=skip_preprocessing,
        out_root=out_root,
        local=local,
        compression=compression,
        num_workers=num_workers,
        tokenizer=tokenizer,
        tokenizer_kwargs=tokenizer_kwargs,
        max_seq_len=max_seq_len,
        target_prompts=target_prompts,
        target_responses=target_responses,
        encoder_decoder=encoder_decoder,
    )


@app.command('tokenize_data')
def tokenize_data(
    input_file: Annotated[str, typer.Option('--input-file', '--input_file', '-i', help='JSON lines with "prompt" and "generation".')],
    output_file: Annotated[str, typer.Option('--output-file', '--output_file', '-o', help='Arrow file with input_ids and labels.')],
    tokenizer_path: Annotated[str, typer.Option('--tokenizer-path', '--tokenizer_path', '-t', help='Folder, name on the Hub, or llmfoundry://gpt2.')],
    max_length: Annotated[
        int, typer.Option('--max-length', '--max_length', '-l', help='Rows with more tokens are left out and counted.')
    ] = 2048,
    processes: Annotated[int | None, _flag('processes', 'Tokenising processes (default: one per core).')] = None,
) -> None:
    """Prompt/generation rows -> one Arrow file of token ids and labels."""
    _run(
        'tokenize_data:tokenize_data',
        input_file=input_file,
        output_file=output_file,
        tokenizer_path=tokenizer_path,
        max_length=max_length,
        processes=processes,
    )


@app.command('convert_text_to_mds')
def convert_text_to_mds(
    output_folder: Annotated[str, _flag('output_folder', 'Folder (empty or absent) or URI.')],
    input_folder: Annotated[str, _flag('input_folder', 'Folder or URI with .txt files at any depth.')],
    concat_tokens: Tokens,
    tokenizer: Tokenizer,
    compression: Compression = 'zstd',
    bos_text: BosText = None,
    eos_text: EosText = None,
    use_tokenizer_eos: Annotated[bool, _flag('use_tokenizer_eos', "Put the tokenizer's EOS after each file.")] = False,
    no_wrap: NoWrap = False,
    processes: Annotated[int | None, _flag('processes', 'Tokenising processes (default: all cores but two, at least 1, at most 32).')] = None,
    reprocess: Annotated[bool, _switch('reprocess', 'Convert even if the done file says that it is done.')] = False,
    trust_remote_code: Annotated[bool, _flag('trust_remote_code', "Run the tokenizer's own code from the Hub.")] = False,
    logging_level: Annotated[str, _flag('logging_level')] = 'INFO',
    on_bad_row: OnBadRow = 'stop',
) -> None:
    """A folder of .txt files -> shards in OUTPUT_FOLDER."""
    _run(
        'convert_text_to_mds:convert_text_to_mds_from_args',
        output_folder=output_folder,
        input_folder=input_folder,
        concat_tokens=concat_tokens,
        tokenizer=tokenizer,
        compression=compression,
        bos_text=bos_text,
        eos_text=eos_text,
        use_tokenizer_eos=use_tokenizer_eos,
        no_wrap=no_wrap,
        processes=processes,
        reprocess=reprocess,
        trust_remote_code=trust_remote_code,
        logging_level=logging_level,
        on_bad_row=on_bad_row,
    )


@app.command('austen')
def austen(
    out_root: OutRoot,
    concat_tokens: Annotated[int, _flag('concat_tokens', 'Cut into samples of this many tokens.')] = 2048,
    tokenizer: Annotated[str, _flag('tokenizer')] = 'llmfoundry://gpt2',
    eos_text: Annotated[str, _flag('eos_text', 'Text to put after each chapter.')] = '<|endoftext|>',
    processes: Processes = None,
) -> None:
    """The shipped corpus, Jane Austen's six novels -> OUT_ROOT/train and OUT_ROOT/val (held-out chapters)."""
    _run('austen:prepare_austen', out_root=out_root, concat_tokens=concat_tokens, tokenizer=tokenizer, eos_text=eos_text, processes=processes)


@app.command('dataprep')
def dataprep(config: Annotated[str, typer.Argument(help='YAML with source_config, dataset_writer_config, base_model, ...')]) -> None:
    """Rows of input, contexts and response -> packed rows of token ids and labels."""
    _run('dataprep.run:dataprep', config=config)
