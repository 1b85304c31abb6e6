"""Converts a Composer checkpoint into a Hugging Face folder; see --help."""

import sys

from llmfoundry.command_utils.inference.convert_composer_to_hf import main

if __name__ == '__main__':
    sys.exit(main())
