"""Command line of llmfoundry.command_utils.data_prep.convert_text_to_mds; the same as `llmfoundry data_prep convert_text_to_mds`."""

from llmfoundry.command_utils.data_prep.convert_text_to_mds import main

if __name__ == '__main__':
    main()
