"""Every exception that users of the library can meet.

``ConfigError`` (one report for all problems of a config) and ``DataError`` (a sample, its file and line) are ours; the tree under ``BaseContextualError`` keeps the names that
plug-ins and platforms catch. They carry a ``location`` (which loader) and an ``error_attribution``, and survive pickling, so
that a launcher can tell a user's mistake from ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Iterable, Sequence

ALLOWED_PROMPT_KEYS = {'prompt'}
ALLOWED_RESPONSE_KEYS = {'response', 'completion'}
ALLOWED_MESSAGES_KEYS = {'messages'}

USER_ERROR = 'UserError'
INTERNAL_ERROR = 'InternalError'
NETWORK_ERROR = 'NetworkError'
TRAIN_DATALOADER = 'TrainDataloader'
EVAL_DATALOADER = 'EvalDataloader'


@dataclass(frozen=True)
class ConfigProblem:
    """One thing that is wrong with a config.

    ``path`` is the dotted key (``train_loader.dataset.shufle``), ``message`` holds value seen, rule and remedy, ``line`` is the line of the YAML
    file, None when the key came from the command line.
    """

    path: str
    message: str
    line: int | None = None
    source: str | None = None

    def __str__(self) -> str:
        where = f' ({self.source}:{self.line})' if self.line is not None and self.source else ''
        return f'{self.path}{where}: {self.message}'


class ConfigError(ValueError):
    """All problems of a config, one per line."""

    def __init__(self, problems: Iterable[ConfigProblem] | str, source: str | None = None) -> None:
        if isinstance(problems, str):
            problems = [ConfigProblem('config', problems)]
        self.problems: list[ConfigProblem] = list(problems)
        self.source = source
        count = f'{len(self.problems)} problem' + ('s' if len(self.problems) != 1 else '')
        head = f'{count} in {source}' if source else f'{count} in the config'
        super().__init__('\n'.join([f'{head}:', *(f'  {p}' for p in self.problems)]))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems, self.source)


class DataError(ValueError):
    """A row or file that cannot be used, with the place where it is.

    Args:
        message: what is wrong and what to do about it.
        file: path of the input file.
        line: line of the file (1-based), or None.
        sample: index of the sample in its dataset, or None.
    """

    def __init__(self, message: str, file: str | None = None, line: int | None = None, sample: int | None = None) -> None:
        self.message, self.file, self.line, self.sample = message, file, line, sample
        where = file or ''
        if line is not None:
            where += f':{line}'
        if sample is not None:
            where += f' (sample {sample})'
        super().__init__(f'{where}: {message}' if where else message)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.file, self.line, self.sample)


class BaseContextualError(Exception):
    """An error that knows which loader it came from and whose it is. Subclasses keep their constructor arguments, so they pickle."""

    location: str | None = None
    error_attribution: str | None = None

    def __init__(self, message: str = '', **context: Any) -> None:
        self.message = message
        self.context = context
        for key, value in context.items():
            setattr(self, key, value)
        super().__init__(message)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.context, self.location)


def _rebuild(cls: type[BaseContextualError], message: str, context: dict[str, Any], location: str | None) -> BaseContextualError:
    error = cls.__new__(cls)
    BaseContextualError.__init__(error, message, **context)
    error.location = location
    return error


class UserError(BaseContextualError):
    """Something in the user's config or data."""

    error_attribution = USER_ERROR


class InternalError(BaseContextualError):
    """A fault of ours."""

    error_attribution = INTERNAL_ERROR


class NetworkError(BaseContextualError):
    """A service that could not be reached."""

    error_attribution = NETWORK_ERROR


# Data loading -----------------------------------------------------------------------------------------------------------------------


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

    def __init__(self, dataset_name: str, split: str | None = None) -> None:
        super().__init__(f'Your dataset (name={dataset_name}, split={split}) is misconfigured. Please check your dataset format and make sure you can load your dataset locally.', dataset_name=dataset_name, split=split)


class InvalidDatasetError(UserError):
    """A dataset in which no example is usable."""

    def __init__(self, dataset_name: str, reason: str = 'no example is left after filtering') -> None:
        super().__init__(f'The dataset {dataset_name} cannot be used: {reason}.', dataset_name=dataset_name, reason=reason)


class UnableToProcessPromptResponseError(UserError):
    """A registered preprocessing function could not read a row."""

    def __init__(self, example: Any) -> None:
        super().__init__(f'Unable to extract prompt/response from {example}', example=example)


class InvalidPromptResponseKeysError(UserError):
    """A dict ``preprocessing_fn`` whose keys are not prompt, response."""

    def __init__(self, mapping: Any, example: Any) -> None:
        super().__init__(f'Expected {mapping=} to have keys "prompt" and "response", in this order, for {example=}.', mapping=mapping, example=example)


# Example formats --------------------------------------------------------------------------------------------------------------------


class UnknownExampleTypeError(UserError):
    """The keys of an example match no format."""

    def __init__(self, example_keys: Any) -> None:
        keys = sorted(map(str, example_keys))
        super().__init__(
            f'Found keys {keys} in dataset. Unknown example type. For prompt and response finetuning, the valid prompt keys are {sorted(ALLOWED_PROMPT_KEYS)} and the valid '
            f'response keys are {sorted(ALLOWED_RESPONSE_KEYS)}. For chat finetuning, the allowed keys are {sorted(ALLOWED_MESSAGES_KEYS)}.',
            example_keys=keys,
        )


class _WrongTypeError(UserError):
    """Shared form of the errors about a value of the wrong Python type."""

    template = 'Expected another type, got {}.'

    def __init__(self, wrong_type: Any) -> None:
        super().__init__(self.template.format(wrong_type), wrong_type=str(wrong_type))


class InvalidExampleTypeError(_WrongTypeError):
    """An example that is not a mapping."""

    template = 'Expected example to be a Mapping, but found {}'


class InvalidMessageTypeError(_WrongTypeError):
    """A message that is not a mapping."""

    template = 'Expected message to be a Mapping, but found {}'


class InvalidContentTypeError(_WrongTypeError):
    """Message content of the wrong type."""

    template = 'Expected content to be a string or a list, but found {}'


class InvalidPromptTypeError(_WrongTypeError):
    """A prompt that is not text."""

    template = 'Expected prompt to be a string, but found {}'


class InvalidResponseTypeError(_WrongTypeError):
    """A response that is not text."""

    template = 'Expected response to be a string, but found {}'


class NotEnoughChatDataError(UserError):
    """A chat of fewer than two messages."""

    def __init__(self) -> None:
        super().__init__('Chat example must have at least two messages')


class ConsecutiveRepeatedChatRolesError(UserError):
    """The same role twice in a row."""

    def __init__(self, repeated_role: str) -> None:
        super().__init__(f'Conversation roles must alternate but found {repeated_role} repeated consecutively.', repeated_role=repeated_role)


class InvalidLastChatMessageRoleError(UserError):
    """A chat that does not end with the assistant."""

    def __init__(self, last_role: str, expected_role: Iterable[str] | str = ('assistant',)) -> None:
        expected = [expected_role] if isinstance(expected_role, str) else sorted(expected_role)
        super().__init__(f'Last message role must be one of {expected}, but got {last_role}', last_role=last_role, expected_role=expected)


class IncorrectMessageKeyQuantityError(UserError):
    """A message with other keys than role and content."""

    def __init__(self, keys: Sequence[str]) -> None:
        super().__init__(f'Expected 2 keys in message, but found {len(keys)} keys: {list(keys)}', keys=list(keys))


class InvalidRoleError(UserError):
    """A role outside the allowed ones."""

    def __init__(self, role: str, valid_roles: Iterable[str]) -> None:
        super().__init__(f'Expected role to be one of {sorted(valid_roles)} but found: {role}', role=role, valid_roles=sorted(valid_roles))


class InvalidConversationError(UserError):
    """A template that rewrites earlier turns."""

    def __init__(self, reason: str = 'the chat template does not render earlier turns as a prefix of later ones') -> None:
        super().__init__(f'Invalid conversation: {reason}.', reason=reason)


class ChatTemplateError(UserError):
    """A chat template that failed."""

    def __init__(self, template: str | None, sample: Any, inner_message: str) -> None:
        super().__init__(f'Failed to process sample {sample} with template {template}. {inner_message}', template=template, sample=sample, inner_message=inner_message)


# Text to MDS ------------------------------------------------------------------------------------------------------------------------


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


# Databricks -------------------------------------------------------------------------------------------------------------------------


class FailedToCreateSQLConnectionError(NetworkError):
    """No SQL connection."""


class FailedToConnectToDatabricksError(NetworkError):
    """No Databricks connection."""


class ClusterDoesNotExistError(UserError):
    """No such cluster."""


class ClusterInvalidAccessMode(UserError):
    """A cluster in an access mode that cannot be used."""


class FaultyDataPrepCluster(UserError):
    """The data preparation cluster failed."""


class MalformedUCTableError(UserError):
    """A Unity Catalog table that cannot be read."""


class UCNotEnabledError(UserError):
    """Unity Catalog is off."""


class DeltaTableNotFoundError(UserError):
    """No such Delta table."""


class TableDownloadError(UserError):
    """A table could not be downloaded."""


class StoragePermissionError(UserError):
    """Storage refused access."""


class InsufficientPermissionsError(UserError):
    """The user lacks a permission."""


# Training ---------------------------------------------------------------------------------------------------------------------------


class LossSpikeError(UserError):
    """Training loss spiked."""

    def __init__(self, outlier_multiplier: float, running_loss_avg: float, outlier_counter: int) -> None:
        super().__init__(
            f'Training stopped due to a loss spike. The training loss was more than {outlier_multiplier} times greater than the running average loss (approx. {running_loss_avg}) over '
            f'{outlier_counter} consecutive training steps. Please try submitting the run again with a lower learning rate.',
            outlier_multiplier=outlier_multiplier,
            running_loss_avg=running_loss_avg,
            outlier_counter=outlier_counter,
        )


class HighLossError(UserError):
    """Training loss stayed high."""

    def __init__(self, loss_cap: float, window_size: int) -> None:
        super().__init__(
            f'Training stopped due to consistently high losses. The training loss exceeded the threshold of {loss_cap} for more than half of the {window_size} most recent training steps. '
            'Please try submitting the run again with a lower learning rate.',
            loss_cap=loss_cap,
            window_size=window_size,
        )


class RunTimeoutError(InternalError):
    """The process did not exit in time after training."""

    def __init__(self, timeout: int) -> None:
        super().__init__(f'Run timed out after {timeout} seconds.', timeout=timeout)


class NaNLossError(UserError):
    """The loss is NaN or infinite; raised before the optimizer step, so the weights are those of the step before.

    ``batch`` is the step, ``rank`` the global rank that saw it.
    """

    def __init__(self, batch: int, rank: int, value: float) -> None:
        super().__init__(
            f'Train loss is {value} at batch {batch} on rank {rank}. No checkpoint was written after it: resume from the newest one with a lower learning rate or gradient clipping '
            '(algorithms.gradient_clipping), or look at the samples of that batch.',
            batch=batch,
            rank=rank,
            value=value,
        )
