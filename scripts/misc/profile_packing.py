"""Tries packing ratios on the data of a config and prints padding and waste for each; see --help."""

import sys

from llmfoundry.command_utils.profile_packing import main

if __name__ == '__main__':
    sys.exit(main())
