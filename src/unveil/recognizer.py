"""Recognition: an encoder with a pool, a norm and one Linear on it; how it is trained, scored and kept."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from unveil.checkpoint import About, fill, find_weights, load_encoder, read_header, read_recognition
from unveil.finetuning import FineTuning, Recognition
from unveil.layers import norm_layer
from unveil.model import AnyModel, Backbone
from unveil.recipe import Recipe
from unveil.tokens import Grid

HEAD_STD = 2e-5  # of the new Linear's weights; MAE's


class Recognizer(Backbone):
    """An encoder that sees whole clips, clean, and tells classes, labels or numbers.

    With the pool "mean" the norm comes after it, as in MAE's fine-tuning; with "class" before it, over each token.
    """

    def __init__(self, recipe: Recipe, recognition: Recognition) -> None:
        super().__init__(
            recipe, final_norm=False, told=recipe.time_in_encoder, drop_path=recognition.training.drop_path
        )
        self.recognition = recognition
        if recognition.pool == "class" and not recipe.encoder.num_class_tokens:
            raise ValueError(f"This {recipe.name} has no class token. Use --pool mean.")
        self.fc_norm = norm_layer(recipe.network.norm, recipe.encoder.embed_dim, recipe.network.norm_eps)
        self.head = nn.Linear(recipe.encoder.embed_dim, len(recognition.outputs))
        nn.init.trunc_normal_(self.head.weight, std=HEAD_STD)
        nn.init.zeros_(self.head.bias)

    def pooled(self, clip: Tensor) -> Tensor:
        """(B, C, T, H, W) to (B, D), what the head reads."""
        encoded, num_class_tokens = self.encode(clip), self.recipe.encoder.num_class_tokens
        if self.recognition.pool == "mean":
            return self.fc_norm(encoded[:, num_class_tokens:].mean(1))
        return self.fc_norm(encoded[:, :num_class_tokens]).mean(1)

    def forward(self, clip: Tensor) -> Tensor:
        """(B, C, T, H, W) to logits, or to standardised numbers, (B, K), which bf16 would round too far."""
        pooled = self.pooled(clip)
        with torch.autocast(pooled.device.type, enabled=False):
            return self.head(pooled.float())

    def tell(self, output: Tensor) -> Tensor:
        """Logits or standardised numbers as probabilities of classes or labels, or as numbers, (B, K) float64 on the CPU."""
        if self.recognition.task == "single":
            return output.softmax(1)
        if self.recognition.task == "multi":
            return output.sigmoid()
        # on the CPU, as not every device has float64, which numbers need that are large beside their spread, as dates are
        offset, scale = standard_of(self.recognition)
        return output.cpu().double() * scale + offset

    @torch.inference_mode()
    def predict(self, clip: Tensor) -> Tensor:
        """(B, C, T, H, W) to probabilities of the classes, or of each label, or to numbers, (B, K)."""
        return self.tell(self(clip).float())


def tuned_features(model: Recognizer, pool: str | None = None, time: float = 0.0) -> Callable[[Tensor, Tensor], Tensor]:
    """What the head of a fine-tuned network reads, as `unveil.features.encoder_features` gives those of a pre-trained one.

    Raises:
        ValueError: another pool than its own, or a time; it saw clean clips only.
    """
    told = model.recognition.pool
    if pool not in (None, told) or time:
        raise ValueError(
            f"This {model.recipe.name} is fine-tuned on clean pictures with the pool {told!r}, so it has no other features. "
            "Leave --pool and --time out."
        )

    @torch.inference_mode()
    def features(clips: Tensor, indices: Tensor) -> Tensor:
        return model.pooled(clips)

    return features


def resample_positions(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """Learned positions (N, D) of one grid for another: bicubic in space, linear in time."""
    D = table.shape[1]
    x = table.float().reshape(*old, D).permute(0, 3, 1, 2)  # (T, D, H, W)
    if old[1:] != new[1:]:
        x = F.interpolate(x, size=new[1:], mode="bicubic", antialias=True, align_corners=False)
    if old[0] != new[0]:
        x = F.interpolate(x.permute(2, 3, 1, 0).flatten(0, 1), size=new[0], mode="linear", align_corners=False)
        x = x.reshape(*new[1:], D, new[0]).permute(3, 2, 0, 1)
    return x.permute(0, 2, 3, 1).reshape(-1, D).to(table.dtype)


POSITIONS = "encoder.positions."


def resampled(state: dict[str, Tensor], old: Grid, new: Grid) -> dict[str, Tensor]:
    """Learned positions among these tensors for another grid; one table, or one of places and one of times."""
    within = {"pos_embed": (old, new), "pos_space": ((1, *old[1:]), (1, *new[1:])),
              "pos_time": ((old[0], 1, 1), (new[0], 1, 1))}  # fmt: skip
    return {
        name: resample_positions(value, *within[name.removeprefix(POSITIONS)]) if name.startswith(POSITIONS) else value
        for name, value in state.items()
    }


def tensors_for(model: Backbone, recipe: Recipe, recognition: Recognition) -> dict[str, Tensor]:
    """The tensors that a `Recognizer` of this recipe takes from a pre-trained model: all but the head, and but the norm
    after a mean of patches, which the model never saw. Positions are resampled if the grid is another, also fixed ones
    that become learned.

    From a fine-tuned network: its norm too, if the pool is the same, and its head, if the classes or labels are."""
    state = model.state_dict()
    parts = ("encoder.", "condition.") if recipe.time_in_encoder else ("encoder.",)
    kept = {n: v for n, v in state.items() if n.startswith(parts) and not n.startswith("encoder.norm.")}
    if isinstance(model, Recognizer):
        told = model.recognition
        if told.pool == recognition.pool:
            kept |= {n: v for n, v in state.items() if n.startswith("fc_norm.")}
            if recognition.task != "regression" and (told.task, told.outputs) == (
                recognition.task,
                recognition.outputs,
            ):
                kept |= {n: v for n, v in state.items() if n.startswith("head.")}
    elif recognition.pool == "class":
        norm = "encoder.norm." if recipe.decoder is not None else "head.norm."
        kept |= {"fc_norm." + name.removeprefix(norm): v for name, v in state.items() if name.startswith(norm)}
    if recipe.network.positions == "learned":  # perhaps fixed ones, which are a table all the same
        kept[POSITIONS + "pos_embed"] = model.encoder.positions.table().detach()
    old, new = model.recipe.clip.grid, recipe.clip.grid
    return kept if old == new else resampled(kept, old, new)


@dataclass(frozen=True)
class Targets:
    """What a batch should be told as, (B, K) float: shares of classes, labels of 0 and 1, or standardised numbers."""

    values: Tensor


def blend(clips: Tensor, targets: Tensor, training: FineTuning, seed_key: int) -> tuple[Tensor, Tensor]:
    """MixUp or CutMix of each clip with the one before it in the batch, by torchvision; the same for every frame.

    Args:
        clips: (B, C, T, H, W). targets: (B, K) float.
        seed_key: from `draws.key`.
    """
    kinds = [make(alpha=alpha) for make, alpha in ((v2.MixUp, training.mixup), (v2.CutMix, training.cutmix)) if alpha]
    if not kinds or len(clips) < 2:
        return clips, targets
    B, C, T, H, W = clips.shape
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_key)
        flat, targets = v2.RandomChoice(kinds)(clips.reshape(B, C * T, H, W), targets)
    return flat.reshape(B, C, T, H, W), targets


class RecognitionObjective(nn.Module):
    """One module whose forward is the whole training step up to the loss."""

    def __init__(self, model: Recognizer) -> None:
        super().__init__()
        self.model = model

    def forward(self, clips: Tensor, targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross entropy, its mean over labels, or the squared error; clips (B, C, T, H, W)."""
        recognition = self.model.recognition
        output, wanted = self.model(clips).float(), targets.values
        smoothing = recognition.training.label_smoothing
        if recognition.task == "single":
            return F.cross_entropy(output, wanted, label_smoothing=smoothing), {}
        if recognition.task == "multi":
            return F.binary_cross_entropy_with_logits(output, wanted * (1 - smoothing) + smoothing / 2), {}
        return F.mse_loss(output, wanted), {}


def score(recognition: Recognition, outputs: Tensor, truth: Tensor) -> dict[str, float]:
    """Numbers of a test set; "score" is the one to go by.

    Args:
        outputs: what `Recognizer.predict` told, (n, K).
        truth: classes (n,) int64; or labels of 0 and 1, or numbers, (n, K).

    Returns:
        single: accuracy in the first and, of more than five classes, the first five, in percent, and the mean over classes.
        multi: mean average precision over labels that occur, and the share of labels that are right at 0.5, in percent.
        regression: R^2 and mean absolute error, means over the numbers.
    """
    from sklearn.metrics import average_precision_score, mean_absolute_error, r2_score  # slow to import

    if recognition.task == "single":
        right = outputs.argmax(1) == truth
        numbers = {"accuracy": 100 * right.float().mean().item()}
        if outputs.shape[1] > 5:
            best = outputs.topk(5, dim=1).indices
            numbers["top5"] = 100 * (best == truth[:, None]).any(1).float().mean().item()
        per_class = [right[truth == c].float().mean().item() for c in truth.unique().tolist()]
        numbers["mean_class_accuracy"] = 100 * sum(per_class) / len(per_class)
        return {"score": numbers["accuracy"], **numbers}
    if recognition.task == "multi":
        occurs = [k for k in range(truth.shape[1]) if truth[:, k].sum() > 0]
        precisions = [average_precision_score(truth[:, k].numpy(), outputs[:, k].numpy()) for k in occurs]
        average = 100 * float(sum(precisions)) / max(1, len(precisions))
        right = ((outputs > 0.5) == (truth > 0.5)).float().mean().item()
        return {"score": average, "mean_average_precision": average, "labels_right": 100 * right}
    r2 = float(r2_score(truth.numpy(), outputs.numpy()))
    return {"score": r2, "r2": r2, "mean_absolute_error": float(mean_absolute_error(truth.numpy(), outputs.numpy()))}


def score_each(recognition: Recognition, outputs: Tensor, truth: Tensor) -> dict[str, dict[str, float | None]]:
    """Numbers of each label or number by its name, arguments as of `score`; {} of single classes.

    Returns:
        multi: "share" of the samples that have it, average precision (None if none has it), and the share that is right, in
        percent. regression: R^2, mean absolute error, and the standard deviation, in the number's own unit.
    """
    from sklearn.metrics import average_precision_score, r2_score

    each: dict[str, dict[str, float | None]] = {}
    for k, name in enumerate(recognition.outputs if recognition.task != "single" else ()):
        guess, wanted = outputs[:, k].double(), truth[:, k].double()
        if recognition.task == "multi":
            average = 100 * float(average_precision_score(wanted.numpy(), guess.numpy())) if wanted.any() else None
            right = ((guess > 0.5) == (wanted > 0.5)).double().mean().item()
            each[name] = {
                "share": 100 * wanted.mean().item(), "average_precision": average, "right": 100 * right
            }  # fmt: skip
        else:
            each[name] = {
                "r2": float(r2_score(wanted.numpy(), guess.numpy())),
                "mean_absolute_error": (guess - wanted).abs().mean().item(),
                "standard_deviation": wanted.std(correction=0).item(),
            }
    return each


def always_the_same(recognition: Recognition, truth: Tensor) -> float | None:
    """What a blind guess gets, in percent: the most common class, or of each label what most samples have; None of numbers."""
    if recognition.task == "single":
        return 100 * truth.bincount().max().item() / len(truth)
    if recognition.task == "multi":
        share = truth.double().mean(0)
        return 100 * torch.maximum(share, 1 - share).mean().item()
    return None


def load_recognizer(path: str | Path, device: torch.device | str = "cpu") -> tuple[Recognizer, About]:
    """Build the network that a file of `unveil finetune` describes and fill it.

    Raises:
        ValueError: it is no such file, or tensors are missing or do not fit.
    """
    recipe, about, found = read_header(path)
    recognition = read_recognition(path)
    file = find_weights(path)
    if recognition is None:
        raise ValueError(
            f"{file} holds a pre-trained {recipe.name} without a head, so it can tell no classes. Fine-tune it first: "
            f"unveil finetune --run {path} --data LABELLED --out DIRECTORY"
        )
    with torch.random.fork_rng(devices=[]):
        model = Recognizer(recipe, recognition)
    fill(model, file, found)
    return model.to(device).eval(), about


def standard_of(recognition: Recognition) -> tuple[Tensor, Tensor]:
    """By what numbers are standardised, (K,) float64 each."""
    offset, scale = (torch.tensor(value, dtype=torch.float64) for value in (recognition.offset, recognition.scale))
    return offset, scale


def to_targets(recognition: Recognition, truth: Tensor) -> Tensor:
    """Truth as `score` wants it, to targets (n, K) float."""
    if recognition.task == "single":
        return F.one_hot(truth, len(recognition.outputs)).float()
    if recognition.task == "multi":
        return truth.float()
    offset, scale = standard_of(recognition)
    return ((truth - offset) / scale).float()


def load_any(path: str | Path, device: torch.device | str = "cpu") -> tuple[AnyModel | Recognizer, About]:
    """The model of a file of any kind, for whoever asks for features of clips: pre-trained, encoder-only or fine-tuned."""
    return load_encoder(path, device) if read_recognition(path) is None else load_recognizer(path, device)
