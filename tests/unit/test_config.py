"""SparseConfig: the names that settings had before."""

from dataclasses import replace

import pytest

from kvcast import SparseConfig
from kvcast.errors import ArgumentError


@pytest.mark.parametrize(
    ("old", "new"),
    [({"budgets": "uniform"}, {"budget_allocation": "uniform"}), ({"predictor_on": "cuda"}, {"predictor_device": "cuda"}),
     ({"calibrate": "host:4"}, {"calibrate": "layers:4"})],
    ids=str,
)  # fmt: skip
def test_old_names(old, new):
    with pytest.warns(DeprecationWarning, match="is now .*" + next(iter(new))) as seen:
        config = SparseConfig(1024, **old)
    assert config == SparseConfig(1024, **new) and seen[0].filename == __file__ and len(seen) == 1
    assert replace(config, budget=256) == SparseConfig(256, **new)
    for name, value in new.items():
        assert getattr(config, name) == value
    if "calibrate" not in old:
        assert getattr(config, next(iter(old))) == next(iter(new.values()))


def test_old_and_new_name():
    with pytest.warns(DeprecationWarning), pytest.raises(ArgumentError, match="old name of budget_allocation"):
        SparseConfig(budgets="spread", budget_allocation="uniform")
