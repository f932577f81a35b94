"""The joint law of arXiv 2502.05172: its Table 4 follows from its Table 3."""

import math

import pytest

from minimoe import joint_law, scaling_laws
from minimoe.scaling_laws import chinchilla

TABLE_4 = {  # number of experts -> m, mu, n, nu, c, as printed
    1: (30.3640, -0.1817, 53.9838, -0.1965, 1.3637),
    2: (27.7982, -0.1780, 66.8401, -0.2065, 1.3637),
    4: (24.8462, -0.1731, 87.7022, -0.2192, 1.3637),
    8: (21.8330, -0.1676, 119.9126, -0.2338, 1.3637),
    16: (19.0159, -0.1617, 167.5073, -0.2494, 1.3637),
    32: (16.5424, -0.1557, 234.6726, -0.2652, 1.3637),
}


@pytest.mark.parametrize("experts", TABLE_4)
def test_table_4_follows_from_table_3(experts):
    """To 0.3 %: most at one expert, least at 32."""
    assert chinchilla(experts) == pytest.approx(TABLE_4[experts], rel=3e-3)


def test_the_difference_is_the_start_of_table_3(monkeypatch):
    """With 2.083 in place of the printed 2.0732, Table 4 follows to the printed digits."""
    monkeypatch.setattr(scaling_laws, "E_START", 2.083)
    for experts, printed in TABLE_4.items():
        assert chinchilla(experts) == pytest.approx(printed, rel=6e-4)


def test_what_the_law_says_of_a_model():
    rows = joint_law(321e6, 16e9, embedding=51e6).set_index("experts")
    assert rows.gain[8] == pytest.approx(0.086, abs=5e-4)
    assert rows.gain[1] == 0
    assert rows.fitted.all()
    assert math.log2(rows.lr[8] / rows.lr[1]) == pytest.approx(-0.75)
    assert rows.lr[1] == pytest.approx(math.exp(8.39 - 0.81 * math.log(270e6)))


def test_far_outside_the_fitted_range_the_law_turns_round_and_says_so():
    rows = joint_law(1e6, 1e7)
    assert rows.gain.iloc[3] < 0
    assert not rows.fitted.any()
    assert list(joint_law(1e9, 1e10, experts=(1, 32, 64)).fitted) == [True, True, False]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"active": 0, "tokens": 1e9}, r"active=0\.0: must be positive"),
        ({"active": 1e8, "tokens": math.inf}, "tokens=inf"),
        ({"active": 1e8, "tokens": 1e9, "embedding": 1e8}, r"embedding=100000000.0: must be less than active=1e\+08"),
        ({"active": 1e8, "tokens": 1e9, "experts": (0.5,)}, "experts=0.5: must be 1 or more"),
    ],
)
def test_bad_sizes_are_named(sizes, message):
    with pytest.raises(ValueError, match=message):
        joint_law(**sizes)


@pytest.mark.parametrize("experts", [8, ("8",), (True,)])
def test_experts_are_several_numbers(experts):
    with pytest.raises(TypeError, match="experts="):
        joint_law(1e9, 1e10, experts=experts)
