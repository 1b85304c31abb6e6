"""Command line of llmfoundry.command_utils.data_prep.tokenize_data; the same as `llmfoundry data_prep tokenize_data`."""

from llmfoundry.command_utils.data_prep.tokenize_data import main

if __name__ == '__main__':
    main()
