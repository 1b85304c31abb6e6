"""Command line of llmfoundry.command_utils.data_prep.convert_dataset_json; the same as `llmfoundry data_prep convert_dataset_json`."""

from llmfoundry.command_utils.data_prep.convert_dataset_json import main

if __name__ == '__main__':
    main()
