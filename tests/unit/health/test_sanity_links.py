import pytest

from dstrain.health.sanity_links import Link, expectation, interface_of_the_route, own_link, slower

ROUTES = """Iface\tDestination\tGateway\tFlags
eth1\t0000A8C0\t00000000\t0001
eth0\t00000000\t0100A8C0\t0003
"""


@pytest.mark.parametrize(("rate", "gb_s"), [(1, 0.106), (10, 1.0), (25, 1.0), (100, 1.0), (400, 1.0)])
def test_gloo_gets_the_rate_of_a_slow_link_and_its_own_limit_on_a_fast_one(rate, gb_s):
    found = expectation(Link("eth0", rate), backend="gloo", on_one_host=False)
    assert found.gb_s == pytest.approx(gb_s, rel=0.01)
    assert f"eth0, {rate} Gb/s" in found.why


def test_nccl_gets_infiniband_where_there_is_some_but_no_more_than_nvlink_feeds():
    link = Link("eth0", 25, infiniband_gbit_s=3200)
    assert expectation(link, backend="nccl", on_one_host=False, gpu="NVIDIA H100 80GB HBM3").gb_s == pytest.approx(330)
    assert expectation(Link("eth0", 25, 400), backend="nccl", on_one_host=False, gpu="L4").gb_s == pytest.approx(42.5)
    assert expectation(Link("eth0", 25), backend="nccl", on_one_host=False).gb_s == pytest.approx(2.66, rel=0.01)


def test_nothing_is_expected_where_nobody_knows():
    assert expectation(Link("eth0"), backend="gloo", on_one_host=False) is None
    assert expectation(Link("lo"), backend="gloo", on_one_host=True) is None
    assert expectation(Link(), backend="nccl", on_one_host=True, gpu="NVIDIA A100-PCIe-40GB") is None
    assert expectation(Link(), backend="nccl", on_one_host=True, gpu="NVIDIA A100-SXM4-80GB").gb_s == 235


def test_the_slower_of_two_links_counts():
    assert slower(Link("a", 10), Link("b", 1)).interface == "b"
    assert slower(Link("a"), Link("b", 1)).interface == "b"


def test_the_default_route_leads_to_the_others():
    assert interface_of_the_route(ROUTES) == "eth0"
    assert interface_of_the_route("\n".join(ROUTES.splitlines()[:2])) == "eth1"
    assert interface_of_the_route("") == ""


@pytest.mark.parametrize(("text", "rate"), [("25000\n", 25.0), ("-1\n", None), ("", None)])
def test_rates_are_read_from_the_kernel(tmp_path, text, rate):
    (tmp_path / "net/eth9").mkdir(parents=True)
    (tmp_path / "net/eth9/speed").write_text(text)
    for port, state in (("mlx5_0/ports/1", "4: ACTIVE"), ("mlx5_1/ports/1", "1: DOWN")):
        (tmp_path / "ib" / port).mkdir(parents=True)
        (tmp_path / "ib" / port / "state").write_text(f"{state}\n")
        (tmp_path / "ib" / port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    link = own_link({"GLOO_SOCKET_IFNAME": "eth9"}, net=tmp_path / "net", infiniband=tmp_path / "ib")
    assert link == Link("eth9", rate, 400.0)
    assert own_link({"GLOO_SOCKET_IFNAME": "eth8"}, net=tmp_path / "net", infiniband=tmp_path / "none") == Link("eth8")
