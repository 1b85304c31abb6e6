"""Time from the finetuning loader's call to the first packed batch, cold and cached, the rate of batches, and their fill."""

from llmfoundry.command_utils.finetuning_benchmark import main

if __name__ == '__main__':
    main()
