"""How long training stands still for a checkpoint: blocking and in the background, in turn, in one run of the training command.

    python scripts/train/benchmarking/save_stall.py
"""

from __future__ import annotations

import argparse

MODELS = {'tiny': {'d_model': 64, 'n_heads': 2, 'n_layers': 2}, '125m': {'d_model': 768, 'n_heads': 12, 'n_layers': 12}, '350m': {'d_model': 1024, 'n_heads': 16, 'n_layers': 24}}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--size', choices=MODELS, default='125m')
    parser.add_argument('--rounds', type=int, default=3, help='measured saves of each kind; one more of each comes first')
    parser.add_argument('--seq_len', type=int, default=64)
    parser.add_argument('--folder', default=None, help='where to write, to choose the disk')
    args = parser.parse_args()

    from llmfoundry.command_utils.save_stall import measure_stalls  # imports torch, which --help does without

    measure_stalls(args.size, MODELS[args.size], args.rounds, args.seq_len, args.folder)


if __name__ == '__main__':
    main()
