"""The command `unveil`: parsing and display only."""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import torch
import tyro
from tqdm import tqdm

from unveil import __version__
from unveil.config import nearest
from unveil.foreign import NAMES
from unveil.planning import FEW_STEPS
from unveil.spread import Spread
from unveil.tasks.anomaly import Anomaly, anomaly
from unveil.tasks.bench import Bench, bench
from unveil.tasks.convert import Convert, convert
from unveil.tasks.doctor import Doctor, doctor
from unveil.tasks.embed import Embed, embed
from unveil.tasks.evaluate import EvaluateInpainting, evaluate_inpainting
from unveil.tasks.evaluate_generation import EvaluateGeneration, evaluate_generation
from unveil.tasks.export import Export, export
from unveil.tasks.finetune import Finetune, finetune
from unveil.tasks.finetune_generator import FinetuneGenerator, finetune_generator
from unveil.tasks.generate import Generate, generate
from unveil.tasks.info import Info, info
from unveil.tasks.inpaint import Inpaint, inpaint
from unveil.tasks.plan import Plan, plan
from unveil.tasks.predict import Predict, predict
from unveil.tasks.prepare import Prepare, prepare
from unveil.tasks.pretrain import Pretrain, pretrain
from unveil.tasks.probe import Probe, probe
from unveil.tasks.replay import Replay, replay
from unveil.tasks.segment import Segment, segment
from unveil.tasks.web import Web, web
from unveil.train import Progress

Evaluate = (
    Annotated[EvaluateInpainting, tyro.conf.subcommand("inpainting")]
    | Annotated[EvaluateGeneration, tyro.conf.subcommand("generation")]
)
Command = (
    Annotated[Doctor, tyro.conf.subcommand("doctor")]
    | Annotated[Plan, tyro.conf.subcommand("plan")]
    | Annotated[Prepare, tyro.conf.subcommand("prepare")]
    | Annotated[Pretrain, tyro.conf.subcommand("pretrain")]
    | Annotated[Finetune, tyro.conf.subcommand("finetune")]
    | Annotated[Predict, tyro.conf.subcommand("predict")]
    | Annotated[FinetuneGenerator, tyro.conf.subcommand("finetune-generator")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Inpaint, tyro.conf.subcommand("inpaint")]
    | Annotated[Anomaly, tyro.conf.subcommand("anomaly")]
    | Annotated[Probe, tyro.conf.subcommand("probe")]
    | Annotated[Segment, tyro.conf.subcommand("segment")]
    | Annotated[Embed, tyro.conf.subcommand("embed")]
    | Annotated[
        Evaluate,
        tyro.conf.subcommand(
            "evaluate", description="Score repainting on held-out pictures, or generated pictures beside real ones."
        ),
    ]
    | Annotated[Info, tyro.conf.subcommand("info")]
    | Annotated[Convert, tyro.conf.subcommand("convert")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Replay, tyro.conf.subcommand("replay")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
    | Annotated[Web, tyro.conf.subcommand("web")]
)

COMMANDS = (
    "doctor",
    "plan",
    "prepare",
    "pretrain",
    "finetune",
    "predict",
    "finetune-generator",
    "generate",
    "inpaint",
    "anomaly",
    "probe",
    "segment",
    "embed",
    "evaluate",
    "info",
    "convert",
    "export",
    "replay",
    "bench",
    "web",
)
EVALUATIONS = ("inpainting", "generation")
DESCRIPTION = f"""Unveil {__version__}: masked diffusion auto-encoders for images and video.

Prepare data for fast reading, pre-train on unlabelled pictures, probe the model's features, fine-tune it on labels, repaint
with it, generate.
`unveil COMMAND --help` explains a command.
--json, after any command, makes stdout one JSON object; what is for people then goes to stderr."""


FEW_STEPS_TO_TELL = 200  # the head starts at next to nothing, and digits are half right after some 200
LISTED = 20  # files that could not be used


def say(text: str) -> None:
    """For people, while a command works or when it fails."""
    print(text, file=sys.stderr)


def _counted(
    run: Callable[[Any, Callable[[int, int], None]], dict[str, Any]], unit: str
) -> Callable[[Any], dict[str, Any]]:
    """A command that tells how many of how many it has done, with a bar."""

    def with_bar(options: Any) -> dict[str, Any]:
        bar: tqdm[Any] | None = None  # made at the first news, so that a mistake is told on a line of its own

        def show(done: int, total: int) -> None:
            nonlocal bar
            bar = bar or tqdm(total=total, unit=unit, dynamic_ncols=True, leave=False)
            bar.update(done - bar.n)

        try:
            return run(options, show)
        finally:
            if bar is not None:
                bar.close()

    return with_bar


def _training(run: Callable[[Any, Callable[[Progress], None]], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """A command that trains, with a bar of its steps."""

    def with_bar(options: Any) -> dict[str, Any]:
        bar: tqdm[Any] | None = None

        def show(progress: Progress) -> None:
            nonlocal bar
            if bar is None:
                say(f"unveil: {progress.setup}")
            elif progress.step < bar.n:
                bar.close()
                say("unveil: gradients were no numbers; the run went back to its last save, and on with other draws")
            if bar is None or progress.step < bar.n:
                bar = tqdm(total=progress.num_steps, initial=progress.step, unit="step", dynamic_ncols=True)
            loss = "no number" if progress.loss is None else f"{progress.loss:.4f}"
            bar.set_postfix_str(f"loss {loss}, {progress.images_per_second:.0f} images/s", refresh=False)
            bar.update(progress.step - bar.n)

        try:
            return run(options, show)
        finally:
            if bar is not None:
                bar.close()

    return with_bar


def _announced(run: Callable[[Any, Callable[[str], None]], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """A command that says what it is at, for it takes some seconds."""
    return lambda options: run(options, lambda what: say(f"unveil: {what} ..."))


def _tell_prepare(result: dict[str, Any]) -> Iterator[str]:
    held = (
        f"{result['samples']:,} pictures in {result['shards']:,} shard(s) of {result['bytes'] / 1e6:,.1f} MB together"
    )
    if not result["finished"]:
        yield f"Interrupted: {held} are finished, and the same command goes on from there."
        return
    if result["done_before"]:
        yield f"Finished before, so nothing was done: {held}."
    else:
        rate = (
            ""
            if result["resumed"]
            else f", {(result['samples'] + result['skipped']) / result['seconds']:,.0f} pictures/s"
        )
        yield f"Finished: {held}{rate}."
    yield (
        f"Shrunk: {result['shrunk']:,}. Small enough: {result['copied']:,} copied byte for byte, {result['rewritten']:,} "
        f"rewritten without loss, {result['compressed']:,} compressed."
    )
    if result["compressed"] and result["format"] != "png":
        yield "With --format png, pictures that are small enough keep every value."
    if result["skipped"]:
        yield f"Files that could not be used: {result['skipped']:,}."
    for note, count in result["converted"].items():
        yield f"Converted pictures: {count:,} ({note})."
    if result["skipped"] or result["converted"]:
        yield f"They are listed in {result['out']}/problems.jsonl."
    yield f"Train on them: unveil pretrain --data {result['out']} ..."


def _tell_training(result: dict[str, Any]) -> Iterator[str]:
    loss = "" if result["loss"] is None else f", loss {result['loss']:.4f}"
    state = "Finished" if result["steps_now"] else "Finished before, so nothing was done"
    if not result["finished"]:
        state = "Interrupted and saved; the same command goes on from here"
    if result["resumed"] and result["steps_now"]:
        yield f"Went on from step {result['step'] - result['steps_now']}."
    yield f"{state}: step {result['step']} of {result['num_steps']}, {result['images_seen']} images seen{loss}."
    for damaged in result["damaged_saves"]:
        yield f"A damaged save was passed over: {damaged}."
    if result["skipped_steps"]:
        back = f", and the run went back to its last save {result['went_back']} times" if result["went_back"] else ""
        yield (
            f"Steps whose loss or gradient was no number: {result['skipped_steps']}. They were skipped{back}; the first "
            f"ones' batches lie in {result['out']}/skipped, and `unveil replay` looks into them."
        )
    if result["skipped"]:
        yield f"Files that could not be used: {result['skipped']}."
    for note, count in result["converted"].items():
        yield f"Converted pictures, of those that were read: {count} ({note})."
    if result["skipped"] or result["converted"]:
        yield f"They are listed in {result['out']}/problems.jsonl."
    if "best" in result and "knn" in result["best"]:
        best = result["best"]
        yield f"Nearest neighbours in its features: {best['knn']:.1f} % right at best, at step {best['step']:,}."
    if result["finished"] and result["num_steps"] < FEW_STEPS and "task" not in result:
        little = "noisy samples" if "num_classes" in result else "little but colours"
        yield f"{result['num_steps']} steps are few: expect {little}. Give more --epochs, or a smaller --batch-size."
    if "task" not in result:
        yield (
            f"Curves, and what it sees and paints: {result['out']}/report.html. Weights: {result['out']}/model.safetensors."
        )


# Numbers of a test set in words, by task.
TOLD: dict[str, Callable[[dict[str, float]], str]] = {
    "single": lambda n: f"{n['accuracy']:.2f} % right, {n['mean_class_accuracy']:.2f} % as the mean over classes",
    "multi": lambda n: (
        f"mean average precision {n['mean_average_precision']:.2f} %, {n['labels_right']:.2f} % of labels right"
    ),
    "regression": lambda n: f"R2 {n['r2']:.3f}, mean absolute error {n['mean_absolute_error']:.4g}",
}


def _tell_finetune(result: dict[str, Any]) -> Iterator[str]:
    if not result["resumed"]:
        yield (
            f"Started from {result['start']}: {result['loaded']} of {result['tensors']} tensors are its. Training on "
            f"{result['train_samples']:,} samples, testing on {result['test_samples']:,}."
        )
    yield from _tell_training(result)
    if not result["finished"]:
        return
    told = TOLD[result["task"]]
    if result["num_steps"] < FEW_STEPS_TO_TELL:
        yield f"{result['num_steps']} steps are few to learn by. Give more --epochs, or a smaller --batch-size."
    if result["test_problems"]:
        first = result["test_problems"][0]
        yield f"Test files that could not be used: {len(result['test_problems'])}, as {first['where']}: {first['what']}."
    if result["trained_on_too"]:
        yield f"{result['trained_on_too']:,} of the test samples were trained on too: of new pictures these numbers say little."
    if result["unlabelled"]:
        yield f"{result['unlabelled']:,} samples of the training data have no label and were left out."
    if result["task"] == "single" and any("|" in name for name in result["outputs"]):
        yield "Classes have | in their names. If that separates several labels of one picture, use --task multi."
    blind = result["always_the_same"]
    guess = "" if blind is None else f" Always the most common answer gets {blind:.2f} %."
    yield f"Test data, last epoch: {told(result['last'])}.{guess}"
    if len(result["each"]) > 1 and result["task"] == "regression":
        for name, each in result["each"].items():
            yield f"  {name}: R2 {each['r2']:.3f}, mean absolute error {each['mean_absolute_error']:.4g}"
    if result.get("best"):
        yield f"Best epoch, chosen by these same data: {told(result['best'])} (step {result['best']['step']:.0f})."
    yield f"Look at {result['out']}/report.html. Weights: {result['out']}/model.safetensors (last), best.safetensors."


def _tell_predict(result: dict[str, Any]) -> Iterator[str]:
    if result["counts"] is not None:
        often = sorted(result["counts"].items(), key=lambda item: -item[1])[:10]
        yield "Told most often: " + ", ".join(f"{name} {count:,}" for name, count in often if count) + "."
    if result["scores"] is not None:
        yield f"Of {result['scored']:,} samples with a label: {TOLD[result['task']](result['scores'])}."
    if result["unscored"]:
        yield f"Not scored by the labels that are there: {result['unscored']}"
    if result["skipped"]:
        yield f"Files that could not be used: {result['skipped']}, as {result['problems'][0]}."
    yield f"Wrote {result['samples']:,} rows to {result['out']}."


def _tell_start(result: dict[str, Any]) -> Iterator[str]:
    """Of a training that started from other weights."""
    if not result["resumed"]:
        classes = f"; classes: {result['num_classes']}" if "num_classes" in result else ""
        yield f"Started from {result['start']}: {result['loaded']} of {result['tensors']} tensors are its{classes}."
        yield f"New, and drawn at random: {', '.join(result['fresh']) or 'nothing'}."
        if result["dropped"]:
            yield f"Left behind: {', '.join(result['dropped'])}."
    yield from _tell_training(result)


def _tell_pretrain(result: dict[str, Any]) -> Iterator[str]:
    yield from _tell_start(result) if "start" in result else _tell_training(result)


def _tell_generate(result: dict[str, Any]) -> Iterator[str]:
    classes, guidance = result["classes"], result["guidance"]
    of = "" if classes is None else f" of {len(classes)} class(es)"
    guided = "" if guidance is None else f", {guidance['kind'].replace('_', ' ')} guidance {guidance['scale']:g}"
    yield (
        f"Made {result['num_samples']} sample(s){of} in {result['steps']} {result['sampler'].upper()} steps{guided}: "
        f"{result['network_evaluations']} network evaluations each, {result['samples_per_second']:.1f} samples/s."
    )
    files = result["files"]
    kept = [files[name] for name in ("grid", "npz", "labels") if name in files]
    yield from result["notices"]
    yield f"In {result['out']}: {', '.join(([str(files['samples']) + ' samples'] if files['samples'] else []) + kept)}."


def _tell_probe(result: dict[str, Any]) -> Iterator[str]:
    noise = f", with noise of time {result['time']:g} on the pictures" if result["time"] else ""
    yield f"Features: the mean of the {'class tokens' if result['pool'] == 'class' else 'patches'}{noise}."
    labels = "all" if result["labels_per_class"] is None else f"{result['labels_per_class']} of each class"
    classes = result["num_classes"]
    yield (
        f"Labels: {labels} of {result['train_samples']} training samples; {result['test_samples']} test samples; "
        f"{classes} classes, so guessing gets about {100 / classes:.0f} %."
    )
    lars = result["lars"]
    if lars is not None:
        crops = "augmented pictures" if lars["augment"] else "pictures as they are"
        yield f"LARS: {lars['steps']} steps with {lars['batch_size']} {crops} each."
        if lars["steps"] < FEW_STEPS:
            yield "That is few; the published protocol takes some 7,000 on ImageNet. Give more --epochs."
    titles = {"linear": "linear %", "knn": f"{result['k'][0]}-NN %", "fewshot": "few-shot %", "lars": "LARS %"}
    titles |= {f"knn, k = {k}": f"{k}-NN %" for k in result["k"]}
    methods = list(result["results"]["encoder"])
    yield f"{'features':<20}" + "".join(f"{titles[method]:>12}" for method in methods)
    for name, row in result["results"].items():
        yield f"{name:<20}" + "".join(f"{row[method]:>12.1f}" for method in methods)
    share = max(1, min(99, max(row[methods[0]] for row in result["results"].values()))) / 100
    error = 100 * (share * (1 - share) / result["test_samples"]) ** 0.5
    yield f"With {result['test_samples']} test samples the standard error of a number is about {error:.1f} points."
    if result["trained_on_too"]:
        yield f"{result['trained_on_too']} of the test samples are trained on too, so these numbers flatter."
    yield from _tell_problems(result["problems"])


def _tell_problems(problems: Sequence[dict[str, str]]) -> Iterator[str]:
    if problems:
        yield f"Files that could not be used: {len(problems)}."
    for problem in problems[:LISTED]:
        yield f"Skipped {problem['where']}: {problem['what']}."
    if len(problems) > LISTED:
        yield f"And {len(problems) - LISTED} more, which --json lists."


def _tell_segment(result: dict[str, Any]) -> Iterator[str]:
    noise = f", with noise of time {result['time']:g} on the pictures" if result["time"] else ""
    few = ", which are few: give more --epochs" if result["steps"] < FEW_STEPS else ""
    yield (
        f"A linear head on each patch{noise}: {result['epochs']} epochs over {result['train_pictures']} pictures, "
        f"{result['steps']} steps{few}."
    )
    yield (
        f"{result['test_pictures']} test pictures, {result['num_classes']} classes; naming every pixel as the most common "
        f"class gets {result['most_common']:.1f} % of them."
    )
    yield from _tell_problems(result["problems"])
    yield f"{'features':<20}{'mIoU %':>12}{'pixels %':>12}"
    for name, row in result["results"].items():
        yield f"{name:<20}{row['miou']:>12.1f}{row['pixel_accuracy']:>12.1f}"
    yield f"Pictures, truth and predictions: {result['out']}/contact_sheet.png. All numbers: {result['out']}/segment.json."


def _size_of(number: float) -> str:
    """Bytes in the largest decimal unit of which there is one."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 1000 * size else f"{number / size:,.0f} {unit}"
    return f"{number:.0f} bytes"


def _counts(numbers: dict[str, int], most: int = 6) -> str:
    some = [f"{name}: {count:,}" for name, count in list(numbers.items())[:most]]
    return "; ".join(some) + (f"; and {len(numbers) - most} more" if len(numbers) > most else "")


def _tell_doctor(result: dict[str, Any]) -> Iterator[str]:
    sizes, color, classes, again = result["sizes"], result["color"], result["classes"], result["duplicates"]
    lines = {"data": f"{result['data']}: {result['files']:,} files or rows, {result['readable']:,} can be used"}
    if result["limit"] is not None:
        lines["data"] += f" of {result['looked_at']:,} that were looked at"
    if result["formats"]:
        lines["formats"] = _counts(result["formats"])
        lines["colours"] = _counts(result["modes"])
    if sizes is not None:
        for name in ("height", "width"):
            size = sizes[name]
            lines[name] = f"{size['min']} to {size['max']} pixels, median {size['median']:g}"
        first = sizes["commonest"][0]
        lines["sizes"] = (
            f"{sizes['different']:,} different, most often {first['height']} x {first['width']} ({first['pictures']:,}); "
            f"{sizes['not_square']:,} are not square"
        )
        lines["smaller"] = "; ".join(f"than {side} pixels: {n:,}" for side, n in sizes["smaller_than"].items())
        encoded = f"{_size_of(result['bytes'])} in files, " if result["bytes"] else ""
        lines["bytes"] = f"{encoded}{_size_of(result['decoded_bytes'])} decoded"
        lines["mean"] = ", ".join(f"{mean:.4f}" for mean in color["mean"])
        lines["std"] = (
            ", ".join(f"{std:.4f}" for std in color["std"]) + f" (in [0, 1], of {color['pictures']:,} pictures)"
        )
        lines["values"] = f"{color['low']:.4g} to {color['high']:.4g}"
    if result["turned"]:
        lines["turned"] = f"{result['turned']:,} lie on their side or are mirrored, and are read upright as EXIF says"
    if result["converted"]:
        lines["converted"] = _counts(result["converted"])
    if classes is not None:
        counts = classes["counts"]
        even = min(counts.values()) == max(counts.values())
        each = (
            f"{min(counts.values()):,} of each"
            if even
            else f"{min(counts.values()):,} to {max(counts.values()):,} of each"
        )
        lines["classes"] = f"{_tell_classes(len(counts), tuple(counts))}, {each}"
        if classes["unlabelled"]:
            lines["classes"] += f"; {classes['unlabelled']:,} without a label"
    if sizes is not None:
        lines["duplicates"] = (
            f"{again['extra']:,} there again with the same pixels, {again['files']:,} of them as the same file"
        )
    if result["test_data"] is not None:
        lines["test data"] = (
            f"{result['test_data']}: {result['test_looked_at']:,} pictures, {len(result['in_both']):,} in both"
        )
    for name, value in lines.items():
        yield f"{name:<12}{value}"
    yield from _tell_problems(result["problems"])
    for problem in result.get("test_problems", ())[:LISTED]:
        yield f"Skipped in the test data {problem['where']}: {problem['what']}."
    for group in again["groups"][:LISTED]:
        yield f"The same picture: {', '.join(group[:5])}{' ...' if len(group) > 5 else ''}."
    if len(again["groups"]) > LISTED:
        yield f"And {len(again['groups']) - LISTED} more such groups, which --json lists."
    for pair in result["in_both"][:LISTED]:
        yield f"In both: {pair['data']} is {pair['test_data']} of the test data."
    yield from ("- " + line for line in result["advice"])
    if result["out"] is not None:
        yield f"Wrote {result['out']}."


def _tell_time(seconds: float) -> str:
    """A time in the unit that reads best."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} seconds" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _tell_plan(result: dict[str, Any]) -> Iterator[str]:
    training, data, tokens, clock = result["training"], result["data"], result["tokens"], result["time"]
    memory, reading, files = result["memory"], result["reading"], result["disk"]["files"]
    branches = "; ".join(
        ("" if branch["share"] == 1 else f"{branch['share']:.0%} of the clips: ")
        + f"{branch['visible']} visible, {branch['hidden']} hidden"
        for branch in tokens["branches"]
    )
    parts = ", ".join(f"{name} {count:,}" for name, count in result["parameters"].items())
    channels, frames, height, width = result["clip"]
    of_frames = "" if frames == 1 else f"{frames} frames of "
    shared = "" if training["num_devices"] == 1 else f", on {training['num_devices']} devices"
    at_once = "" if training["clips_at_once"] == training["batch_size"] else f", {training['clips_at_once']} at once"
    lines = {
        "model": f"{result['recipe']} {result['size']}: {sum(result['parameters'].values()):,} parameters ({parts})",
        "tokens": f"{tokens['number']} of {tokens['values']} values each; {branches}",
        "data": f"{data['samples']:,} samples, read as {of_frames}{channels} x {height} x {width}; about "
        f"{_size_of(data['decoded_bytes'])} decoded, {'kept in memory' if data['in_memory'] else 'read again in each epoch'}",
        "batch": f"{training['batch_size']:,}{shared}{at_once}; learning rate {training['base_lr']:.3g} x "
        f"{training['batch_size']} / 256 = {training['lr']:.3g}, reached after {training['warmup_steps']:,} steps",
        "length": f"{training['epochs']:,} epochs of {training['steps_per_epoch']:,} steps: {training['num_steps']:,} steps, "
        f"{training['images_seen']:,} pictures seen",
        "arithmetic": f"{result['arithmetic']['multiply_adds_per_clip'] / 1e6:,.1f} million multiply-adds a picture forward, "
        f"{result['arithmetic']['tflops']:,.4g} x 10^12 operations in all",
    }
    if clock["step_seconds"] is None:
        lines["time"] = f"not known: no step was run on {training['device']}"
    else:
        lines["time"] = (
            f"about {_tell_time(3600 * clock['hours'])}, {_tell_time(clock['epoch_seconds']['other'])} an epoch; a step "
            f"{_tell_time(clock['step_seconds'])}, {training['batch_size'] / clock['step_seconds']:,.0f} pictures a second"
        )
        measured = clock["measured"]
        if measured is not None:
            lines[""] = f"measured here, {training['device']} in {training['precision']}: the median of "
            lines[""] += f"{measured['measured_steps']} steps of {measured['measured_batch']} pictures"
            if measured["measured_batch"] != training["batch_size"]:
                lines[""] += ", extrapolated to the batch"
            lines[""] += f"; {clock['reached_tflops']:.3g} TFLOPS"
            lines[""] += (
                "" if clock["mfu"] is None else f", {clock['mfu']:.0%} of the datasheet's {clock['peak_tflops']:g}"
            )
        else:
            lines[""] = (
                f"not measured: by arithmetic at {clock['mfu']:.0%} of {clock['peak_tflops']:g} TFLOPS on each device"
                f"{', the forward pass made twice' if training['gradient_checkpointing'] else ''}"
            )
    again = "" if not data["in_memory"] else f", {reading['again_per_second']:,.0f} once in memory"
    workers = f"{reading['workers']} workers" if reading["workers"] else "read between the steps"
    lines["reading"] = (
        f"{reading['first_per_second']:,.0f} pictures a second by one process{again} ({reading['pictures']} tried); {workers}"
    )
    kept = "not counted" if memory["activations"] is None else _size_of(memory["activations"])
    fixed = sum(memory[name] for name in ("weights", "gradients", "optimizer", "averages"))
    limit = "" if memory["limit"] is None else f", of {_size_of(memory['limit'])}"
    on_device = fixed + (memory["activations"] or 0) + memory["gathered"]
    gathered = f", gathered from the shards {_size_of(memory['gathered'])}" if memory["gathered"] else ""
    lines["memory"] = (
        f"{_size_of(on_device)}{limit}: weights {_size_of(memory['weights'])}, gradients {_size_of(memory['gradients'])}, "
        f"AdamW {_size_of(memory['optimizer'])}, averages {_size_of(memory['averages'])}, activations {kept}{gathered}"
    )
    if memory["pictures"]:
        lines["memory"] += f"; and pictures {_size_of(memory['pictures'])}"
    lines["memory"] += ". Python and PyTorch come on top, about 0.7 GB"
    disk = result["disk"]
    lines["disk"] = f"{_size_of(sum(files.values()) + disk['best'] + disk['keep'] * disk['save'])}: " + ", ".join(
        f"{name} {_size_of(size)}" for name, size in files.items()
    )
    lines["disk"] += f", best.safetensors {_size_of(disk['best'])}" if disk["best"] else ""
    lines["disk"] += f", {disk['keep']} save(s) of about {_size_of(disk['save'])}; {_size_of(disk['free'])} free"
    if result["budget"] is not None:
        budget = result["budget"]
        lines["budget"] = f"{budget['hours']:g} hours: {budget['epochs']:,} epochs, {budget['num_steps']:,} steps"
    for name, value in lines.items():
        yield f"{name:<12}{value}"
    yield from ("- " + line for line in result["advice"])


def _tell_embed(result: dict[str, Any]) -> Iterator[str]:
    whose = {"mean": "the mean of the patches", "class": "the mean of the class tokens", "patches": "all patches"}
    noise = f", with noise of time {result['time']:g} on the pictures" if result["time"] else ""
    labels = "without labels" if result["classes"] is None else f"labels of {len(result['classes'])} classes"
    yield f"Features: {whose[result['pool']]}{noise}; {' x '.join(map(str, result['shape']))} values for a sample."
    yield from _tell_problems(result["problems"])
    for note, count in result["converted"].items():
        yield f"Converted pictures, of those that were read: {count} ({note})."
    yield f"Wrote {result['out']}: {result['samples']} samples, {labels}."


def _tell_mean(told: dict[str, float | None], digits: int) -> str:
    """A mean and half the width of its confidence interval."""
    mean, high = told["mean"], told["high"]
    assert mean is not None
    return f"{mean:.{digits}f}" + ("" if high is None else f" ± {high - mean:.{digits}f}")


def _tell_evaluate_inpainting(result: dict[str, Any]) -> Iterator[str]:
    height, width = result["size"]
    sampled = ""
    if "std" in result:
        sampled = f", {result['num_samples']} sample(s) of {result['num_steps']} {result['sampler'].upper()} steps"
    yield f"{result['pictures']} pictures, mask {result['mask']}{sampled}, seed {result['seed']}."
    yield f"Scored at {width} x {height} pixels, to which pictures came by {result['resize']}."
    yield f"Mean over pictures, and its 95 % confidence interval ({result['interval'].partition('by ')[2]}):"
    scores = result["scores"]
    units = {"psnr": "PSNR dB", "ssim": "SSIM", "lpips_alex": "LPIPS alex", "lpips_vgg": "LPIPS vgg"}
    for region, title in (("hole", "in the hole"), ("whole", "over the whole")):
        yield f"{title:<16}" + "".join(f"{units[name]:>18}" for name in scores)
        for filling in scores["psnr"][region]:
            numbers = [_tell_mean(of[region][filling], 2 if name == "psnr" else 4) for name, of in scores.items()]
            yield f"  {filling.replace('_', ' '):<14}" + "".join(f"{number:>18}" for number in numbers)
    if "std" in result:
        yield f"The samples' mean beats every sample on {result['mean_beats_all']:.0%} of the pictures."
        yield f"Deviation between {result['num_samples']} samples: {result['std']:.3f} of the range."
        yield f"Sharpness, Laplacian energy of the samples over the truth's (1 is as sharp): {result['sharpness']:.2f}."
    yield from result["notices"]


def _tell_evaluate_generation(result: dict[str, Any]) -> Iterator[str]:
    scores, (height, width) = result["scores"], result["image_size"]
    real = "an unknown number of" if result["num_reference"] is None else f"{result['num_reference']:,}"
    yield f"{result['num_images']:,} pictures of {width} x {height} beside {real} of {result['reference']}."
    extractor = result["extractor"]
    yield f"Resized {result['resize_means']} ({result['resize']})."
    yield f"Seen by {extractor['name']}, weights {extractor['sha256'][:8]}; seed {result['seed']}."
    titles = {
        "fid": "FID",
        "sfid": "sFID",
        "inception_score": "Inception score",
        "precision": "precision",
        "recall": "recall",
    }
    for name, title in titles.items():
        if name in scores:
            yield f"  {title:<16}{scores[name]:10.4f}"
    if "kid" in scores:
        kid = scores["kid"]
        yield f"  {'KID':<16}{kid['mean']:10.6f}, deviating by {kid['std']:.6f} between subsets of {kid['subset']:,}"
    yield from result["notices"]
    if result["statistics"] is not None:
        where = "taken from" if result["statistics_reused"] else "kept in"
        yield f"What was seen in the reference is {where} {result['statistics']}."


def _tell_inpaint(result: dict[str, Any]) -> Iterator[str]:
    yield from result["notices"]
    yield f"Repainted {len(result['pictures'])} picture(s) into {result['out']}; side by side in {result['sheet']}."


def _tell_anomaly(result: dict[str, Any]) -> Iterator[str]:
    yield from result["notices"]
    if "auroc" in result:

        def percent(value: float | None) -> str:
            return "unknown, as only one kind is there" if value is None else f"{value:.1f} %"

        areas = result["auroc"]
        yield f"Area under the ROC curve, pictures: {percent(areas['pictures'])}."
        for kind, value in areas["by_kind"].items():
            yield f"  {kind}: {percent(value)}"
        if "pixels" in areas:
            yield f"Area under the ROC curve, pixels: {percent(areas['pixels'])}."
    against = f"above what {result['calibrated']} normal pictures show" if result["calibrated"] else "not calibrated"
    yield f"Scores of {len(result['pictures'])} pictures, {against}: {result['scores']}; the highest in {result['sheet']}."


def _tell_branch(branch: dict[str, Any]) -> str:
    """One branch in words."""
    share = "" if branch["share"] == 1 else f"{branch['share']:.0%} of the clips: "
    terms = ", ".join(
        f"{'' if term['weight'] == 1 else str(term['weight']) + ' '}{'patch-normalised ' if term['patch_norm'] else ''}"
        f"{term['predict']} on {term['on']} tokens{' as a velocity' if term['space'] == 'v' else ''}"
        for term in branch["terms"]
    )
    hidden = f"{branch['mask_ratio']:.1%}".replace(".0%", "%")
    return f"{share}{hidden} hidden ({branch['masking']}), noise on {branch['noise_on']}, predicts {terms}"


def _tell_classes(num_classes: int, names: Sequence[str]) -> str:
    if not num_classes:
        return "none"
    return f"{num_classes}" + (f" ({', '.join(names[:10])}{', ...' if len(names) > 10 else ''})" if names else "")


def _tell_outputs(recognition: dict[str, Any]) -> str:
    names = recognition["outputs"]
    what = {"single": "one of", "multi": "any of", "regression": "the numbers"}[recognition["task"]]
    some = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    return f"{what} {some}, from the mean of the {'class tokens' if recognition['pool'] == 'class' else 'patches'}"


def _tell_replay(result: dict[str, Any]) -> Iterator[str]:
    yield f"Step {result['step']:,}, {result['num_clips']} clips, which was computed in {result['precision']}:"
    if not result["same_noise"]:
        yield "(With other noise than the run's, which was on another device: a GPU and a CPU draw their own. See --device.)"
    for title, told in (("as it was", result["as_it_was"]), ("in fp32", result["in_fp32"])):
        loss = "no number" if told["loss"] is None else f"{told['loss']:.4g}"
        bad = told["bad_gradients"]
        gradients = f"no number in the gradient of {len(bad)} tensors, as {bad[0]}" if bad else "a gradient of numbers"
        clips = f"; by themselves, clips {_listed(told['bad_clips'])}" if told["bad_clips"] else ""
        yield f"{title}: loss {loss}, {gradients}{clips}."
    if result["bad_input"]:
        yield f"Values that are no numbers or outside [0, 1] are in clips {_listed(result['bad_input'])}."
    if result["as_it_was"]["bad_gradients"] and not result["in_fp32"]["bad_gradients"]:
        yield "So the precision is to blame: train with --precision fp32."


def _tell_bench(result: dict[str, Any]) -> Iterator[str]:
    peaks = ", ".join(f"{name.replace('_', ' ')} {peak / 1e12:.3g}" for name, peak in result["peaks"].items())
    yield (
        f"{result['hardware']}, {result['threads']} threads, {result['precision']}, {result['size']} at {result['image_size']} "
        f"px, batches of {result['batch_size']}, median of {result['rounds']} rounds. Peaks in 10^12 operations/s: {peaks}."
    )
    for row in result["rows"]:
        share = ", ".join(
            f"{value:.0%} of the {name.replace('_', ' ')} peak" for name, value in row["share_of_peak"].items()
        )
        beside = (
            f", {row['speed_over_hugging_face']:.2f} of Hugging Face's speed"
            if "speed_over_hugging_face" in row
            else ""
        )
        stages = ", ".join(f"{name} {1e3 * seconds:.3g}" for name, seconds in row["stages"].items())
        yield f"{row['name']}: {row['images_per_second']:.4g} images/s{beside}, {share}, {row['memory_bytes'] / 2**30:.1f} GiB."
        low, high = (result["batch_size"] / row["seconds"][end] for end in ("highest", "lowest"))
        yield f"    {low:.4g} to {high:.4g} images/s; ms a step: {stages}"
    if "data" in result:
        data = result["data"]
        told = f"{data['name']} is too little data to time: it has fewer than two batches."
        if data["images_per_second"] is not None:
            told = (
                f"{data['name']}: read at {data['read_per_second']:.4g} images/s by {data['workers']} workers; "
                f"{data['contender']} waits {data['data_wait']:.1%} of its time for it."
            )
        yield told
    yield f"Record: {result['file']}."


def _listed(numbers: list[int]) -> str:
    more = f" and {len(numbers) - LISTED} more" if len(numbers) > LISTED else ""
    return ", ".join(str(number) for number in numbers[:LISTED]) + more


def _tell_info(result: dict[str, Any]) -> Iterator[str]:
    recipe, about = result["recipe"], result["about"]
    clip = recipe["clip"]
    total = sum(result["parameters"].values())
    parts = ", ".join(f"{name} {count:,}" for name, count in result["parameters"].items())
    missing, recognition = result["missing_tensors"], result["recognition"]
    work = "one whole clip" if recognition else "one masked clip"
    steps = "steps" if about["num_steps"] in (None, about["step"]) else f"of {about['num_steps']:,} steps, not finished"
    lines = {
        "file": result["file"],
        "recipe": f"{recipe['name']} {recipe['size']}",
        "pre-trained on" if recognition else "trains on": "; ".join(
            _tell_branch(branch) for branch in recipe["branches"]
        ),
        "parts": "the encoder only, for probe, embed, finetune and `unveil pretrain --init`",
        "can": ", ".join(result["can"]),
        "clip": f"{clip['channels']} channels, {clip['frames']} frame(s) of {clip['height']} x {clip['width']} "
        f"{'pixels' if clip['bounded'] else 'latents'}, "
        f"patches of {clip['tubelet_size']} x {clip['patch_size']} x {clip['patch_size']}",
        "classes": _tell_classes(recipe["condition"]["num_classes"], about["classes"]),
        **({"tells": _tell_outputs(recognition)} if recognition else {}),
        "normalisation": f"mean {clip['mean']}, std {clip['std']}",
        "parameters": f"{total:,} ({parts})",
        "multiply-adds": f"{result['multiply_adds_per_clip'] / 1e6:,.1f} million for {work}, forward",
        "trained on": about["data"],
        "trained for": f"{about['step']:,} {steps}, {about['images_seen']:,} images",
        "weights": "as trained"
        if about["ema_decay"] is None
        else f"running average (EMA) of decay {about['ema_decay']:g}",
        "command": about["command"],
        "version": about["version"],
        "tensors": "all there" if not missing else f"{len(missing)} are missing, the first is {missing[0]!r}",
    }
    for name in ("trains on", "multiply-adds") if about["parts"] else ("parts",):
        del lines[name]  # how an encoder alone was trained is not known
    if recognition:
        del lines["classes"]  # of what was generated before; "tells" has those of now
    for name, value in lines.items():
        yield f"{name:<15}{value}"


def _tell_convert(result: dict[str, Any]) -> Iterator[str]:
    recipe = result["recipe"]
    yield (
        f"Wrote {result['out']}: {recipe['name']} {recipe['size']}, {result['parameters']:,} parameters, from "
        f"{len(result['used'])} tensors of {NAMES[result['kind']]}'s names."
    )
    for reason, count in Counter(result["left"].values()).items():
        yield f"Tensors left out: {count} ({reason})."
    yield from result["notices"]


def _tell_export(result: dict[str, Any]) -> Iterator[str]:
    head = "" if result["head"] is None else " with its head"
    what = "all of" if result["whole"] else "the encoder of"
    yield f"Wrote {result['out']}: {what} {result['recipe']}{head}. It is loaded by"
    yield f"  {result['load']}"
    yield from result["notices"]


def _tell_web(result: dict[str, Any]) -> Iterator[str]:
    yield f"The page at {result['url']} has ended."


RUN: dict[type, tuple[Callable[[Any], dict[str, Any]], Callable[[dict[str, Any]], Iterator[str]]]] = {
    Doctor: (_counted(doctor, "picture"), _tell_doctor),
    Plan: (_announced(plan), _tell_plan),
    Prepare: (_counted(prepare, "picture"), _tell_prepare),
    Pretrain: (_training(pretrain), _tell_pretrain),
    Finetune: (_training(finetune), _tell_finetune),
    Predict: (_counted(predict, "sample"), _tell_predict),
    FinetuneGenerator: (_training(finetune_generator), _tell_start),
    Generate: (_counted(generate, "sample"), _tell_generate),
    Inpaint: (_counted(inpaint, "picture"), _tell_inpaint),
    Anomaly: (_counted(anomaly, "picture"), _tell_anomaly),
    Probe: (_counted(probe, "sample"), _tell_probe),
    Segment: (_counted(segment, "picture"), _tell_segment),
    Embed: (_counted(embed, "sample"), _tell_embed),
    EvaluateInpainting: (_counted(evaluate_inpainting, "picture"), _tell_evaluate_inpainting),
    EvaluateGeneration: (_counted(evaluate_generation, "picture"), _tell_evaluate_generation),
    Info: (info, _tell_info),
    Convert: (convert, _tell_convert),
    Export: (export, _tell_export),
    Replay: (replay, _tell_replay),
    Bench: (_counted(bench, "round"), _tell_bench),
    Web: (lambda options: web(options, lambda text: say(f"unveil: {text}")), _tell_web),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, run, print. User errors are one sentence on stderr and exit code 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in words
    words = [word for word in words if word != "--json"]
    if words and not words[0].startswith("-") and words[0] not in COMMANDS:
        say(f"unveil: There is no command {words[0]!r}. {nearest(words[0], COMMANDS)}")
        sys.exit(2)
    if words[:1] == ["evaluate"] and not {*words[1:2]} & {*EVALUATIONS, "-h", "--help"}:
        say(
            "unveil: Say what to evaluate: `unveil evaluate inpainting` scores a model's repainting, and `unveil evaluate "
            "generation` generated pictures."
        )
        sys.exit(2)
    options = tyro.cli(Command, prog="unveil", description=DESCRIPTION, args=words or ["--help"])  # type: ignore[arg-type]
    run, tell = RUN[type(options)]
    try:
        Spread().check(isinstance(options, Pretrain | Finetune | FinetuneGenerator | Generate))
        result = run(options)
    except ValueError as error:
        say(f"unveil: {error}")
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        say(f"unveil: {str(error).splitlines()[0]} Use a smaller --batch-size, or a smaller model.")
        sys.exit(2)
    except OSError as error:
        say(f"unveil: {error.filename}: {error.strerror}." if error.filename and error.strerror else f"unveil: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        say("unveil: interrupted")
        sys.exit(130)
    if "rank" in result:  # one of several processes, of which the first speaks for all
        return
    try:
        print("\n".join(tell(result)), file=sys.stderr if as_json else sys.stdout, flush=True)
        if as_json:
            print(json.dumps(result, allow_nan=False), flush=True)
    except BrokenPipeError:  # `| head` has read enough; Python would complain again when it closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if result.get("interrupted") == "SIGINT":  # SIGTERM is a scheduler's way to ask for a save, which was made
        sys.exit(130)


if __name__ == "__main__":  # `torchrun -m -- unveil.cli` needs a module
    main()
