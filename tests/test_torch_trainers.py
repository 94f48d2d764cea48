"""Trainers of others: a fit that is interrupted and resumed from their own checkpoint is exact.

Each runs where its package is installed; none of them is needed for anything else.
"""

import os

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import headwater as hw

STEPS = 6
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # what these packages warn of is not ours
    pytest.mark.long,
]


class Samples(Dataset):
    def __init__(self, steps=STEPS):
        self._steps = steps

    def __len__(self):
        return 4 * self._steps

    def __getitem__(self, index):
        x = torch.randn(5, generator=torch.Generator().manual_seed(index))
        return {"x": x, "labels": x.sum()}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))


def loss_of(net, batch):
    return (net(batch["x"]).squeeze(1) - batch["labels"]).pow(2).mean()


def scheduler_of(opt):
    return torch.optim.lr_scheduler.StepLR(opt, 2, gamma=0.5)


def in_a_cluster(function, *arguments):
    """What `function(worker, …)` leaves as parameters on the servers."""
    with hw.Cluster(workers=1, servers=2, patience=5, deadline=60) as cluster, cluster.worker() as worker:
        function(worker, *arguments)
        (values,) = cluster.parameters()[1].values()
        return {name: value.tobytes() for name, value in values.items()}


def plain(epochs=1):
    """The same without any trainer."""

    def fit(worker):
        net = network()
        opt = hw.torch.DistributedOptimizer(worker, net, hw.Adam(lr=0.1))
        scheduler = scheduler_of(opt)
        for _ in range(epochs):
            for batch in DataLoader(Samples(STEPS // epochs), 4):
                opt.zero_grad()
                loss_of(net, batch).backward()
                opt.step()
                scheduler.step()

    return in_a_cluster(fit)


def test_lightning_goes_on_from_its_checkpoint(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self, worker):
            super().__init__()
            self.net = network()
            self._of = [worker]

        def training_step(self, batch, index):
            return loss_of(self.net, batch)

        def configure_optimizers(self):
            opt = hw.torch.DistributedOptimizer(self._of[0], self.net, hw.Adam(lr=0.1))
            return {"optimizer": opt, "lr_scheduler": {"scheduler": scheduler_of(opt), "interval": "step"}}

    def fit(worker, epochs, resumed=None):
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module = Module(worker)
        trainer.fit(module, DataLoader(Samples(STEPS // 2), 4), ckpt_path=resumed)
        trainer.save_checkpoint(tmp_path / "last.ckpt")

    whole = in_a_cluster(fit, 2)
    assert whole == plain(epochs=2)
    in_a_cluster(fit, 1)
    assert in_a_cluster(fit, 2, tmp_path / "last.ckpt") == whole


def test_accelerate_goes_on_from_its_checkpoint(tmp_path):
    accelerate = pytest.importorskip("accelerate")

    def fit(worker, first, last):
        accelerator = accelerate.Accelerator(cpu=True)
        net = network()
        opt = hw.torch.DistributedOptimizer(worker, net, hw.Adam(lr=0.1))
        net, opt, loader, scheduler = accelerator.prepare(
            net, opt, DataLoader(Samples(), 4), scheduler_of(opt)
        )
        if first:
            accelerator.load_state(tmp_path / "state")
            loader = accelerator.skip_first_batches(loader, first)
        for step, batch in enumerate(loader, start=first):
            if step == last:
                break
            opt.zero_grad()
            accelerator.backward(loss_of(net, batch))
            opt.step()
            scheduler.step()
        accelerator.save_state(tmp_path / "state")

    whole = in_a_cluster(fit, 0, STEPS)
    assert whole == plain()
    in_a_cluster(fit, 0, STEPS // 2)
    assert in_a_cluster(fit, STEPS // 2, STEPS) == whole


def test_the_trainer_of_transformers_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    monkeypatch.setitem(os.environ, "WANDB_DISABLED", "true")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x, labels):
            return {"loss": loss_of(self.net, {"x": x, "labels": labels})}

    def fit(worker, steps, resumed=False):
        model = Model()
        opt = hw.torch.DistributedOptimizer(worker, model, hw.Adam(lr=0.1))
        options = transformers.TrainingArguments(
            output_dir=tmp_path,
            max_steps=steps,
            per_device_train_batch_size=4,
            train_sampling_strategy="sequential",
            max_grad_norm=0.0,
            save_steps=STEPS // 2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(
            model, options, train_dataset=Samples(), optimizers=(opt, scheduler_of(opt))
        )
        trainer.train(resume_from_checkpoint=resumed)

    whole = in_a_cluster(fit, STEPS)
    assert list(whole.values()) == list(plain().values())
    assert in_a_cluster(fit, STEPS, str(tmp_path / f"checkpoint-{STEPS // 2}")) == whole
