"""Routes past layers: what is left out is left out, what stays is what a model without the rest would compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dstrain.base.control import ControlPlane
from dstrain.base.errors import ConfigError
from dstrain.models.blocks import compile_blocks, num_graphs
from dstrain.models.encoders import MaskedLanguageModel
from dstrain.models.layer_dropping import LayerDroppingConfig
from dstrain.models.layer_routes import LayerRoutes, find_stack
from dstrain.models.token_dropping import TokenDroppingConfig
from dstrain.objectives.mlm import MlmObjective
from dstrain.optim.config import OptimizerConfig
from dstrain.train.ds_config import EngineConfig
from dstrain.train.engine import Engine
from tests.support.tiny_models import documents, packed, step_data, tiny_encoder, tiny_model

ROUTABLE = ("bert", "roberta", "electra", "distilbert", "modernbert", "dstrain-encoder")
TOKENS = TokenDroppingConfig(first_share=0.5, steps=100)


def deep(family: str) -> MaskedLanguageModel:
    if family == "dstrain-encoder":
        return tiny_encoder(num_hidden_layers=4)  # type: ignore[return-value]
    return tiny_model(family, **({"n_layers": 4} if family == "distilbert" else {"num_hidden_layers": 4}))


def routed(family: str, *, seed: int = 0, **settings: Any) -> tuple[MaskedLanguageModel, LayerRoutes]:
    model = deep(family)
    return model, LayerRoutes(model, **{"tokens": None, "layers": None, **settings}, seed=seed)


class Watch:
    """Sees what goes into and comes out of each layer's attention and whole."""

    def __init__(self, model: MaskedLanguageModel) -> None:
        self.inputs: dict[int, list[Tensor]] = {}
        self.outputs: dict[int, list[Tensor]] = {}
        self.sizes: dict[int, list[int]] = {}
        for number, layer in enumerate(find_stack(model, key="test")):
            layer.register_forward_hook(self._layer(number))
            first = next(m for m in layer.modules() if isinstance(m, nn.Linear))
            first.register_forward_hook(self._linear(number))

    def _layer(self, number: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            self.inputs.setdefault(number, []).append(args[0].detach())
            self.outputs.setdefault(number, []).append(output.detach())

        return hook

    def _linear(self, number: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            self.sizes.setdefault(number, []).append(args[0].shape[-2])

        return hook


@pytest.mark.parametrize("family", ROUTABLE)
def test_middle_layers_see_half_the_tokens_and_the_others_pass_by_unchanged(family: str) -> None:
    model, routes = routed(family, tokens=TOKENS)
    watch = Watch(model)
    routes.begin(0)
    model.train()(packed(documents((20, 8, 3))))
    assert watch.sizes == {0: [31], 1: [16], 2: [16], 3: [31]}
    for number in (1, 2):
        same = (watch.inputs[number][0] == watch.outputs[number][0]).all(dim=-1).view(-1)
        assert int(same.sum()) == 31 - 16
    passed = [(watch.inputs[n][0] == watch.outputs[n][0]).all(dim=-1).view(-1) for n in (1, 2)]
    assert not torch.equal(*passed), "every layer draws anew"


@pytest.mark.parametrize("step", [0, 60, 100, 400])
def test_the_shares_that_are_told_of_a_step_are_those_that_layers_see(step: int) -> None:
    dropping = LayerDroppingConfig(last_keep=0.3, gamma=1.0)
    model, routes = routed("modernbert", tokens=TOKENS, layers=dropping)
    watch = Watch(model)
    told = routes.layer_shares(step)  # before the step begins, as well as after
    routes.begin(step)
    assert routes.layer_shares(step) == told
    model.train()(packed(documents((400, 400))))
    seen = [watch.sizes.get(number, [0])[0] / 800 for number in range(4)]
    assert told == pytest.approx(seen, abs=2 / 800), "but for rounding up to whole tokens"


@pytest.mark.parametrize("family", ROUTABLE)
def test_packing_does_not_matter(family: str) -> None:
    """No token sees another segment, and the same tokens stay whatever lies beside them."""
    texts = documents((20, 8, 3))
    model, routes = routed(family, tokens=TOKENS)
    routes.begin(3)
    model.train()
    together = model(packed(texts))
    apart = torch.cat([model(packed([text])) for text in texts])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    model.eval()
    assert (model(packed(texts)) - together).abs().max() > 1e-3, "half of the tokens must have been missed"


@pytest.mark.parametrize("settings", [{"tokens": TOKENS}, {"layers": LayerDroppingConfig(last_keep=0.1, gamma=1.0)}])
def test_evaluation_and_a_model_before_its_first_step_leave_nothing_out(settings: Any) -> None:
    batch = packed(documents((20, 8, 3)))
    plain = deep("modernbert").eval()
    model, routes = routed("modernbert", **settings)
    assert torch.equal(model.train()(batch), plain(batch))
    routes.begin(50)
    assert not torch.equal(model(batch), plain(batch))
    assert torch.equal(model.eval()(batch), plain(batch))
    assert list(model.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("family", ["bert", "modernbert", "dstrain-encoder"])
def test_compiled_layers_keep_their_graphs_and_compute_the_same(family: str) -> None:
    torch._dynamo.reset()
    model, routes = routed(family, tokens=TOKENS, few_shapes=True)
    batches = [packed(documents(lengths, seed=1)) for lengths in ((40, 40, 16), (60, 30, 6), (48, 48), (64, 30, 2))]
    model.train()
    routes.begin(0)
    plain = [model(batch) for batch in batches]
    compile_blocks(model.model, backend="aot_eager")
    counts = []
    for batch, expected in zip(batches, plain):
        torch.testing.assert_close(model(batch), expected, rtol=1e-5, atol=1e-5)
        counts.append(num_graphs())
    assert counts[0] > 0
    assert counts[-1] == counts[0], "other documents and other draws of the same sizes were compiled again"


def test_a_full_share_is_the_plain_model() -> None:
    batch = packed(documents((20, 8, 3)))
    model, routes = routed("bert", tokens=TOKENS)
    routes.begin(100)
    assert torch.equal(model.train()(batch), deep("bert").train()(batch))


def test_the_step_decides_and_repeats() -> None:
    batch = packed(documents((20, 8, 3)))
    outs = []
    for seed, step in ((0, 1), (0, 1), (0, 2), (1, 1)):
        model, routes = routed("bert", tokens=TOKENS, seed=seed)
        routes.begin(step)
        outs.append(model.train()(batch))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    assert not torch.equal(outs[0], outs[3])


def test_a_left_out_layer_is_passed_by_and_kept_ones_make_up_for_it() -> None:
    model, routes = routed("modernbert", layers=LayerDroppingConfig(last_keep=0.1, gamma=1.0))
    plain = find_stack(deep("modernbert"), key="test")
    watch = Watch(model)
    steps = range(1000, 1030)
    for step in steps:
        routes.begin(step)
        model.train()(packed(documents((9, 5))))
    chances = [1 - (n + 1) / 4 * 0.9 for n in range(4)]
    for number in range(4):
        pairs = list(zip(watch.inputs[number], watch.outputs[number]))
        passed = [torch.equal(i, o) for i, o in pairs]
        assert 0 < sum(passed) < len(steps)
        assert len(watch.sizes[number]) == len(steps) - sum(passed), "its arithmetic is not done"
    assert len(plain) == 4
    # In expectation a layer adds what it always adds: (out - in) of a kept one is 1/p of the plain layer's.
    model_2, routes_2 = routed("modernbert", layers=LayerDroppingConfig(last_keep=0.1, gamma=1.0))
    first = find_stack(model_2, key="test")[0]
    kept = next(step for step in steps if _keeps(routes_2, step))
    whole = Watch(model_2)
    model_2.eval()(packed(documents((9, 5))))
    model_2.train()(packed(documents((9, 5))))
    routes_2.begin(kept)
    model_2(packed(documents((9, 5))))
    plain_adds, kept_adds = (whole.outputs[0][n] - whole.inputs[0][n] for n in (0, 2))
    torch.testing.assert_close(kept_adds, plain_adds / chances[0], rtol=1e-4, atol=1e-5)
    assert first.training


def _keeps(routes: LayerRoutes, step: int) -> bool:
    routes.begin(step)
    return routes._kept[0] is not None


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_step_without_a_layer_moves_its_moments_alike_at_every_stage(control: ControlPlane, stage: int) -> None:
    model, routes = routed("modernbert", layers=LayerDroppingConfig(last_keep=0.1, gamma=1.0))
    engine = Engine(
        model, MlmObjective(), config=EngineConfig(zero_stage=stage, bucket_elements=10_000), optimizer=OptimizerConfig(),  # type: ignore[arg-type]
        control=control, device="cpu", precision="fp32", micro_batch=4, accumulation=1, seed=0,
    )  # fmt: skip
    engine.at_step = routes.begin
    data = step_data([packed(documents((9, 5)))])
    engine.train_step(data, step=0, learning_rate=1e-2)
    name = "model.layers.3.mlp.Wo.weight"
    before = {f.state: f.tensor.clone() for f in engine.fragments.held() if f.name == name}
    without = next(step for step in range(1000, 1100) if _leaves_out(routes, step, 3))
    assert engine.train_step(data, step=without, learning_rate=1e-2).applied
    after = {f.state: f.tensor for f in engine.fragments.held() if f.name == name}
    torch.testing.assert_close(after["exp_avg"], before["exp_avg"] * 0.9)
    torch.testing.assert_close(after["exp_avg_sq"], before["exp_avg_sq"] * 0.98)


def _leaves_out(routes: LayerRoutes, step: int, layer: int) -> bool:
    routes.begin(step)
    return routes._kept[layer] is None


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        (
            "deberta-v2",
            {"tokens": TOKENS},
            "token_dropping: needs unpadded attention, and this model is padded: .*interface",
        ),
        ("albert", {"tokens": TOKENS}, "token_dropping: AlbertForMaskedLM has no one list of its 4 layers"),
        (
            "bert",
            {"layers": LayerDroppingConfig()},
            "layer_dropping: the layers of BertForMaskedLM normalise their sum",
        ),
        (
            "bert",
            {"tokens": TokenDroppingConfig(steps=1, full_first=3)},
            "full_first=3 and full_last=1 leave none of 4",
        ),
    ],
)
def test_models_that_cannot_are_refused_with_the_reason(family: str, settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        routed(family, **settings)
