"""Command line of llmfoundry.command_utils.data_prep.convert_dataset_hf; the same as `llmfoundry data_prep convert_dataset_hf`."""

from llmfoundry.command_utils.data_prep.convert_dataset_hf import main

if __name__ == '__main__':
    main()
