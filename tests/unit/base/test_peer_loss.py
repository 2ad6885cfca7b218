"""What counts as the loss of a peer: errors of gloo, NCCL and torch's store that speak of it, and nothing else."""

from __future__ import annotations

import pytest
from torch import distributed

from dstrain.base.errors import PeerGoneError
from dstrain.base.peer_loss import is_peer_loss, peer_loss_named

GLOO = "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/"
LOST = [
    RuntimeError(
        f"{GLOO}pair.cc:553] Connection closed by peer [127.0.0.1]:19347. This is typically caused by a remote worker "
        "crashing. Check the logs of the remote worker before reporting an error. GLHF!"
    ),
    RuntimeError(f"{GLOO}pair.cc:537] Read error [127.0.0.1]:49061: Connection reset by peer. This is typically"),
    RuntimeError(f"{GLOO}pair.cc:490] writev [127.0.0.1]:49061: Broken pipe"),
    RuntimeError(f"{GLOO}unbound_buffer.cc:78] Timed out waiting 3000ms for recv operation to complete"),
    RuntimeError("Application timeout caused pair closure"),
    distributed.DistBackendError(
        "NCCL error in: ProcessGroupNCCL.cpp:2150, remote process exited or there was a network error, NCCL version 2.27"
    ),
    distributed.DistBackendError("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=4, OpType=ALLREDUCE)"),
    distributed.DistBackendError("NCCL communicator was aborted on rank 0"),
    distributed.DistNetworkError("failed to recv, got 0 bytes"),
    distributed.DistStoreError("wait timeout after 300000ms, keys: /default_pg/0//worker_count"),
]
OTHER = [
    RuntimeError("Connection reset by peer"),  # of some library: nobody knows whose
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    RuntimeError("ProcessGroupGloo::allgather: invalid tensor size at index 0 (expected (9), got (4))"),
    RuntimeError(f"{GLOO}pair.cc:421] op.preamble.length <= op.nbytes. 36 vs 16"),
    ConnectionResetError("Connection reset by peer"),
    TimeoutError("timed out"),
    distributed.DistBackendError(
        "NCCL error: unhandled cuda error (run with NCCL_DEBUG=INFO), Cuda failure 'out of memory'"
    ),
    distributed.DistNetworkError("The server socket has failed to listen on any local network address. EADDRINUSE"),
]


@pytest.mark.parametrize("error", LOST, ids=lambda error: str(error)[-40:])
def test_a_lost_or_late_peer_is_told_with_the_place_and_without_the_libraries_words_around_it(error):
    assert is_peer_loss(error)
    with (
        pytest.raises(PeerGoneError, match="noticed in phase step of step 7") as caught,
        peer_loss_named(lambda: "in phase step of step 7"),
    ):
        raise error
    assert caught.value.__suppress_context__  # no traceback of torch
    assert "GLHF" not in str(caught.value)
    assert "third_party" not in str(caught.value)


@pytest.mark.parametrize("error", OTHER, ids=lambda error: str(error)[-40:])
def test_any_other_error_stays_the_defect_that_it_is(error):
    assert not is_peer_loss(error)
    with pytest.raises(type(error)) as caught, peer_loss_named(lambda: "anywhere"):
        raise error
    assert caught.value is error


def test_a_subclass_of_runtime_error_that_quotes_gloo_is_not_glooes():
    assert not is_peer_loss(NotImplementedError(str(LOST[0])))
