"""Where a step goes one way or another by what all samples make together."""

from skippipe_plugin.model.kinks import Kink, bent

COMPARED: Kink = ("gt", ())
COUNTED: tuple[Kink, Kink] = ("unique", (8,)), ("unique", (2,))


def test_what_is_counted_is_found_beside_what_comes_more_or_less_often() -> None:
    assert bent([COMPARED, COMPARED, COUNTED[0]], [[COMPARED, COUNTED[1]], [COUNTED[1]]]) == "unique"
    assert bent([COMPARED, COMPARED], [[COMPARED], []]) == ""


def test_what_each_sample_counts_for_itself_is_nothing_of_the_batch() -> None:
    assert bent([COUNTED[1]] * 2, [[COUNTED[1]] * 2] * 2) == ""
