"""Prints the peak memory of a process, in MiB, before and after a loss over many words."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from expertmesh.kernels.cross_entropy import linear_cross_entropy, token_loss


def peak_mib() -> float:
    """Of this program: ``ru_maxrss`` would begin with that of the process which started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def main(kind: str, num_tokens: int, num_words: int) -> None:
    hidden_ND = torch.randn(num_tokens, 8, requires_grad=True)
    weight_VD = torch.randn(num_words, 8, requires_grad=True)
    targets_N = torch.randint(num_words, (num_tokens,))
    # Products allocate scratch space of their own the first time.
    token_loss(F.linear(hidden_ND[:8], weight_VD), targets_N[:8]).backward()
    before = peak_mib()
    if kind == "chunked":
        loss = linear_cross_entropy(hidden_ND, weight_VD, targets_N, logits_at_once=1 << 18)
    else:
        loss = token_loss(F.linear(hidden_ND, weight_VD), targets_N)
    loss.backward()
    print(peak_mib() - before)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
