"""The command as document 001 prints it, python llm/training/dataprep.py CONFIG.yaml; the same as scripts/data_prep/dataprep.py."""

from llmfoundry.command_utils.data_prep.dataprep.run import main

if __name__ == '__main__':
    main()
