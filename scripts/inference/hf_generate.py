"""Generates text from a Hugging Face model or folder; see --help."""

import sys

from llmfoundry.command_utils.inference.hf_generate import main

if __name__ == '__main__':
    sys.exit(main())
