import zlib

from hypothesis import given
from hypothesis import strategies as st

from dstrain.base.checksums import crc32


@given(st.binary(max_size=5000), st.binary(max_size=500))
def test_the_number_is_zlibs_whole_or_in_parts(one, other):
    assert crc32(one) == zlib.crc32(one)
    assert crc32(memoryview(other), crc32(one)) == zlib.crc32(one + other)
