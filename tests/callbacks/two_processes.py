"""One process of a data-parallel run under accelerate; prints "checked"."""

import copy

import accelerate
import torch
from torch.utils.data import DataLoader
from training import Rows, check, classifier, dataset, joined, losses

import fastminima as fm


def main():
    torch.set_num_threads(1)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    assert accelerator.num_processes == 2
    model = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(dataset(), batch_size=3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    rows, seen = Rows(), []
    watch = fm.callbacks.watch(accelerator, model, to=rows, optimizer=optimizer)
    with watch as rows.watch:
        for batch in loader:
            with accelerator.accumulate(model):
                bare = accelerator.unwrap_model(model)
                seen.append((copy.deepcopy(bare), batch))
                accelerator.backward(losses(model, batch).mean())
                optimizer.step()
                optimizer.zero_grad()
    if accelerator.is_main_process:
        check(rows, joined(seen, 2))
        assert {row["factors/batch_size"] for row in rows.rows} == {3 * 2 * 2}
    else:
        assert not rows.rows
    accelerator.end_training()
    print("checked")


if __name__ == "__main__":
    main()
