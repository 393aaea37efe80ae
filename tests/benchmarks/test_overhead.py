"""What a probe costs in Python: the bounds hold with room for a busy machine."""

from benchmarks.overhead import walk


def test_walking_and_hooking_gpt2():
    """At most 1 us a node and 12 us a use on an idle machine; three times that here."""
    found = walk()
    assert found["nodes"] > 500
    assert found["uses"] > 70
    assert found["read_us_a_node"] < 3, found
    assert found["hook_us_a_use_with_gradients"] < 36, found
