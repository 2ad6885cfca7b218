import pytest
import torch

from dstrain.base.protocols import IGNORED_LABEL, MicroBatch
from dstrain.objectives.mlm import MlmConfig, MlmObjective


class Fixed(torch.nn.Module):
    """Answers with given logits, whatever the batch."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, batch):
        return self.logits


def batch(labels):
    labels = torch.tensor(labels)
    n = len(labels)
    return MicroBatch(
        tokens=torch.zeros(n, dtype=torch.int64), positions=torch.arange(n), lengths=(n,), targets=torch.arange(n),
        labels=labels, num_targets=int((labels != IGNORED_LABEL).sum()), num_tokens=n,
    )  # fmt: skip


@pytest.fixture
def logits():
    return torch.randn(6, 11, generator=torch.Generator().manual_seed(0)) * 3


def test_the_loss_is_the_sum_over_targets_of_torchs_reference(logits):
    labels = [3, 0, 10, 5, 5, 1]
    parts = MlmObjective().loss(Fixed(logits), batch(labels))
    reference = -torch.log_softmax(logits.double(), dim=-1)[torch.arange(6), torch.tensor(labels)].sum()
    assert parts.loss_sum.item() == pytest.approx(reference.item(), rel=1e-6)


def test_ignored_labels_add_nothing_to_loss_hits_or_gradient(logits):
    labels = [3, IGNORED_LABEL, 10, IGNORED_LABEL, 5, 1]
    kept = [0, 2, 4, 5]
    model = Fixed(logits)
    parts = MlmObjective().loss(model, batch(labels))
    only = MlmObjective().loss(Fixed(logits[kept]), batch([labels[i] for i in kept]))
    torch.testing.assert_close(parts.loss_sum, only.loss_sum)
    assert parts.correct.item() == only.correct.item()
    parts.loss_sum.backward()
    assert (model.logits.grad[[1, 3]] == 0).all()
    assert (model.logits.grad[kept] != 0).any(dim=1).all()


def test_a_batch_of_only_ignored_labels_is_a_differentiable_zero(logits):
    model = Fixed(logits[:1])
    parts = MlmObjective().loss(model, batch([IGNORED_LABEL]))
    assert (parts.loss_sum.item(), parts.correct.item()) == (0.0, 0.0)
    parts.loss_sum.backward()
    assert (model.logits.grad == 0).all()


def test_hits_are_targets_whose_largest_logit_is_right(logits):
    best = logits.argmax(dim=-1).tolist()
    wrong = (best[0] + 1) % 11
    assert MlmObjective().loss(Fixed(logits), batch(best)).correct.item() == 6
    assert MlmObjective().loss(Fixed(logits), batch([wrong, *best[1:]])).correct.item() == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scores_are_fp32_whatever_the_model_computes_in(dtype, logits):
    low = logits.to(dtype)
    parts = MlmObjective().loss(Fixed(low), batch([1] * 6))
    exact = MlmObjective().loss(Fixed(low.float()), batch([1] * 6))
    assert parts.loss_sum.dtype == parts.correct.dtype == torch.float32
    assert parts.loss_sum.item() == exact.loss_sum.item()


def test_parts_add_up_over_micro_batches(logits):
    labels = [3, 0, 10, 5, 5, 1]
    whole = MlmObjective().loss(Fixed(logits), batch(labels))
    halves = [MlmObjective().loss(Fixed(logits[half]), batch(labels[half])) for half in (slice(0, 2), slice(2, 6))]
    torch.testing.assert_close(sum(part.loss_sum for part in halves), whole.loss_sum)
    assert sum(part.correct for part in halves) == whole.correct


def test_the_configuration_is_that_of_the_masks_with_a_kind():
    assert MlmConfig(mask_rate=0.2).kind == "mlm"
