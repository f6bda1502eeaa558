"""The choice of a degree from measured steps."""

from hypothesis import given
from hypothesis import strategies as st

from skippipe_plugin.moe.overlap import DEGREES, ROUNDS, WARM_UP, OverlapTuner


@given(st.sampled_from(DEGREES), st.integers(0, 2))
def test_the_fastest_degree_stays(fastest: int, outlier: int) -> None:
    """One slow step of each degree, whichever it is, does not mislead."""
    tuner, used = OverlapTuner(), []
    while tuner.is_tuning:
        step = len(used) - WARM_UP
        used.append(tuner.degree)
        seconds = 1.0 if tuner.degree == fastest else 1.5
        tuner.note(100.0 if step < 0 or step // len(DEGREES) == outlier else seconds)
    assert tuner.degree == fastest
    assert used[:WARM_UP] == [DEGREES[0]] * WARM_UP
    assert used[WARM_UP:] == list(DEGREES) * ROUNDS
    tuner.note(0.0)
    assert tuner.degree == fastest
