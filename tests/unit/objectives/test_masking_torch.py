import numpy as np
import pytest
import torch

from dstrain.base.protocols import IGNORED_LABEL
from dstrain.objectives.masking import Masking
from dstrain.objectives.masking_config import MaskingConfig
from dstrain.objectives.masking_torch import PieceTensors, TorchMasking
from tests.support.fake_gpu import GPU, fake_gpu
from tests.support.packed_pieces import pieces_of

VOCAB, MASK, SPECIAL = 1000, 4, (0, 1, 2, 3, 4, 999)
WORDS = np.arange(VOCAB) % 3 == 0
KINDS = [
    {"spans": spans, "whole_word": words, "replace": replace}
    for spans in (False, True)
    for words in (False, True)
    for replace in ("token", "unit")
]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(str(value) for value in kind.values()))
SCHEDULE = {
    "mask_share": 0.5,
    "random_share": 0.3,
    "mask_rate_final": 0.1,
    "mask_rate_steps": 100,
    "mask_rate_shape": "cosine",
}


def masking(**settings):
    config = MaskingConfig(**SCHEDULE | settings)
    return Masking(config, seed=11, stream="t", mask_id=MASK, special_ids=SPECIAL, vocab_size=VOCAB)


def pieces(n=150, *, head=1, tail=1):
    """Pieces that begin anywhere in their documents, with identities of every sign and size."""
    rng = np.random.default_rng(n)
    whole = [rng.integers(0, VOCAB, rng.integers(2, 120)) for _ in range(n)]
    starts = [int(rng.integers(0, len(document))) for document in whole]
    return pieces_of(
        [document[start:] for document, start in zip(whole, starts)], starts=starts,
        before=[document[:start] for document, start in zip(whole, starts)], word_starts=WORDS,
        uids=rng.integers(-(2**63), 2**63, n), epochs=rng.integers(0, 2**32, n), head=head, tail=tail,
    )  # fmt: skip


def assert_equal(batch, law, *, device, call=None):
    on_device = TorchMasking(law, device)
    tensors = PieceTensors.of(batch, device)
    for step in (0, 40, 1000):
        expected = law(batch, step=step)
        inputs, labels = (call or on_device)(tensors, on_device.limits(step))
        np.testing.assert_array_equal(inputs.cpu().numpy(), expected.tokens)
        labels = labels.cpu().numpy()
        np.testing.assert_array_equal(np.flatnonzero(labels != IGNORED_LABEL), expected.targets)
        np.testing.assert_array_equal(labels[expected.targets], expected.labels)
        assert len(expected.targets) > 50


@kinds
@pytest.mark.parametrize(("head", "tail"), [(1, 1), (0, 0), (2, 3)])
def test_tensors_get_the_masks_of_numpy(kind, head, tail):
    assert_equal(pieces(head=head, tail=tail), masking(**kind), device="cpu")


def test_without_word_positions_whole_words_fall_back_to_tokens_as_in_numpy():
    plain = pieces_of([np.arange(5, 400), np.arange(9, 300)])
    assert_equal(plain, masking(whole_word=True), device="cpu")


def test_an_empty_micro_batch_stays_empty():
    law = TorchMasking(masking(spans=True), "cpu")
    inputs, labels = law(PieceTensors.of(pieces_of([]), "cpu"), law.limits(0))
    assert (inputs.shape, labels.shape) == ((0,), (0,))


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[-1]], ids=["tokens", "spans of words"])
def test_the_compiler_takes_it_whole_and_once_for_all_steps(kind):
    law, batch = masking(**kind), pieces()
    on_device = TorchMasking(law, "cpu")
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda tensors, limits: on_device(tensors, limits), backend=count, fullgraph=True)
    assert_equal(batch, law, device="cpu", call=compiled)
    assert len(graphs) == 1


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[-1]], ids=["tokens", "spans of words"])
def test_on_a_gpu_that_is_not_there_nothing_waits_for_the_host(kind):
    batch = pieces(n=3)
    with fake_gpu():
        law = TorchMasking(masking(**kind), "cuda")
        inputs, labels = law(PieceTensors.of(batch, "cuda"), law.limits(7))
    assert (inputs.device, labels.device) == (GPU, GPU)
    assert inputs.shape == labels.shape == batch.tokens.shape


@pytest.mark.gpu
@kinds
def test_a_gpu_gets_the_masks_of_numpy_without_waiting_for_the_host(kind):
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here")
    law, batch = masking(**kind), pieces()
    assert_equal(batch, law, device="cuda")
    on_device = TorchMasking(law, "cuda")
    tensors, limits = PieceTensors.of(batch, "cuda"), on_device.limits(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_device(tensors, limits)
    finally:
        torch.cuda.set_sync_debug_mode("default")
