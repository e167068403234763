"""Run in the place of train.py by test_launching.py: ranks join and add up, and the first says what it was given."""

import sys

import torch

from mimicmotion.ranks.distributed import join_ranks

if __name__ == "__main__":
    with join_ranks() as ranks:
        total = int(ranks.sum(torch.tensor([float(10**ranks.rank)])))
        if ranks.is_first:
            print("joined", total, ranks.world_size, *sys.argv[1:])
