"""Command line of llmfoundry.command_utils.data_prep.convert_finetuning_dataset; the same as `llmfoundry data_prep convert_finetuning_dataset`."""

from llmfoundry.command_utils.data_prep.convert_finetuning_dataset import main

if __name__ == '__main__':
    main()
