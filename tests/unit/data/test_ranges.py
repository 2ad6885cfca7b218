from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dstrain.data.ranges import WASTE_SHARE, coalesce, windows
from dstrain.data.stores import Extent

extents = st.lists(
    st.builds(Extent, st.sampled_from("ab"), st.integers(0, 5000), st.integers(1, 700)), unique=True, max_size=60
)


@given(extents, st.integers(1, 4000), st.integers(0, 500))
def test_every_extent_lies_in_exactly_one_request_that_keeps_its_bounds(wanted, range_bytes, gap_bytes):
    requests = coalesce(wanted, range_bytes=range_bytes, gap_bytes=gap_bytes)
    assert sorted(part for request in requests for part in request.parts) == sorted(wanted)
    for request in requests:
        name, begin, length = request.whole
        covered = set()
        for part in request.parts:
            assert part.name == name
            assert begin <= part.offset
            assert part.offset + part.length <= begin + length
            covered.update(range(part.offset, part.offset + part.length))
        assert length <= range_bytes or len(request.parts) == 1
        assert length - len(covered) <= WASTE_SHARE * length


@given(extents)
def test_requests_come_in_the_order_of_need(wanted):
    place = {extent: number for number, extent in enumerate(wanted)}
    soonest = [min(place[p] for p in r.parts) for r in coalesce(wanted, range_bytes=2000, gap_bytes=100)]
    assert soonest == sorted(soonest)


@given(extents, st.integers(1, 3000))
def test_windows_cut_the_list_and_change_nothing(wanted, window_bytes):
    runs = list(windows(wanted, window_bytes=window_bytes))
    assert [extent for run in runs for extent in run] == wanted
    assert all(len(run) == 1 or sum(e.length for e in run) <= window_bytes for run in runs)


def test_neighbouring_blocks_share_a_request_and_distant_ones_do_not():
    blocks = [Extent("a", k * 10_000, 9_500) for k in range(4)]
    far = Extent("a", 90_000, 9_500)
    requests = coalesce([blocks[2], far, blocks[0], blocks[1], blocks[3]], range_bytes=1 << 20, gap_bytes=1000)
    assert [r.whole for r in requests] == [Extent("a", 0, 39_500), far]
    assert [r.whole.length for r in coalesce(blocks, range_bytes=20_000, gap_bytes=1000)] == [19_500, 19_500]
