"""Safe loading of Composer checkpoints and export to Hugging Face folders."""
