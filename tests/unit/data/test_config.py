import pytest

from dstrain.base.config import validate
from dstrain.base.errors import ConfigError
from dstrain.data.config import DataConfig

WIKI, CODE = {"name": "wiki", "path": "w", "weight": 1}, {"name": "code", "path": "c", "weight": 2}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "give data.path for one source, or data.sources for several"),
        ({"path": "x", "sources": [WIKI]}, "give data.path for one source, or data.sources for several"),
        ({"sources": [WIKI, WIKI]}, "a name stands twice"),
        ({"sources": [WIKI, {"name": "code", "path": "c"}]}, "give every source a weight, or every source epochs"),
        ({"sources": [WIKI, {"name": "code", "path": "c", "epochs": 1}]}, "give every source a weight, or every"),
        ({"sources": [{**WIKI, "weight": -1}]}, "greater than or equal to 0"),
        ({"sources": [{**WIKI, "name": "../x"}]}, "name"),
        ({"sources": [WIKI, CODE], "phases": [{"from_step": 3, "weights": {"wiki": 1}}]}, "one weight for each"),
        ({"path": "x", "skip_rows": [{"source": "wiki", "rows": [[0, 0]]}]}, "there is no source 'wiki'"),
    ],
)
def test_sources_that_cannot_be_are_refused(data, message):
    with pytest.raises(ConfigError, match=message):
        validate(DataConfig, data, source="run.yaml")


def test_one_path_or_several_sources():
    assert validate(DataConfig, {"path": "x"}, source="run.yaml").sources == []
    config = validate(DataConfig, {"sources": [WIKI, CODE]}, source="run.yaml")
    assert [source.name for source in config.sources] == ["wiki", "code"]
