import pytest
import torch

from dstrain.base.protocols import IGNORED_LABEL, MicroBatch
from dstrain.objectives.supervised import ClassificationObjective, RegressionObjective


class Fixed(torch.nn.Module):
    """Answers with given logits, whatever the batch."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(logits))

    def forward(self, batch):
        return self.logits


def batch(labels, *, num_targets=None):
    labels = torch.tensor(labels)
    n = len(labels)
    return MicroBatch(
        tokens=torch.zeros(n, dtype=torch.int64),
        positions=torch.zeros(n, dtype=torch.int64),
        lengths=(1,) * n,
        targets=torch.arange(n),
        labels=labels,
        num_targets=n if num_targets is None else num_targets,
        num_tokens=n,
    )


def test_classification_sums_the_negative_log_probability_and_counts_hits():
    model = Fixed([[0.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    parts = ClassificationObjective().loss(model, batch([0, 1, 1]))
    expected = -torch.log_softmax(model.logits, dim=-1)[torch.arange(3), torch.tensor([0, 1, 1])].sum()
    assert parts.loss_sum.item() == pytest.approx(expected.item())
    assert parts.correct.item() == 2.0


def test_classification_ignores_filler_in_loss_hits_and_gradient():
    model = Fixed([[1.0, 0.0], [2.0, 0.0]])
    parts = ClassificationObjective().loss(model, batch([0, IGNORED_LABEL], num_targets=1))
    parts.loss_sum.backward()
    assert parts.loss_sum.item() == pytest.approx(-torch.log_softmax(model.logits, dim=-1)[0, 0].item())
    assert parts.correct.item() == 1.0
    assert model.logits.grad[1].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("objective", "logits", "label"),
    [(ClassificationObjective(), [[1.0, 5.0]], IGNORED_LABEL), (RegressionObjective(), [[7.0]], float(IGNORED_LABEL))],
)
def test_a_batch_of_filler_alone_weighs_nothing_but_can_be_differentiated(objective, logits, label):
    model = Fixed(logits)
    parts = objective.loss(model, batch([label], num_targets=0))
    parts.loss_sum.backward()
    assert parts.loss_sum.item() == 0.0
    assert parts.correct.item() == 0.0
    assert model.logits.grad.abs().sum().item() == 0.0


def test_regression_sums_squared_errors():
    parts = RegressionObjective().loss(Fixed([[1.0], [2.5]]), batch([0.0, 3.0]))
    assert parts.loss_sum.item() == pytest.approx(1.25)
    assert parts.correct.item() == 0.0


def test_minus_100_is_a_value_where_every_label_counts():
    parts = RegressionObjective().loss(Fixed([[-98.0], [0.0]]), batch([-100.0, 0.0]))
    assert parts.loss_sum.item() == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("objective", "labels", "logits"),
    [
        (ClassificationObjective(), [0, 1], [[0.5, 1.0], [1.0, 0.0]]),
        (RegressionObjective(), [0.5, 2.0], [[0.1], [3.0]]),
    ],
)
def test_losses_are_fp32_under_half_precision_logits(objective, labels, logits):
    parts = objective.loss(Fixed(logits).to(torch.bfloat16), batch(labels))
    assert parts.loss_sum.dtype == parts.correct.dtype == torch.float32


def test_sums_of_micro_batches_add_up_to_the_whole():
    logits, labels = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).tolist(), [0, 1, 2, 2, 1, 0]
    whole = ClassificationObjective().loss(Fixed(logits), batch(labels))
    halves = [ClassificationObjective().loss(Fixed(logits[p]), batch(labels[p])) for p in (slice(0, 3), slice(3, 6))]
    assert sum(h.loss_sum.item() for h in halves) == pytest.approx(whole.loss_sum.item())
    assert sum(h.correct.item() for h in halves) == whole.correct.item()
