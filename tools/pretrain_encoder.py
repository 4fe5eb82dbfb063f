"""Distils the default encoder from a larger one, and measures what its features are worth.

A command-line tool for maintainers: it reads the training images and the teacher from folders
the caller names, and writes one safetensors file. Nothing in the product imports it. The
student starts from random weights; no teacher weight enters the file it writes.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name all of torch's users know

from exporter.vit import VisionTransformer, vit_from_state_dict

IMAGE_SIZE, PATCH, DIM, DEPTH, HEADS, HIDDEN = 64, 8, 192, 6, 3, 768
TEACHER_SIZE = 128  # at patch 16 the same 8 x 8 grid as 64 px at patch 8
MATCHED_BLOCKS = ((1, 3), (3, 7), (5, 11))  # student block, teacher block
CLS_WEIGHT, LABEL_WEIGHT = 2.0, 0.2
PEAK_RATE, WARM_UP_STEPS, WEIGHT_DECAY, EMA_DECAY = 1e-3, 200, 0.05, 0.998
GREY = torch.tensor([0.299, 0.587, 0.114])
METADATA = {
    "name": "driftkeel-default-64",
    "image_size": str(IMAGE_SIZE),
    "heads": str(HEADS),
    "mean": "0.5",
    "std": "0.5",
}


def load_jpeg_pack(path: Path) -> tuple[Tensor, Tensor]:
    """Decodes a JPEG pack into images uint8 [n, 3, 64, 64] and labels int64 [n]."""
    with np.load(path, allow_pickle=False) as pack:
        data, offset, labels = pack["jpeg"], pack["offset"], pack["y"]
    images = np.empty((len(labels), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for i in range(len(labels)):
        with Image.open(io.BytesIO(data[offset[i] : offset[i + 1]].tobytes())) as image:
            images[i] = np.asarray(image.convert("RGB"))
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels).long()


def _uniform(rng: torch.Generator, n: int, low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(n, generator=rng)


def augment(images: Tensor, rng: torch.Generator) -> Tensor:
    """Crops, turns, blurs and recolours a batch, differently for every image.

    Args:
        images: uint8 [n, 3, s, s].
        rng: Where the randomness comes from.

    Returns:
        Normalised views, float32 [n, 3, s, s] in [-1, 1].
    """
    n, size = len(images), images.shape[-1]
    side = _uniform(rng, n, 0.35, 1.0).sqrt()
    aspect = _uniform(rng, n, -0.25, 0.25).exp()
    width, height = (side * aspect).clamp(max=1.0), (side / aspect).clamp(max=1.0)
    shift_x = (1 - width) * _uniform(rng, n, -1, 1)
    shift_y = (1 - height) * _uniform(rng, n, -1, 1)
    mirror = 1 - 2 * (torch.rand(n, generator=rng) < 0.5).float()
    angle = _uniform(rng, n, -0.35, 0.35) * (torch.rand(n, generator=rng) < 0.25)
    rows = torch.stack(
        [
            torch.stack([mirror * width * angle.cos(), -height * angle.sin(), shift_x], 1),
            torch.stack([mirror * width * angle.sin(), height * angle.cos(), shift_y], 1),
        ],
        1,
    )
    grid = F.affine_grid(rows, [n, 3, size, size], align_corners=False)
    views = F.grid_sample(
        images.float() / 255, grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )
    # A third of the batch loses half its resolution: small cameras and upscaled thumbnails.
    third = n // 3
    views[:third] = F.interpolate(
        F.avg_pool2d(views[:third], 2), scale_factor=2, mode="bicubic", align_corners=False
    )
    saturation = _uniform(rng, n, 0.5, 1.4) * (torch.rand(n, generator=rng) > 0.15)
    contrast = _uniform(rng, n, 0.6, 1.4)
    contrast = torch.where(torch.rand(n, generator=rng) < 0.05, -contrast, contrast)
    cast = 1 + 0.1 * torch.randn(n, 3, generator=rng)
    brightness = 0.5 + _uniform(rng, n, -0.2, 0.2)
    mix = saturation[:, None, None] * torch.eye(3) + (1 - saturation)[:, None, None] * GREY
    colour = contrast[:, None, None] * cast[:, :, None] * mix
    centred = torch.einsum("nij,njhw->nihw", colour, views - 0.5)
    return (centred + brightness[:, None, None, None]).clamp(0, 1) * 2 - 1


def new_student(seed: int) -> VisionTransformer:
    """Returns the untrained encoder: random weights, sine-cosine positions."""
    torch.manual_seed(seed)
    vit = VisionTransformer(
        image_size=IMAGE_SIZE, patch=PATCH, dim=DIM, depth=DEPTH, heads=HEADS, hidden=HIDDEN
    )
    for module in vit.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.normal_(vit.cls_token, std=0.02)
    grid = IMAGE_SIZE // PATCH
    rate = 1 / 100 ** (torch.arange(DIM // 4) / (DIM // 4))
    wave = torch.arange(grid)[:, None] * rate
    axis = torch.cat([wave.sin(), wave.cos()], 1)
    plane = torch.cat([axis[:, None].expand(-1, grid, -1), axis[None].expand(grid, -1, -1)], dim=2)
    with torch.no_grad():
        vit.pos_embed[0, 1:] = 0.3 * plane.flatten(0, 1)
    return vit


class Teacher:
    """The larger encoder, frozen, with the statistics its class feature is compared in.

    Args:
        vit: The teacher at `TEACHER_SIZE`.
        images: Training images uint8 [n, 3, 64, 64]; the first views of some set the scale.
        rng: Picks and augments them.
    """

    def __init__(self, vit: VisionTransformer, images: Tensor, rng: torch.Generator) -> None:
        self.vit = vit.requires_grad_(False)
        chosen = torch.randperm(len(images), generator=rng)[:1536]
        features = torch.cat(
            [self.targets(augment(images[part], rng))[1] for part in torch.split(chosen, 128)]
        )
        self.mean, self.scale = features.mean(0), features.var(0).mean().sqrt()
        values, vectors = torch.linalg.eigh(torch.cov(features.T) / self.scale**2)
        # Half-way to whitening: small directions count for a linear head, noise must not.
        self.rotation = vectors * (values.clamp(min=0) + 0.1) ** -0.25

    @torch.no_grad()
    def targets(self, views: Tensor) -> tuple[list[Tensor], Tensor]:
        """Answers for normalised views, float32 [n, 3, 64, 64].

        Returns:
            The matched blocks' hidden tokens [n, tokens, dim], and the raw class feature [n, dim].
        """
        large = F.interpolate(views, size=TEACHER_SIZE, mode="bicubic", align_corners=False)
        with torch.autocast("cpu", torch.bfloat16):
            states = self.vit.hidden_states(large)
        return [states[i] for _, i in MATCHED_BLOCKS], self.vit.norm(states[-1][:, 0].float())


@dataclass(frozen=True)
class Batch:
    """One step's views float32 [n, 3, 64, 64], labels int64 [n] and the teacher's answers."""

    views: Tensor
    labels: Tensor
    states: list[Tensor]
    cls: Tensor


def distillation_loss(
    student: VisionTransformer, head: nn.Linear, teacher: Teacher, batch: Batch
) -> tuple[Tensor, dict[str, float]]:
    """Compares student and teacher on the same views.

    Args:
        student: The encoder in training.
        head: A throw-away classifier over the training labels.
        teacher: Whose statistics scale the comparison of class features.
        batch: The views and what the teacher makes of them.

    Returns:
        The scalar loss, and its parts for the progress line.
    """
    with torch.autocast("cpu", torch.bfloat16):
        states = student.hidden_states(batch.views)
    tokens = torch.zeros(())
    for (index, _), target in zip(MATCHED_BLOCKS, batch.states, strict=True):
        shape = [target.shape[-1]]
        tokens = tokens + F.smooth_l1_loss(
            F.layer_norm(states[index].float(), shape), F.layer_norm(target.float(), shape)
        )
    cls = student.norm(states[-1][:, 0].float())
    # Centred, of unit variance: a norm's gain starts at 1, and would take long to reach ours.
    target_cls = (batch.cls - teacher.mean) / teacher.scale
    feature = F.mse_loss(cls @ teacher.rotation, target_cls @ teacher.rotation)
    label = F.cross_entropy(head(cls), batch.labels, label_smoothing=0.1)
    loss = tokens + CLS_WEIGHT * feature + LABEL_WEIGHT * label
    return loss, {"tokens": tokens.item(), "cls": feature.item(), "label": label.item()}


@dataclass
class Run:
    """Everything a resumed training needs: parameters, their average, AdamW's moments, step."""

    student: VisionTransformer
    head: nn.Linear
    average: dict[str, Tensor]
    optimizer: torch.optim.AdamW
    step: int = 0

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Every trained parameter, in the optimizer's order."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def save(self, path: Path) -> None:
        """Writes a checkpoint atomically, as safetensors."""
        tensors = {f"average.{key}": value for key, value in self.average.items()}
        for i, parameter in enumerate(self.parameters):
            tensors[f"parameter.{i}"] = parameter.detach()
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{key}.{i}"] = value
        _save_atomically(tensors, path, {"step": str(self.step)})

    def load(self, path: Path) -> None:
        """Continues from a checkpoint."""
        with safe_open(path, "pt") as file:
            self.step = int(file.metadata()["step"])
        tensors = load_file(path)
        self.average = {key: tensors[f"average.{key}"] for key in self.average}
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters):
                parameter.copy_(tensors[f"parameter.{i}"])
                self.optimizer.state[parameter] = {
                    key: tensors[f"{key}.{i}"] for key in ("step", "exp_avg", "exp_avg_sq")
                }

    def update_average(self) -> None:
        """Moves the averaged encoder towards the current one, faster at the beginning."""
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        current = self.student.state_dict()
        with torch.no_grad():
            for key, value in self.average.items():
                value.lerp_(current[key], 1 - decay)


def new_run(seed: int, classes: int) -> Run:
    """Returns a run at step 0; matrices decay, biases, norms and positions do not."""
    student = new_student(seed)
    head = nn.Linear(DIM, classes)
    trained = [*student.parameters(), *head.parameters()]
    decayed = [p for p in trained if p.ndim in (2, 4)]
    others = [p for p in trained if p.ndim not in (2, 4)]
    groups = [
        {"params": decayed, "weight_decay": WEIGHT_DECAY},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98))
    average = {key: value.clone() for key, value in student.state_dict().items()}
    return Run(student, head, average, optimizer)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a half cosine to zero."""
    if step < WARM_UP_STEPS:
        return PEAK_RATE * (step + 1) / WARM_UP_STEPS
    done = (step - WARM_UP_STEPS) / max(steps - WARM_UP_STEPS, 1)
    return PEAK_RATE * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def _save_atomically(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def write_encoder(average: dict[str, Tensor], path: Path) -> None:
    """Writes the encoder in float16, atomically, with what preprocessing needs to know."""
    _save_atomically({key: value.half() for key, value in average.items()}, path, METADATA)


def train(options: argparse.Namespace) -> None:
    """Runs the distillation, from the checkpoint when there is one."""
    images, labels = load_jpeg_pack(options.data / "tiny-imagenet-pretrain-jpeg.npz")
    teacher_state = load_file(options.encoders / "vit_tiny_patch16_224.safetensors")
    vit = vit_from_state_dict(teacher_state, image_size=TEACHER_SIZE)
    teacher = Teacher(vit, images, torch.Generator().manual_seed(options.seed))
    run = new_run(options.seed, int(labels.max()) + 1)
    checkpoint = options.checkpoint or options.out.with_suffix(".checkpoint")
    if checkpoint.exists():
        run.load(checkpoint)
        print(f"resumed at step {run.step}", flush=True)
    per_epoch = len(images) // options.batch
    steps = options.epochs * per_epoch

    def prepare(step: int) -> Batch:
        """Depends on the seed and the step alone: a resumed run sees the same batches."""
        epoch, part = divmod(step % steps, per_epoch)
        shuffle = torch.Generator().manual_seed(options.seed * 1_000 + epoch)
        order = torch.randperm(len(images), generator=shuffle)
        chosen = order[part * options.batch : (part + 1) * options.batch]
        rng = torch.Generator().manual_seed(options.seed * 1_000_000 + step)
        views = augment(images[chosen], rng)
        return Batch(views, labels[chosen], *teacher.targets(views))

    # The teacher works one batch ahead on a thread of its own, which costs about what the
    # student's step costs; two single threads lose less to a busy machine than shared loops.
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as ahead:
        _loop(run, teacher, prepare, ahead, steps=steps, checkpoint=checkpoint, options=options)
    run.save(checkpoint)
    write_encoder(run.average, options.out)


def _loop(
    run: Run,
    teacher: Teacher,
    prepare: Callable[[int], Batch],
    ahead: ThreadPoolExecutor,
    *,
    steps: int,
    checkpoint: Path,
    options: argparse.Namespace,
) -> None:
    started, first = time.monotonic(), run.step
    coming = ahead.submit(prepare, run.step)
    while run.step < steps:
        batch, coming = coming.result(), ahead.submit(prepare, run.step + 1)
        loss, parts = distillation_loss(run.student, run.head, teacher, batch)
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(run.step, steps)
        run.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(run.parameters, 1.0)
        run.optimizer.step()
        run.step += 1
        run.update_average()
        minutes = (time.monotonic() - started) / 60
        if run.step % 50 == 0:
            rate = (run.step - first) * options.batch / (minutes * 60)
            shown = " ".join(f"{key} {value:.4f}" for key, value in parts.items())
            print(f"step {run.step}/{steps} {minutes:.1f} min {rate:.0f} img/s {shown}", flush=True)
        if run.step % 250 == 0:
            run.save(checkpoint)
            write_encoder(run.average, options.out)
        if minutes >= options.minutes:
            print(f"stopped by --minutes at step {run.step}; run again to resume", flush=True)
            break


@torch.no_grad()
def features_of(vit: VisionTransformer, images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Computes features of uint8 [n, h, w, 3] images, resized bicubic to the encoder's size."""
    parts = []
    for start in range(0, len(images), 128):
        pixels = torch.from_numpy(images[start : start + 128]).permute(0, 3, 1, 2).float() / 255
        size = vit.image_size
        pixels = F.interpolate(pixels, size=(size, size), mode="bicubic", align_corners=False)
        parts.append(vit(pixels.clamp(0, 1) * 2 - 1).double().numpy())
    return np.concatenate(parts)


def shared_covariance_accuracy(
    train: tuple[NDArray[np.float64], NDArray[np.int64]],
    test: tuple[NDArray[np.float64], NDArray[np.int64]],
    shrinkage: float = 0.1,
) -> float:
    """Fits a Gaussian head with one covariance for all classes and scores it.

    Args:
        train: Features [n, d] and labels [n], 0 to C - 1.
        test: The same, unseen.
        shrinkage: Weight of the scaled identity in the covariance.

    Returns:
        The share of the test labels predicted, 0 to 1.
    """
    features, labels = train
    means = np.stack([features[labels == c].mean(0) for c in range(int(labels.max()) + 1)])
    spread = np.cov((features - means[labels]).T, bias=True)
    dim = spread.shape[0]
    spread = (1 - shrinkage) * spread + shrinkage * np.trace(spread) / dim * np.eye(dim)
    weight = np.linalg.solve(spread, means.T)
    scores = test[0] @ weight - 0.5 * np.einsum("cd,dc->c", means, weight)
    return float(np.mean(scores.argmax(1) == test[1]))


def evaluate(vit: VisionTransformer, data: Path) -> dict[str, float]:
    """Returns the accuracy of a shared-covariance head on frozen features, by data set."""
    with np.load(data / "cifar100-small.npz", allow_pickle=False) as pack:
        cifar = [
            (features_of(vit, pack[f"x_{part}"]), pack[f"y_{part}"].astype(np.int64))
            for part in ("train", "test")
        ]
    pixels, labels = load_digits(return_X_y=True)
    grey = np.round(pixels.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    digits = features_of(vit, np.repeat(grey, 3, axis=3))
    half = np.random.default_rng(0).permutation(len(labels)) < len(labels) // 2
    return {
        "cifar100-small": shared_covariance_accuracy(cifar[0], cifar[1]),
        "digits": shared_covariance_accuracy(
            (digits[half], labels[half]), (digits[~half], labels[~half])
        ),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    home = os.environ.get("DRIFTKEEL_DATA")
    data = Path(home) / "data" if home else None
    encoders = Path(home) / "encoders" if home else None
    for name, folder, content in (
        ("--data", data, "the image sets; default $DRIFTKEEL_DATA/data"),
        ("--encoders", encoders, "the teacher; default $DRIFTKEEL_DATA/encoders"),
    ):
        parser.add_argument(name, type=Path, default=folder, required=folder is None, help=content)
    parser.add_argument("--out", type=Path, required=True, help="the encoder's safetensors file")
    parser.add_argument("--checkpoint", type=Path, help="default: --out with .checkpoint")
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop early, to resume")
    parser.add_argument("--threads", type=int, default=1, help="the student's; the teacher has one")
    parser.add_argument("--evaluate", action="store_true", help="measure --out, train nothing")
    parser.add_argument(
        "--teacher", action="store_true", help="with --evaluate: measure the teacher at 96 px"
    )
    return parser


def main() -> None:
    """Trains or measures, as the command line says."""
    options = _parser().parse_args()
    torch.set_num_threads(options.threads)
    if not options.evaluate:
        train(options)
        return
    if options.teacher:
        state = load_file(options.encoders / "vit_tiny_patch16_224.safetensors")
        vit = vit_from_state_dict(state, image_size=96)
    else:
        vit = vit_from_state_dict(load_file(options.out), image_size=IMAGE_SIZE)
    for name, accuracy in evaluate(vit, options.data).items():
        print(f"{name} {100 * accuracy:.2f} %")


if __name__ == "__main__":
    main()
