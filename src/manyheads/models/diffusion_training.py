"""Training a diffusion transformer: transformers' Trainer with the recipe of DiT, which MoH-DiT follows.

    AdamW at one rate (1e-4, no decay), 256 images a step, mirror images, averaged weights (0.9999)
    loss = diffusion_loss + 0.01 times the load-balancing loss;   x_0 = 0.18215 times the latents of an encoder

Where images are as small as the embedded ones, there is nothing to encode: the model learns on pixels in [-1, 1].
A run can be killed at any moment and goes on from its last complete checkpoint, averaged weights included.

Source: "Scalable Diffusion Models with Transformers", arXiv 2212.09748; "MoH: Multi-Head Attention as Mixture-of-Head
Attention", arXiv 2410.11842, section 4.3.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision import transforms
from transformers import set_seed

from manyheads.layers.mixture_of_heads import collect_routing
from manyheads.models.checkpoints import save_checkpoint
from manyheads.models.image_data import ImageData, load_images
from manyheads.models.image_trainer import ImageTrainer, TellEpoch, image_arguments
from manyheads.models.registry import create_model
from manyheads.models.runs import (
    HISTORY,
    WEIGHTS,
    KeepSettings,
    checkpoint_to_resume,
    logged,
    logged_losses,
    on_cpu,
    plain,
    write_record,
)
from manyheads.models.weight_averaging import AVERAGED, AveragedWeights
from manyheads.objectives.diffusion import diffusion_loss

ENCODER = "stabilityai/sd-vae-ft-ema"
LATENT_SCALE, LATENT_STRIDE = 0.18215, 8
LAST = "last.safetensors"


@dataclass(frozen=True)
class DiffusionRecipe:
    """The numbers of a training.

    Attributes:
        lr: learning rate, the same for every step and batch.
        epochs: passes over the images (7 million steps of 256 ImageNet images are 1,400).
        hflip: probability of a mirror image.
        ema: decay of the averaged weights; 0 averages none.
        head_balance: weight of the load-balancing loss.
    """

    lr: float = 1e-4
    epochs: int = 1400
    hflip: float = 0.5
    ema: float = 0.9999
    head_balance: float = 0.01


# A few hundred steps on digits: averages over fewer steps, and a mirrored digit is no digit.
SMALL_IMAGES = DiffusionRecipe(lr=5e-4, epochs=20, hflip=0.0, ema=0.99)


@dataclass
class DiffusionTraining:
    """What a training left behind.

    Attributes:
        model: registered name.
        output: directory with ``model.safetensors`` (the averaged weights), ``last.safetensors`` (those of the last
            step), ``training.json`` and the checkpoints.
        losses: (step, training loss) in the order of the steps, over resumptions.
        test_losses: after each epoch, the loss of the averaged weights on the test part, with steps and noise that
            stay the same.
        steps: optimiser steps made.
        resumed_from: the checkpoint that this call went on from, or None.
        settings: everything needed to repeat the run.
        is_main_process: False on the other processes under ``torchrun``, which write and print nothing.
    """

    model: str
    output: str
    losses: list[tuple[int, float]]
    test_losses: list[float]
    steps: int
    resumed_from: str | None
    settings: dict[str, Any] = field(default_factory=dict)
    is_main_process: bool = True

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable copy."""
        return dataclasses.asdict(self)


def train_diffusion(
    model: str,
    data: str | ImageData,
    *,
    output: str | Path,
    epochs: int | None = None,
    batch_size: int = 256,
    lr: float | None = None,
    seed: int = 0,
    resume: bool = True,
    device: str = "auto",
    dtype: str = "float32",
    image_size: int | None = None,
    encoder: str | None = None,
    recipe: DiffusionRecipe | None = None,
    save_steps: int | None = None,
    workers: int = 0,
    checkpoint: str | Path | None = None,
    model_options: dict[str, Any] | None = None,
    progress: bool = True,
) -> DiffusionTraining:
    """Train a registered class-conditional diffusion transformer.

    Args:
        model: registered name ("moh_dit_s_2_90").
        data: as in ``manyheads.models.image_data.load_images``.
        output: directory for checkpoints, weights and the record of the run.
        epochs: passes over the training images; None takes the recipe's.
        batch_size: images a step and process.
        lr: learning rate; None takes the recipe's.
        seed: of weights, order, mirror images, noise and steps.
        resume: go on from the last complete checkpoint in ``output``, if there is one. False starts anew and refuses
            a directory that holds checkpoints.
        device, dtype, save_steps, workers, progress: as in ``manyheads.models.training.train_vision``.
        image_size: side in pixels; None takes what suits the embedded images, else 256.
        encoder: directory or hub id of a diffusers ``AutoencoderKL``, "none" for pixels; None takes the paper's, and
            "none" for embedded images.
        recipe: None takes the published one, softened for the embedded images.
        checkpoint: weights to start from.
        model_options: of ``create_model``.

    Raises:
        ImportError: an encoder without diffusers (``pip install manyheads[diffusion]``).
        ValueError: unknown names, more images a step than there are, no training part, a side that the encoder or the
            patches do not divide, an output directory that holds another run.

    Source: arXiv 2410.11842, section 4.3; arXiv 2212.09748.
    """
    output = Path(output)
    images = load_images(data, image_size=image_size) if isinstance(data, str) else data
    train, small = images.train, images.image_size is not None
    if train is None:
        raise ValueError(f"data {data!r} has no training part")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if batch_size < 1 or batch_size * world > len(train):
        raise ValueError(f"batch_size={batch_size} must be positive, and {world} of them at most {len(train)} images")
    recipe = recipe or (SMALL_IMAGES if small else DiffusionRecipe())
    recipe = recipe if lr is None else dataclasses.replace(recipe, lr=lr)
    epochs = recipe.epochs if epochs is None else epochs
    if epochs < 1:
        raise ValueError(f"epochs={epochs} must be at least 1")
    encoder = ("none" if small else ENCODER) if encoder is None else encoder
    size = image_size or images.image_size or 256
    use_cpu = on_cpu(device)

    set_seed(seed)
    if encoder == "none":
        latents = {"img_size": size, "in_chans": 3}
    else:
        if size % LATENT_STRIDE:
            raise ValueError(f"image_size={size} must be a multiple of {LATENT_STRIDE}, by which the encoder shrinks")
        latents = {"img_size": size // LATENT_STRIDE, "in_chans": 4}
    options = {"num_classes": images.classes, **latents, **(model_options or {})}
    network = create_model(model, checkpoint=checkpoint, **options)
    train.seed = seed
    train.transform, images.test.transform = _transform(size, recipe.hflip), _transform(size, 0.0)

    settings = {
        "model": model, "data": data if isinstance(data, str) else "given", "epochs": epochs, "batch_size": batch_size,
        "processes": world, "seed": seed, "dtype": dtype, "image_size": size, "encoder": encoder,
        "recipe": dataclasses.asdict(recipe), "options": plain(options),
    }  # fmt: skip
    last = checkpoint_to_resume(output, settings, resume=resume, also=AVERAGED if recipe.ema else None)

    steps = epochs * (len(train) // (batch_size * world))
    arguments = image_arguments(
        output, epochs=epochs, batch_size=batch_size, lr=recipe.lr, lr_scheduler_type="constant", weight_decay=0.0,
        max_grad_norm=0.0, dtype=dtype, use_cpu=use_cpu, processes=world, seed=seed, steps=steps, save_steps=save_steps,
        workers=workers, progress=progress, prediction_loss_only=True,
    )  # fmt: skip
    averaged = AveragedWeights(network, recipe.ema, last)
    trainer = ImageTrainer(
        None,
        averaged,
        model=_Denoiser(network, None if encoder == "none" else _load_encoder(encoder), recipe.head_balance),
        args=arguments,
        train_dataset=train,
        eval_dataset=images.test,
        callbacks=[KeepSettings(settings), TellEpoch(train, network), averaged],
    )
    trainer.train(resume_from_checkpoint=None if last is None else str(last))

    history = trainer.state.log_history
    result = DiffusionTraining(
        model=model,
        output=str(output),
        losses=logged_losses(history),
        test_losses=logged(history, "eval_loss"),
        steps=int(trainer.state.global_step),
        resumed_from=None if last is None else str(last),
        settings=settings,
        is_main_process=trainer.is_world_process_zero(),
    )
    if trainer.is_world_process_zero():
        save_checkpoint(network, output / LAST)
        with averaged.instead():
            save_checkpoint(network, output / WEIGHTS)
        write_record(output / HISTORY, result.to_dict())
    return result


class _Denoiser(nn.Module):
    """Encodes images, and has the network find the noise in them; judging draws the same noise every time."""

    def __init__(self, network: nn.Module, encoder: nn.Module | None, head_balance: float) -> None:
        super().__init__()
        self.network, self.head_balance = network, head_balance
        self.__dict__["encoder"] = encoder  # no child: it neither learns nor belongs into checkpoints

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = pixel_values
        if self.encoder is not None:
            with torch.no_grad():
                encoder: Any = self.encoder.to(x.device)
                x = LATENT_SCALE * encoder.encode(x).latent_dist.sample()
        t = noise = None
        if not self.training:
            generator = torch.Generator().manual_seed(0)
            t = torch.randint(1000, x.shape[:1], generator=generator).to(x.device)
            noise = torch.randn(x.shape, generator=generator).to(x)
        with collect_routing(self.network) as routing:
            loss = diffusion_loss(self.network, x, labels, t=t, noise=noise)
        if self.training and routing:
            loss = loss + self.head_balance * routing.balance_loss()
        return {"loss": loss}


def _load_encoder(name: str) -> nn.Module:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return cast(nn.Module, AutoencoderKL.from_pretrained(name)).eval().requires_grad_(False)


def _transform(size: int, hflip: float) -> transforms.Compose:
    return transforms.Compose(
        [
            transforms.Resize(size, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.RandomHorizontalFlip(hflip),
            transforms.ToTensor(),
            transforms.Normalize((0.5,) * 3, (0.5,) * 3),
        ]
    )
