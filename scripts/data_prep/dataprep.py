"""Renders, tokenises and packs rows of input, contexts and response: python dataprep.py CONFIG.yaml."""

from llmfoundry.command_utils.data_prep.dataprep.run import main

if __name__ == '__main__':
    main()
