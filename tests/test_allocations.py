"""Loss change allocation: the books close, whatever the module and its optimizer; and what must be an error."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from minimoe import Ledger, allocation
from minimoe.allocations import ENOUGH, closure


def quadratic(module, batch):
    return F.mse_loss(module(batch), torch.ones(len(batch), 1))


def network(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 1))


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 4, generator=generator) for _ in range(6)]


def test_by_hand_for_a_quadratic_loss():
    """L = w^2 / 2: from 3 to 1 the loss falls by 4, and the trapezoidal rule is exact."""
    module = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        module.weight.fill_(3.0)
    ledger = Ledger(module, lambda: module.weight.square().sum() / 2)
    with torch.no_grad():
        module.weight.fill_(1.0)
    entry = ledger.entry()
    assert entry.allocations == {"weight": pytest.approx(4.0)}
    assert (entry.fall, entry.points) == (pytest.approx(4.0), 2)


def test_parts_have_their_own_signs():
    """L = a^2 - b: a rises (bad), b rises (good)."""
    module = nn.ParameterDict({"a": torch.tensor(1.0), "b": torch.tensor(0.0), "unused": torch.tensor(5.0)})
    ledger = Ledger(module, lambda: module["a"] ** 2 - module["b"])
    with torch.no_grad():
        module["a"].fill_(2.0)
        module["b"].fill_(1.0)
        module["unused"].fill_(7.0)
    entry = ledger.entry()
    assert entry.allocations == {"a": pytest.approx(-3.0), "b": pytest.approx(1.0), "unused": 0.0}
    assert entry.sum == pytest.approx(entry.fall) == pytest.approx(-2.0)


def test_the_rule_of_integration_is_chosen_by_its_closure():
    """L = w^8 from 1 to 3 is no parabola: the trapezoidal rule is far off, Simpson's on parts is not."""
    entries = {}
    for intervals in (0, 1, 8):
        module = nn.ParameterDict({"w": torch.tensor(1.0, dtype=torch.float64)})
        ledger = Ledger(module, lambda module=module: -(module["w"] ** 8), intervals)
        with torch.no_grad():
            module["w"].fill_(3.0)
        entries[intervals] = ledger.entry()
        assert module["w"] == 3.0  # it looks along the line and comes back
    assert [entry.points for entry in entries.values()] == [2, 3, 5]
    off = [abs(closure(entry.sum, entry.fall) - 1) for entry in entries.values()]
    assert off[0] > 1 > off[1] > 0.05 > ENOUGH > off[2]
    assert entries[0].sum == pytest.approx(8 * (1 + 3**7))  # -<(g0 + g1) / 2, dw>


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_sum_over_the_tensors_is_the_fall_of_the_loss(optimizer, batches):
    module = network()
    probe = batches.pop()
    before = quadratic(module, probe).item()
    frame = allocation(module, optimizer(module.parameters(), lr=0.01), quadratic, probe, batches)
    fall = before - quadratic(module, probe).item()
    assert list(frame.columns) == ["step", "tensor", "allocation", "fall", "closure", "points"]
    assert len(frame) == 5 * 4
    assert frame.groupby("step").fall.first().sum() == pytest.approx(fall, rel=1e-4)
    assert frame.allocation.sum() == pytest.approx(fall, rel=ENOUGH)
    by_step = frame.groupby("step").allocation.sum() / frame.groupby("step").fall.first()
    assert frame.groupby("step").closure.first().to_list() == pytest.approx(by_step.to_list())


def test_it_measures_and_does_not_interfere(batches):
    """Trained with and without a ledger, dropout and all: the same weights, modes and gradients."""
    probe = batches.pop()
    plain, booked = network(dropout=0.5), network(dropout=0.5)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01)
    torch.manual_seed(7)
    for batch in batches:
        optimizer.zero_grad()
        quadratic(plain, batch).backward()
        optimizer.step()
    torch.manual_seed(7)
    booked[1].eval()
    allocation(booked, torch.optim.AdamW(booked.parameters(), lr=0.01), quadratic, probe, batches)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), booked.parameters(), strict=True))
    assert [part.training for part in booked.modules()] == [True, True, False, True, True]


def test_a_tied_tensor_has_one_allocation_and_a_frozen_one_none(batches):
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1))
    module[1].weight = module[0].weight
    module[2].bias.requires_grad_(False)
    trained = [param for param in module.parameters() if param.requires_grad]
    frame = allocation(module, torch.optim.SGD(trained, lr=0.01), quadratic, batches[0], batches[1:3])
    assert set(frame.tensor) == {"0.weight", "0.bias", "1.bias", "2.weight"}


def test_a_ledger_books_several_steps_as_one_line(batches):
    module = network()
    optimizer, ledger = torch.optim.SGD(module.parameters(), lr=0.01), Ledger(module, lambda: quadratic(module, batches[0]))
    for batch in batches[1:]:
        optimizer.zero_grad()
        quadratic(module, batch).backward()
        optimizer.step()
    entry = ledger.entry()
    assert closure(entry.sum, entry.fall) == pytest.approx(1, abs=0.05)
    still = ledger.entry()
    assert still.fall == still.sum == 0
    assert math.isnan(closure(still.sum, still.fall))


def test_bad_input(batches):
    module = network()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    with pytest.raises(ValueError, match="batches is empty"):
        allocation(module, optimizer, quadratic, batches[0], [])
    with pytest.raises(ValueError, match="the loss must be a tensor of one number, got one of shape \\(8, 1\\)"):
        Ledger(module, lambda: module(batches[0]))
    with pytest.raises(ValueError, match="the loss must be a tensor of one number, got float"):
        Ledger(module, lambda: 1.0)
    with pytest.raises(ValueError, match="the probe's loss is nan before the first step"):
        Ledger(module, lambda: quadratic(module, batches[0] * math.nan))
    with pytest.raises(ValueError, match="Tanh has no trainable parameter"):
        Ledger(nn.Tanh(), lambda: torch.zeros(()))
    with pytest.raises(ValueError, match="intervals=-1"):
        Ledger(module, lambda: quadratic(module, batches[0]), -1)
    with pytest.raises(ValueError, match="the loss does not depend on any parameter"):
        Ledger(module, lambda: torch.zeros(()))
