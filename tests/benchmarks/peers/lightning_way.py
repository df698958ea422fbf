"""The run with Lightning's `BackboneFinetuning`: `python -m tests.benchmarks.peers.lightning_way`.

Nothing here imports Keras: no other framework's threads run beside torch's.
"""

import logging
import warnings

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning
from torch.utils.data import DataLoader, TensorDataset

from tests.benchmarks.peers.task import CLASSES, Task, print_measured


class Network(LightningModule):
    """The task's network."""

    def __init__(self, task):
        super().__init__()
        layers, taken = [], 3
        for filters, stride in task.convolutions:
            layers += [torch.nn.Conv2d(taken, filters, 3, stride), torch.nn.ReLU()]
            taken = filters
        self.backbone = torch.nn.Sequential(
            *layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
        )
        self.head = torch.nn.Linear(taken, CLASSES)
        self.rate = task.head_rate

    def forward(self, images):
        return self.head(self.backbone(images))

    def training_step(self, batch, _):
        images, labels = batch
        return torch.nn.functional.cross_entropy(self(images), labels)

    def configure_optimizers(self):
        # Keras' epsilon; torch's own is a tenth of it.
        return torch.optim.Adam(self.head.parameters(), self.rate, eps=1e-7)


class TrainedEachEpoch(Callback):
    """Counts the numbers that the optimizer has and that have a gradient."""

    def __init__(self):
        self.counts = []

    def on_train_epoch_end(self, trainer, pl_module):
        groups = trainer.optimizers[0].param_groups
        held = [weight for group in groups for weight in group["params"]]
        self.counts.append(sum(weight.numel() for weight in held if weight.requires_grad))


def finetuning(task: Task, images, labels):
    """Trains as `BackboneFinetuning` does, with nothing beside it. Returns what trained."""
    torch.manual_seed(0)
    network, trained = Network(task), TrainedEachEpoch()
    images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    data = TensorDataset(images, torch.from_numpy(labels))
    switch = BackboneFinetuning(
        unfreeze_backbone_at_epoch=task.epochs,
        backbone_initial_lr=task.backbone_rate,
        lambda_func=lambda epoch: 1.0,  # The rate stays, as it does with us.
    )
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2 * task.epochs,
        callbacks=[switch, trained],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(network, DataLoader(data, task.batch, shuffle=True))
    return trained.counts


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # That a loader has no workers: the data are in memory.
    print_measured(finetuning)
