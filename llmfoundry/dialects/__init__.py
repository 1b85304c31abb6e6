"""Other formats, translated into our one config."""
