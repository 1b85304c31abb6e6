"""Public import path of the arguments of megablocks' blocks, which live in ``megablocks_args``."""

from llmfoundry.models.layers.megablocks_args import config_megablocks_moe_args, config_moe_args, get_megablocks_device_mesh

__all__ = ['config_megablocks_moe_args', 'config_moe_args', 'get_megablocks_device_mesh']
