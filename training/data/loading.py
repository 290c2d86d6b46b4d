"""Batches of a dataset for a run: on its device, each sample on one of its processes, from where it has come to."""

from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, Dataset, Subset

from training.data.datasets import StreamedDataset
from training.data.sources import Unreadable
from training.options import RunOptions
from training.progress import Progress
from training.signals import end_loaders_at_exit, leave_signals_to_the_parent


def load_batches(
    dataset: Dataset, options: RunOptions, accelerator: Accelerator, progress: Progress
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches until the last step of a run; those of a stream never end.

    Raises:
        Unreadable: for a file that cannot be read, without the traceback of the loader process around it.
    """
    try:
        yield from _load(dataset, options, accelerator, progress)
    except Unreadable as error:
        marker = f"{Unreadable.__module__}.{Unreadable.__name__}: "
        raise Unreadable(str(error).strip().splitlines()[-1].removeprefix(marker)) from None


def _load(
    dataset: Dataset, options: RunOptions, accelerator: Accelerator, progress: Progress
) -> Iterator[dict[str, torch.Tensor]]:
    world = accelerator.num_processes
    if options.dataloader_num_workers:
        end_loaders_at_exit()

    def loader(samples: Dataset) -> DataLoader:
        return DataLoader(
            samples,
            batch_size=options.train_batch_size,
            num_workers=options.dataloader_num_workers,
            drop_last=True,
            worker_init_fn=leave_signals_to_the_parent,
            # Otherwise a seed is drawn from torch's own state, which would differ after a resumption.
            generator=torch.Generator().manual_seed(options.seed),
        )

    if isinstance(dataset, StreamedDataset):  # a stream shares itself among processes and finds its own place
        place = progress.samples // (options.train_batch_size * world)
        dataset.start(accelerator.process_index, world, options.train_batch_size, place)
        for batch in loader(dataset):
            yield send_to_device(batch, accelerator.device)
        return
    steps = options.max_train_steps - progress.step
    first = progress.samples
    last = first + steps * options.gradient_accumulation_steps * options.train_batch_size * world
    yield from accelerator.prepare_data_loader(loader(Subset(dataset, range(first, last))))
