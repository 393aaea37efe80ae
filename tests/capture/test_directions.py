"""Several directions at once: each as it is alone, and as a loop over samples."""

import pytest
import torch
from torch import nn

import fastminima as fm


class Twice(nn.Module):
    """A weight used twice, one whose halves are used apart, and a table."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.shared = nn.Linear(6, 6)
        self.halves = nn.Linear(6, 8)
        self.image = nn.Conv1d(4, 3, 3)

    def forward(self, ids):
        x = self.shared(self.shared(self.table(ids)).tanh())
        left, right = self.halves(x).chunk(2, dim=-1)
        return self.image((left * right.sigmoid()).transpose(1, 2)).flatten(1)


def directions(model, count):
    size = sum(p.numel() for p in model.parameters())
    return {f"v{k}": torch.randn(size).double() for k in range(count)}


@pytest.mark.parametrize("time", [3, 40])  # one at a time, and from gradients
@pytest.mark.parametrize("mode", ["observe", "fused"])
def test_several_directions(time, mode):
    torch.manual_seed(0)
    model = Twice().double()
    ids = torch.randint(11, (5, time))
    along = directions(model, 4)
    along["part"] = {"shared.weight": torch.randn(6, 6).double()}

    def losses():
        return model(ids).square().mean(dim=1)

    got = fm.GradientProbe(model, directions=along, mode=mode).backward(losses()).dots
    assert list(got) == list(along)
    parameters = dict(model.named_parameters())
    for name, v in along.items():
        alone = fm.GradientProbe(model, directions={name: v}).backward(losses())
        torch.testing.assert_close(got[name], alone.dots[name])
        if not isinstance(v, dict):
            want = []
            for loss in losses():
                grads = torch.autograd.grad(
                    loss, list(parameters.values()), retain_graph=True
                )
                want.append(torch.cat([g.flatten() for g in grads]) @ v)
            torch.testing.assert_close(got[name], torch.stack(want))


def test_directions_of_a_network_of_rows():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    along = directions(model, 3)
    losses = model(torch.randn(6, 7).double()).square().sum(dim=1)
    stats = fm.GradientProbe(model, directions=along, keep_mean=True).backward(losses)
    grads = torch.cat([p.grad.flatten() for p in model.parameters()])
    for name, v in along.items():
        torch.testing.assert_close(stats.dots[name].mean(), grads @ v)
