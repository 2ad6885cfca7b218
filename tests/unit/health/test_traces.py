from dstrain.health.traces import last_crash, oom_kills, tail


def test_the_headline_of_a_crash_is_found(tmp_path):
    path = tmp_path / "stacks"
    assert last_crash(path) == ""
    path.write_text("noise\nFatal Python error: Segmentation fault\n\nCurrent thread 0x1 (most recent call first):\n")
    assert last_crash(path) == "Segmentation fault"


def test_only_the_end_of_a_file_is_read_and_broken_characters_do_no_harm(tmp_path):
    (tmp_path / "log").write_bytes(b"x" * 100 + b"\xff the end")
    assert tail(tmp_path / "log", limit_bytes=9) == "\ufffd the end"
    assert tail(tmp_path) == ""


def test_the_kernels_count_of_processes_ended_for_memory_never_falls():
    assert 0 <= oom_kills() <= oom_kills()
