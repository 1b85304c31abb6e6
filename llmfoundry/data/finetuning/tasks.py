"""``dataset_constructor``: where users register preprocessing functions, and data sets are built from code.

Data sets are reached through target strings, as in the registries, so that registering a function or listing the names loads neither torch nor Composer.
"""

from __future__ import annotations

from typing import Any, Callable, Mapping

from llmfoundry.data.finetuning import preprocessing
from llmfoundry.data.finetuning.preprocessing import PreprocessingFn, QA_format_preprocessor, messages_format_preprocessor
from llmfoundry.data.finetuning.tokenization import is_valid_ift_example, tokenize_formatted_example
from llmfoundry.lazy import lazy_exports
from llmfoundry.typed_registry import resolve_target

_lazy_attribute, _, _LAZY = lazy_exports(
    __name__,
    {
        'HUGGINGFACE_FOLDER_EXTENSIONS': 'llmfoundry.data.finetuning.safe_load',
        'SUPPORTED_EXTENSIONS': 'llmfoundry.data.finetuning.safe_load',
        'StreamingFinetuningDataset': 'llmfoundry.data.finetuning.streaming_dataset',
    },
)

__all__ = [
    'DatasetConstructor',
    'QA_format_preprocessor',
    'dataset_constructor',
    'is_valid_ift_example',
    'messages_format_preprocessor',
    'tokenize_formatted_example',
    *_LAZY,
]


def __getattr__(name: str) -> Any:
    return _lazy_attribute(name)


class DatasetConstructor:
    """Registered preprocessing functions, and the data sets that use them.

    ``dataset_constructor`` is the one instance; all instances share the registered functions.
    """

    def register(self, *names: str) -> Callable[[PreprocessingFn], PreprocessingFn]:
        """Decorator that registers a preprocessing function: ``row -> example``, or ``row, tokenizer -> tokenizer(text=..., text_target=...)``.

        Args:
            *names: what ``preprocessing_fn`` or ``dataset.name`` call it in a YAML; the name of a Hub data set applies it to that data set.

        Raises:
            ValueError: a name is taken.
        """
        return preprocessing.register(*names)

    def print_registered_tasks(self) -> None:
        """Prints the registered names, sorted, one per line."""
        print('\n'.join(preprocessing.registered_names()))

    def get_preprocessing_fn_from_dict(self, mapping: Mapping[str, str]) -> PreprocessingFn:
        """A function that takes prompt and response from the columns that ``mapping`` names; its keys must be prompt and response, in this order."""
        return preprocessing.from_column_map(mapping)

    def get_preprocessing_fn_from_str(self, preprocessor: str | None, dataset_name: str | None = None) -> PreprocessingFn | None:
        """The function registered as ``preprocessor``, else the one at that import path; without ``preprocessor``, the one of ``dataset_name``, else None.

        Raises:
            ValueError: neither registered nor importable.
        """
        return preprocessing.from_name(preprocessor, dataset_name)

    def build_from_hf(self, *args: Any, **kwargs: Any) -> Any:
        """Builds a tokenised data set from the Hub or from files: see ``hf_dataset.build_hf_dataset``."""
        return resolve_target('llmfoundry.data.finetuning.hf_dataset:build_hf_dataset')(*args, **kwargs)

    def build_from_streaming(self, *args: Any, **kwargs: Any) -> Any:
        """Builds a StreamingFinetuningDataset: see there."""
        return resolve_target('llmfoundry.data.finetuning.streaming_dataset:StreamingFinetuningDataset')(*args, **kwargs)


dataset_constructor = DatasetConstructor()
