"""What a run will take, told by its own trainer: what is known without running anything, and what a few steps show."""

import copy
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unveil.checkpoint import LAST, WEIGHTS, weights_bytes
from unveil.data import Batch, Order, Sample, Samples, collate
from unveil.layers import blocks_of
from unveil.optim import adam_state
from unveil.pretraining import Pretraining
from unveil.pretraining_job import PretrainingJob
from unveil.recipe import Recipe
from unveil.trainer import Trainer
from unveil.trouble import gradient_norm, guard

READ_AT_MOST = 256  # pictures that the reading speed is measured on
AROUND = 1760  # bytes that a save has for each tensor beside its values, of PyTorch 2.12
FIRST = 4  # clips to begin the measurement with


@dataclass(frozen=True)
class Activations:
    """Bytes that the forward pass keeps for the backward one: fixed + per_clip * clips at once."""

    fixed: int
    per_clip: int

    def of(self, clips: int) -> int:
        return self.fixed + self.per_clip * clips


@dataclass(frozen=True)
class Reading:
    """Seconds for a picture by one process, the first time and again, and what was read for that."""

    first: float
    again: float
    samples: list[Sample]
    tried: int


# What is known without running anything


def outline(asked: Pretraining) -> Trainer:
    """The very trainer of a run, without memory: its tensors have shapes only."""
    run = dataclasses.replace(asked.run, device="meta", workers=0)
    samples = copy.copy(asked.samples)
    samples.source = copy.copy(samples.source)
    samples.source.classes = None  # for them the job would draw whose neighbours it looks at, which takes memory
    with torch.device("meta"):
        job = PretrainingJob(asked.recipe, samples, run)
    return Trainer(job, asked.samples, run)


def static_memory(trainer: Trainer) -> dict[str, int]:
    """Bytes of what lives as long as the run: weights with buffers, gradients, AdamW's two moments, running averages."""
    parameters = sum(p.nbytes for p in trainer.model.parameters())
    return {
        "weights": parameters + sum(b.nbytes for b in trainer.model.buffers()),
        "gradients": parameters,
        "optimizer": 2 * parameters + 4 * sum(1 for _ in trainer.model.parameters()),  # and each one's number of steps
        "averages": sum(x.nbytes for x in (*trainer.averages.parameters(), *trainer.averages.buffers())),
    }


def gathered_bytes(trainer: Trainer) -> int:
    """Bytes that are put together from shards at once, at most: two blocks, as the next one comes while one is computed, the
    gradient of one, and all that lies outside the blocks, with its gradient.
    """
    blocks = [sum(p.nbytes for p in block.parameters()) for block in blocks_of(trainer.model)]
    outside = sum(p.nbytes for p in trainer.model.parameters()) - sum(blocks)
    return 2 * outside + 3 * max(blocks, default=0)


def file_sizes(trainer: Trainer, recipe: Recipe, images_seen: int) -> dict[str, int]:
    """Bytes of each weights file at the end by name, as `Trainer.save` writes them, if every sample can be read.

    Args:
        trainer: of `outline`; it is at its last step afterwards.
    """
    trainer.step, trainer.images_seen = trainer.num_steps, images_seen
    decays, about = recipe.training.ema_decays, trainer.about(average=False)
    sizes = {LAST if decays else WEIGHTS: weights_bytes(recipe, trainer.model.state_dict(), about)}
    for i, decay in enumerate(decays):
        name = WEIGHTS if i == 0 else f"ema-{decay:g}.safetensors"
        sizes[name] = weights_bytes(recipe, trainer.model.state_dict(), dataclasses.replace(about, ema_decay=decay))
    return sizes


def save_size(trainer: Trainer) -> int:
    """About how many bytes a save to go on from has: its tensors', and what stands around each.

    Args:
        trainer: of `outline`.
    """
    for parameter in trainer.model.parameters():  # AdamW makes these at its first step
        trainer.optimizer.state[parameter] = adam_state(parameter)
    state = trainer.state()
    tensors = [*state["model"].values(), *state["averages"].values()]
    tensors += [value for moments in state["optimizer"].values() for value in moments.values()]
    return sum(tensor.nbytes + AROUND for tensor in tensors)


# What has to be measured


def read_some(samples: Samples, order: Order, seconds: float) -> Reading:
    """Read samples in the order of the first epoch, at most so long but one at least; and once more.

    Raises:
        ValueError: none can be read.
    """
    keys = list(itertools.islice((key for batch in order for key in batch), READ_AT_MOST))
    good: list[Sample] = []
    tried, first_problem = 0, ""
    begin = time.perf_counter()
    for key in keys:
        sample = samples[key]
        tried += 1
        if sample.values is not None:
            good.append(sample)
        elif sample.problem is not None:
            first_problem = first_problem or f"{sample.problem.where}: {sample.problem.reason}"
        if good and time.perf_counter() - begin > seconds:
            break
    first = (time.perf_counter() - begin) / tried
    if not good:
        raise ValueError(
            f"None of the first {tried} samples of {samples.source.name!r} can be read; the first problem: {first_problem}. "
            "`unveil doctor` looks at all of them."
        )
    begin = time.perf_counter()
    for key in keys[:tried]:
        samples[key]
        if time.perf_counter() - begin > seconds:
            break
    return Reading(first, (time.perf_counter() - begin) / tried, good, tried)


def a_batch(samples: list[Sample], indices: list[int]) -> Batch:
    """Clips that were read, again and again, as the samples of these numbers, at the first places of an epoch."""
    some = (samples[place % len(samples)] for place in range(len(indices)))
    named = zip(indices, range(len(indices)), some, strict=True)
    return collate([dataclasses.replace(sample, index=index, place=place, note=None) for index, place, sample in named])


def saved_bytes(trainer: Trainer, batch: Batch) -> int:
    """Bytes that a forward pass of this batch, in one piece, keeps for the backward pass.

    On a GPU the most that the allocator held in both passes, beside what was there before. Else the storages that autograd
    saves, each once, without the parameters: the kernels' scratch, and Python itself, come on top. With gradient
    checkpointing these are the inputs of the blocks, and the storages of the block that saves the most.
    """
    job, device = trainer.job, torch.device(trainer.run.device)
    clips, drawn = job.inputs(batch, 0, list(range(len(batch.indices))))

    def forward() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=trainer.run.precision == "bf16"):
            return job.objective(clips, drawn)[0]

    if device.type == "cuda":
        forward().backward()  # so that gradients are there before, as they are counted apart
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        forward().backward()
        return torch.cuda.max_memory_allocated(device) - before
    weights = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}

    def count(
        tensor: Tensor, storages: dict[int, int]
    ) -> Tensor:  # the graph holds it, so that no address is used twice
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    saved: dict[int, int] = {}
    once: list[int] = []  # by a block whose forward pass is computed again

    def look(block: nn.Module, inputs: tuple[Any, ...]) -> None:
        for part in inputs:
            for tensor in part if isinstance(part, tuple) else (part,):
                if tensor is not None:
                    count(tensor, saved)
        mine: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: count(tensor, mine), lambda tensor: tensor):
            output = block.compute(*inputs)  # type: ignore[operator]
        once.append(sum(nbytes for address, nbytes in mine.items() if address not in saved))
        del output

    hooks = [block.register_forward_pre_hook(look) for block in blocks_of(trainer.model) if block.recompute]
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: count(tensor, saved), lambda tensor: tensor):
        loss = forward()
    for hook in hooks:
        hook.remove()
    del loss
    return sum(saved.values()) + max(once, default=0)


def activations(trainer: Trainer, samples: list[Sample], least: int) -> Activations:
    """Measured on two small batches, `least` clips and twice as many; one alone is no measure, as its copies can be views."""
    least = max(2, least)
    few, more = (saved_bytes(trainer, a_batch(samples, list(range(n)))) for n in (least, 2 * least))
    per_clip = (more - few) // least
    return Activations(max(0, few - per_clip * least), per_clip)


def update(trainer: Trainer, loss: Tensor) -> None:
    """What a step does once the gradients of a loss are there."""
    norm = gradient_norm(trainer.model, trainer.job.training.grad_clip)
    guard(trainer.optimizer, loss, norm)
    trainer.optimizer.step()
    for average in trainer.averages:
        average.update_parameters(trainer.model)  # type: ignore[operator]


def one_step(trainer: Trainer, batch: Batch, pieces: int) -> None:
    """A step of `unveil.train`, at the learning rate 0 so that the weights stay what they were drawn as."""
    device = torch.device(trainer.run.device)
    trainer.optimizer.zero_grad(set_to_none=True)
    value = torch.zeros((), device=device)
    for piece in batch.pieces(pieces):
        clips, drawn = trainer.inputs(piece)
        with torch.autocast(device.type, torch.bfloat16, enabled=trainer.run.precision == "bf16"):
            loss, _ = trainer.job.objective(clips, drawn)
        loss = loss * (len(clips) / len(batch.indices))
        loss.backward()
        value += loss.detach()
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.0
    update(trainer, value)


def _seconds(trainer: Trainer, run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    if trainer.run.device.startswith("cuda"):
        torch.cuda.synchronize(trainer.run.device)
    return time.perf_counter() - begin


def time_steps(trainer: Trainer, samples: list[Sample], order: Order, most: int, budget: float) -> dict[str, Any]:
    """Time whole steps: of the run's batch if two of them fit into the budget, else of a smaller one, extrapolated.

    Args:
        most: clips of a batch at most, for memory.
        budget: seconds.

    Returns:
        "step_seconds" of the run's batch, of which "update_seconds" go to optimiser and averages whatever the batch;
        "measured_steps", of "measured_batch" clips.
    """
    indices = [key[-1] for key in next(iter(order))]
    whole, pieces = len(indices), trainer.run.accumulate
    trainer.model.train()

    def step(clips: int) -> float:
        batch = a_batch(samples, indices[:clips])
        # a smaller batch in one piece, as one piece of a larger one
        return _seconds(trainer, lambda: one_step(trainer, batch, pieces if clips == whole else 1))

    size = min(FIRST, whole, most)
    step(size)  # allocates, and picks kernels
    once = step(size)
    clips = whole if 2 * once * whole / size <= budget else int(size * budget / (2 * once))
    clips = max(size, min(clips, whole, most))
    begin, times = time.perf_counter(), []
    while not times or time.perf_counter() - begin < budget:
        times.append(step(clips))
    median = statistics.median(times)
    nothing = torch.zeros((), device=trainer.run.device)
    updating = min(median, *(_seconds(trainer, lambda: update(trainer, nothing)) for _ in range(2)))
    return {
        "step_seconds": median if clips == whole else updating + (median - updating) * whole / clips,
        "update_seconds": updating,
        "measured_steps": len(times),
        "measured_batch": clips,
    }
