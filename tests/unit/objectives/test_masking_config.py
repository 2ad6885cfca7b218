import pytest
from pydantic import ValidationError

from dstrain.objectives.masking_config import MaskingConfig
from dstrain.objectives.mlm import MlmConfig


def test_the_defaults_are_those_of_the_papers():
    config = MaskingConfig()
    assert (config.mask_rate, config.mask_share, config.random_share) == (0.3, 0.8, 0.1)
    assert (config.span_p, config.span_longest) == (0.2, 10)
    assert (config.whole_word, config.spans, config.mask_rate_final) == (False, False, None)


@pytest.mark.parametrize("half", [{"mask_rate_final": 0.15}, {"mask_rate_steps": 100}])
def test_half_a_schedule_is_refused_with_what_is_missing(half):
    with pytest.raises(ValidationError, match="a schedule needs both"):
        MaskingConfig(**half)
    assert MaskingConfig(mask_rate_final=0.15, mask_rate_steps=100).mask_rate_shape == "linear"


def test_shares_of_more_than_everything_are_refused_by_name():
    with pytest.raises(ValidationError, match=r"mask_share=0\.8 and random_share=0\.3 add up to more than 1"):
        MaskingConfig(random_share=0.3)


def test_the_objective_takes_every_setting():
    config = MlmConfig(spans=True, whole_word=True, replace="unit", span_longest=5)
    assert (config.kind, config.span_longest) == ("mlm", 5)
