"""Where a conversion goes: a local folder, or a staging folder that is uploaded when it is whole."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from llmfoundry.command_utils.data_prep import remote
from llmfoundry.command_utils.data_prep.engine import ConversionPlan, ConversionSummary, Source, convert, report, say
from llmfoundry.command_utils.data_prep.journal import WORK_FOLDER

__all__ = ['available_cores', 'convert_to', 'output_names']


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def output_names(output: str) -> list[str]:
    """Names that lie in the output folder or below the output URI, sorted; [] if a killed run of ours left its work there."""
    if remote.is_remote(output):
        return sorted({uri[len(output.rstrip('/')) + 1 :].split('/')[0] for uri, _ in remote.list_files(output, ('*',))})
    if not os.path.isdir(output) or os.path.isdir(os.path.join(output, WORK_FOLDER)):
        return []
    return sorted(os.listdir(output))


def convert_to(source: Source, plan: ConversionPlan, output: str, extra_files: dict[str, str] | None = None) -> ConversionSummary:
    """Converts into ``output``, which may be a URI, and reports.

    Args:
        source: the documents.
        plan: how to convert them.
        output: a folder or a URI.
        extra_files: name -> text of small files to put beside the result once it is whole.
    """
    staged = remote.is_remote(output)
    folder = remote.staging_folder(output) if staged else Path(output)
    if staged and (folder / 'index.json').exists():
        # An earlier run was killed between its conversion and the end of its upload. Its arguments are not known any more.
        shutil.rmtree(folder)
    summary = convert(source, plan, folder, extra_files)
    if staged:
        say(f'{plan.name}: uploading to {output}')
        remote.upload_folder(folder, output)
        remote.remove_staging(folder)
    report(summary, plan, output)
    return summary
