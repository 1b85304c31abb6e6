"""Prints data preparation's rate against the raw tokenizers' on this machine; with ``--peer PYTHON``, also another release's. See llmfoundry.command_utils.data_prep.benchmark."""

from llmfoundry.command_utils.data_prep.benchmark import main

if __name__ == '__main__':
    main()
