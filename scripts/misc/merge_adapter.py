"""Merges a PEFT adapter into its base model; see --help."""

import sys

from llmfoundry.command_utils.merge_adapter import main

if __name__ == '__main__':
    sys.exit(main())
