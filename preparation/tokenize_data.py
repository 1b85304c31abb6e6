"""The path under which document 004 names scripts/data_prep/preparation/tokenize_data.py."""

from llmfoundry.command_utils.data_prep.tokenize_data import main

if __name__ == '__main__':
    main()
