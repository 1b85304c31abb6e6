"""Packaging metadata of LLM Foundry.

Version bounds follow what resolves with plain ``pip install -e .`` on Python 3.10-3.12. Three of them are traps worth knowing:
the caps on torch and transformers repeat those of Composer and Streaming, since pip, where it has to open a wheel to read its requirements, would
otherwise download the newest torch and some fifty releases of transformers before it learns of them (requirements/modern.txt goes beyond them,
with ``--no-deps``); ``mosaicml[nlp]`` caps transformers lower still, so Composer's own extras are never requested; a lower bound on ``datasets``
stops the resolver from falling back to a release of 2023 when an MLflow extra is asked for.
"""

import os
import re

from setuptools import find_packages, setup

_ROOT = os.path.dirname(os.path.abspath(__file__))


def _read(path: str) -> str:
    with open(os.path.join(_ROOT, path), encoding='utf-8') as f:
        return f.read()


VERSION = re.search(r"__version__ = '([^']+)'", _read('llmfoundry/_version.py')).group(1)

install_requires = [
    'mosaicml>=0.32.1,<0.33',
    'mosaicml-streaming>=0.13,<0.14',
    'torch>=2.7,<2.7.1',
    'transformers>=4.51,<5',
    'omegaconf>=2.3,<3',
    'datasets>=3',
    'zstandard>=0.19',
    'pydantic>=2.7,<3',
    'typer>=0.12,<1',
    'rich>=12',
    'matplotlib>=3.7,<4',
    'safetensors>=0.4',
    'tiktoken>=0.7,<1',
]

extras = {
    'gpu': ['flash-attn>=2.7,<3', 'liger-kernel>=0.5,<1'],
    'peft': ['peft>=0.15,<1'],
    # mlflow-skinny keeps datasets and pyarrow current, which full mlflow<3 does not; the sqlite store fails on sqlalchemy 2.1.
    'mlflow': ['mlflow-skinny>=2.22,<4', 'sqlalchemy<2.1', 'alembic'],
    'wandb': ['wandb>=0.18,<0.19'],
    'tensorboard': ['tensorboard>=2.16,<3'],
    'tiktoken': ['tiktoken>=0.7,<1'],
    # moto's own extra 'server' brings 20 packages more than its S3 needs; s3fs would move boto3.
    'dev': [
        'pytest>=8,<10', 'pytest-xdist>=3.5,<4', 'hypothesis>=6.100,<7', 'ruff>=0.6', 'jsonschema>=4.20,<5', 'trl>=1.14,<2', 'moto[s3]>=5,<6', 'flask>=3,<4', 'flask-cors>=5',
        'mlflow-skinny>=2.22,<4', 'sqlalchemy<2.1', 'alembic', 'tensorboard>=2.16,<3',
    ],
}
extras['all'] = sorted({dep for name, deps in extras.items() if name != 'gpu' for dep in deps})

setup(
    name='llm-foundry',
    version=VERSION,
    description='Pretrain, finetune, evaluate and export language models from one YAML',
    long_description=_read('README.md'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=find_packages(include=['llmfoundry', 'llmfoundry.*']),
    package_data={'llmfoundry': ['py.typed', 'assets/**/*']},
    include_package_data=True,
    python_requires='>=3.10',
    install_requires=install_requires,
    extras_require=extras,
    entry_points={'console_scripts': ['llmfoundry=llmfoundry.cli:main', 'merge_adapter=llmfoundry.command_utils.merge_adapter:main']},
)
