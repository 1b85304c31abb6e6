"""Errors about datasets and files: what cannot be found, read, or is too small."""

from __future__ import annotations

from typing import Any, Sequence

from llmfoundry.errors.base import UserError

# An error about a huge row has to stay readable.
_LONGEST_EXAMPLE_SHOWN = 2000


class MissingHuggingFaceURLSplitError(UserError):
    """A Hugging Face dataset without ``split``."""

    def __init__(self) -> None:
        super().__init__('When using a HuggingFace dataset from a URL, you must set the `split` key in the dataset config.')


class NotEnoughDatasetSamplesError(UserError):
    """``drop_last`` would leave no batch."""

    def __init__(self, dataset_name: str, split: str | None, dataloader_batch_size: int, world_size: int, full_dataset_size: int, minimum_dataset_size: int) -> None:
        super().__init__(
            f'Your dataset (name={dataset_name}, split={split}) has {full_dataset_size} samples, but your minimum batch size is '
            f'{minimum_dataset_size} because you are running on {world_size} gpus and your per device batch size is {dataloader_batch_size}. '
            f'Please increase the number of samples in your dataset to at least {minimum_dataset_size}.',
            dataset_name=dataset_name,
            split=split,
            dataloader_batch_size=dataloader_batch_size,
            world_size=world_size,
            full_dataset_size=full_dataset_size,
            minimum_dataset_size=minimum_dataset_size,
        )


class DatasetTooSmallError(UserError):
    """Fewer samples than nodes, or nothing to write."""

    def __init__(self, reason: str) -> None:
        super().__init__(f'Dataset is too small: {reason}', reason=reason)


class InvalidFileExtensionError(UserError):
    """``safe_load`` met a file type that it does not allow."""

    def __init__(self, dataset_name: str, valid_extensions: Sequence[str]) -> None:
        super().__init__(
            f'safe_load is set to True. No data files with safe extensions {list(valid_extensions)} found for dataset at local path {dataset_name}.',
            dataset_name=dataset_name,
            valid_extensions=list(valid_extensions),
        )


class FinetuningFileNotFoundError(UserError):
    """No finetuning file under any supported extension."""

    def __init__(self, files_searched: Sequence[str]) -> None:
        super().__init__(f"Could not find a finetuning file. Looked for: {', '.join(files_searched)}.", files_searched=list(files_searched))


class MisconfiguredHfDatasetError(UserError):
    """Hugging Face datasets could not build the dataset."""

    def __init__(self, dataset_name: str, split: str | None = None, reason: str | None = None) -> None:
        message = f'Your dataset (name={dataset_name}, split={split}) is misconfigured. Please check your dataset format and make sure you can load your dataset locally.'
        super().__init__(message + (f' Reason: {reason}' if reason else ''), dataset_name=dataset_name, split=split, reason=reason)


class InvalidDatasetError(UserError):
    """A dataset in which no example is usable."""

    def __init__(self, dataset_name: str, reason: str = 'no example is left after filtering') -> None:
        super().__init__(f'The dataset {dataset_name} cannot be used: {reason}.', dataset_name=dataset_name, reason=reason)


class UnableToProcessPromptResponseError(UserError):
    """A preprocessing function could not read a row; ``reason`` says why, where it is known."""

    def __init__(self, example: Any, reason: str = '') -> None:
        shown = str(example)
        if len(shown) > _LONGEST_EXAMPLE_SHOWN:
            shown = f'{shown[:_LONGEST_EXAMPLE_SHOWN]}... ({len(shown)} characters)'
        super().__init__(f'Unable to extract prompt/response from {shown}' + (f': {reason}' if reason else ''), example=example, reason=reason)


class InvalidPromptResponseKeysError(UserError):
    """A dict ``preprocessing_fn`` whose keys are not prompt, response."""

    def __init__(self, mapping: Any, example: Any) -> None:
        super().__init__(f'Expected {mapping=} to have keys "prompt" and "response", in this order, for {example=}.', mapping=mapping, example=example)


class InputFolderMissingDataError(UserError):
    """No text file below the input folder."""

    def __init__(self, input_folder: str) -> None:
        super().__init__(f'No text files were found at {input_folder}.', input_folder=input_folder)


class InputFolderNotFound(UserError):
    """The input folder does not exist."""

    def __init__(self, input_folder: str) -> None:
        super().__init__(f'{input_folder} not found.', input_folder=input_folder)


class OutputFolderNotEmptyError(UserError):
    """The output folder already holds something."""

    def __init__(self, output_folder: str) -> None:
        super().__init__(f'{output_folder} is not empty. Please remove or empty it and retry.', output_folder=output_folder)


class CannotUnicodeDecodeFile(UserError):
    """A text file that is not UTF-8."""

    def __init__(self, text_file: str) -> None:
        super().__init__(f'Text file {text_file} does not contain valid UTF-8. Please re-encode it.', text_file=text_file)
