"""Checks of data and masks that run before the first step, in seconds: what they find makes no noise in a loss curve."""
