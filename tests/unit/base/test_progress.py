import pytest

from dstrain.base.progress import bar, track


def test_items_pass_through_unchanged_and_one_at_a_time():
    pulled = []

    def source():
        for item in range(5):
            pulled.append(item)
            yield item

    tracked = track(source(), total=5, description="d", unit="item", quiet=True)
    assert next(tracked) == 0
    assert pulled == [0]
    assert list(tracked) == [1, 2, 3, 4]


def test_a_bar_says_what_how_many_and_goes_to_stderr(capsys):
    with bar(total=2_000_000, description="packing", unit="tok") as progress:
        progress.update(2_000_000)
    out, err = capsys.readouterr()
    assert out == ""
    assert "packing" in err
    assert "2.00M/2.00M" in err


def test_a_quiet_bar_prints_nothing(capsys):
    assert list(track([1, 2], total=2, description="packing", unit="x", quiet=True)) == [1, 2]
    assert capsys.readouterr() == ("", "")


def test_a_fault_of_the_source_comes_through():
    def source():
        yield 1
        raise RuntimeError("source broke")

    with pytest.raises(RuntimeError, match="source broke"):
        list(track(source(), total=None, description="d", unit="x", quiet=True))
