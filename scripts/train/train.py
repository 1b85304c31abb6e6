"""Trains from a YAML: composer train.py CONFIG.yaml [key=value ...]."""

from llmfoundry.command_utils.train_command import main

if __name__ == '__main__':
    main()
