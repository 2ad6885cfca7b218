from __future__ import annotations

import pytest

from dstrain.data import cache_leases
from dstrain.data.cache_leases import Lease, LeasePlan, live_leases, protected_and_next_use


def test_a_plan_is_seen_by_others_until_its_lease_is_released(tmp_path):
    one = Lease(tmp_path, horizon_bytes=20)
    two = Lease(tmp_path, horizon_bytes=30)
    one.publish({"a": 10, "b": 10, "c": 10}, horizon_bytes=20)
    assert dict(live_leases(tmp_path)) == {one.name: LeasePlan(20, ("a", "b"), ("c",)), two.name: LeasePlan(30, (), ())}
    two.publish({"c": 10, "d": 30}, horizon_bytes=30)
    protected, next_use = protected_and_next_use(tmp_path, own=two)
    assert protected == {"a", "b", "c"}
    assert next_use == {"a": 0, "b": 1, "c": 0, "d": 1}
    one.release()
    one.release()
    assert protected_and_next_use(tmp_path, own=two) == ({"c"}, {"c": 0, "d": 1})
    two.release()
    assert list(tmp_path.iterdir()) == []


def test_what_was_read_is_needed_no_more(tmp_path):
    lease = Lease(tmp_path, horizon_bytes=20)
    lease.publish({"a": 10, "b": 10, "c": 10}, horizon_bytes=20)
    lease.forget(["a", "x"])
    assert lease.now() == ({"b"}, {"b": 1, "c": 2})
    lease.release()


def test_a_lease_without_a_holder_is_removed(tmp_path):
    (tmp_path / "1_dead.lease").touch()
    (tmp_path / "1_dead.plan").write_text("5 1\na\n")
    assert list(live_leases(tmp_path)) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "x y\na\n", "5\n", "\xff"])
def test_a_damaged_plan_protects_nothing_and_stops_nobody(tmp_path, text):
    lease = Lease(tmp_path, horizon_bytes=20)
    lease._plan_path.write_text(text)
    assert dict(live_leases(tmp_path)) == {lease.name: LeasePlan(0, (), ())}
    lease.release()


def test_a_published_plan_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_leases, "MAX_PUBLISHED_KEYS", 3)
    lease = Lease(tmp_path, horizon_bytes=2)
    lease.publish({f"k{n}": 1 for n in range(10)}, horizon_bytes=2)
    assert dict(live_leases(tmp_path))[lease.name] == LeasePlan(2, ("k0", "k1"), ("k2",))
    lease.release()
