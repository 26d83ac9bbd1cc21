"""Replicas that have another code or another PyTorch are named by all: three processes."""

import torch

from byol_func.errors import UserError
from byol_func.training import agreement
from golden_processes import run_in_processes


def _messages(rank: int) -> list[str]:
    """What the replica says when the last one, and then the first one, is another."""
    found = []
    version, code = torch.__version__, agreement._code
    for odd in (2, 0):
        if rank == odd:
            torch.__version__ = '1.0' if odd else version
            agreement._code = code if odd else lambda: b'edited'
        try:
            agreement.agree({'w': torch.zeros(2)}, 0, {'batch_size': 8}, {})
        except UserError as error:
            found.append(str(error))
        torch.__version__, agreement._code = version, code
    agreement.agree({'w': torch.zeros(2)}, 0, {'batch_size': 8}, {})
    return found


def test_the_odd_replica_is_named_by_all(tmp_path):
    advice = 'start all replicas with the same command, code and data'
    for found in run_in_processes(_messages, 3, tmp_path):
        assert found == [
            f'replica 2: version of torch differs from that of replica 0; {advice}',
            f'replica 0: code of byol_func differs from that of replica 1; {advice}',
        ]
