"""How long training stands still for a checkpoint: blocking and in the background, in one run."""

from llmfoundry.command_utils.save_stall import main

if __name__ == '__main__':
    main()
