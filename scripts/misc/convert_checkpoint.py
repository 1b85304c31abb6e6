"""Converts a training checkpoint between one file and a sharded folder; see --help."""

import sys

from llmfoundry.command_utils.convert_checkpoint import main

if __name__ == '__main__':
    sys.exit(main())
