"""``manyheads train``: a vision or diffusion model by its published recipe, or a language model on long sequences."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from manyheads.cli.output import Device, Dtype, Json, print_json, print_table

ModelOption = Annotated[
    list[str] | None,
    typer.Option("--option", help="An option of the model, NAME=VALUE; commas make a list: --option depths=1,1."),
]
AttentionTypes = Annotated[
    str | None, typer.Option(help="DaViT: which attentions take turns: spatial,channel or one of them.")
]
Attention = Annotated[
    str | None, typer.Option(help="BiFormer: bra (bi-level routing), or window or axial to compare with.")
]


def train(
    model: Annotated[
        str,
        typer.Argument(help="A vision model (davit_tiny, ...), or a language model: smollm2, a directory, a hub id."),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            help="digits, textiles, a directory, a Hugging Face dataset; language: documentation, a text file."
        ),
    ] = None,
    output: Annotated[str, typer.Option(help="Directory for checkpoints and weights; default: runs/MODEL.")] = "",
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over the data; default: the recipe's; language: 1.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images a step and process, even (64); language: sequences (1).")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Peak learning rate; default: the recipe's, scaled; language: 1e-4.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights, order and augmentation.")] = 0,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in the output directory.")] = True,
    save_steps: Annotated[int | None, typer.Option(min=1, help="Steps between checkpoints; default: an epoch.")] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Side in pixels.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that load images.")] = 0,
    checkpoint: Annotated[str | None, typer.Option(help="Weights to start from: a file or hub id.")] = None,
    context_parallel: Annotated[
        int, typer.Option(min=1, help="Language: processes (of torchrun) that share a sequence.")
    ] = 1,
    method: Annotated[str, typer.Option(help="Language: how they share it: ring, token_ring or lasp2h.")] = "ring",
    length: Annotated[int, typer.Option(min=2, help="Language: tokens of a sequence.")] = 512,
    steps: Annotated[int | None, typer.Option(min=1, help="Language: optimiser steps; default: by epochs.")] = None,
    timeout: Annotated[float, typer.Option(help="Language: seconds to wait for a silent process.")] = 300.0,
    encoder: Annotated[
        str | None,
        typer.Option(help="Diffusion: a diffusers AutoencoderKL (directory or hub id), or none for pixels."),
    ] = None,
    diversification: Annotated[
        float | None, typer.Option(help="Weight of the attention diversification loss; default: the recipe's.")
    ] = None,
    attention_types: AttentionTypes = None,
    attention: Attention = None,
    option: ModelOption = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    json: Json = False,
) -> None:
    """Train a model; run it again to go on where it was stopped, or under torchrun on several processes.

    A language model's sequences can be longer than one device: torchrun --nproc-per-node 2 -m manyheads train smollm2
    --context-parallel 2 --length 4096.
    """
    if _is_language(model):
        _refuse(
            "language", image_size=image_size, checkpoint=checkpoint, attention_types=attention_types,
            attention=attention, option=option, diversification=diversification, encoder=encoder,
        )  # fmt: skip
        from manyheads.parallel.training import train_language

        trained = train_language(
            model, data or "documentation", output=output or f"runs/{model.strip('/').replace('/', '_')}",
            ranks=context_parallel, method=method, length=length, epochs=epochs or 1, steps=steps,
            batch_size=batch_size or 1, lr=lr, seed=seed, resume=resume, device=device, dtype=dtype,
            save_steps=save_steps, timeout=timeout, progress=not json,
        )  # fmt: skip
        if trained.is_main_process and json:
            print_json(trained.to_dict())
        elif trained.is_main_process:
            per_step = [[str(step), f"{value:.3f}"] for step, value in trained.losses]
            title = f"{model}, {length} tokens over {context_parallel} process(es)"
            print_table(title, ["step", "loss"], per_step[-10:], right=("step", "loss"))
            typer.echo(f"{trained.steps} steps, test loss {trained.test_loss:.4f}; model: {trained.output}")
        return
    _refuse("vision", steps=steps, context_parallel=None if context_parallel == 1 else context_parallel)
    if model.removeprefix("manyheads_").startswith("moh_dit_"):
        _refuse("diffusion", diversification=diversification, attention_types=attention_types, attention=attention)
        _train_diffusion(
            model, data or "digits", json, output=output or f"runs/{model}", epochs=epochs,
            batch_size=batch_size or 256, lr=lr, seed=seed, resume=resume, device=device, dtype=dtype,
            image_size=image_size, encoder=encoder, save_steps=save_steps, workers=workers, checkpoint=checkpoint,
            model_options=model_options(option, None, None), progress=not json,
        )  # fmt: skip
        return
    _refuse("vision", encoder=encoder)
    if model.removeprefix("manyheads_").startswith("sparsifiner_"):
        from manyheads.adapt.sparsifiner import train_sparsifiner as train_vision
    else:
        from manyheads.models.training import train_vision

    data = data or "digits"
    result = train_vision(
        model, data, output=output or f"runs/{model}", epochs=epochs, batch_size=batch_size or 64, lr=lr, seed=seed,
        resume=resume, device=device, dtype=dtype, image_size=image_size, save_steps=save_steps, workers=workers,
        checkpoint=checkpoint, diversification=diversification,
        model_options=model_options(option, attention_types, attention), progress=not json,
    )  # fmt: skip
    if not result.is_main_process:
        return
    if json:
        print_json(result.to_dict())
        return
    per_epoch = [[str(epoch), f"{100 * value:.1f}"] for epoch, value in enumerate(result.accuracy, 1)]
    print_table(f"{model} on {data}", ["epoch", "top-1 %"], per_epoch[-10:], right=("epoch", "top-1 %"))
    typer.echo(
        f"{result.steps} steps, last loss {result.losses[-1][1]:.4f}; weights: {result.output}/model.safetensors"
    )


def _train_diffusion(model: str, data: str, json: bool, **options: Any) -> None:
    from manyheads.models.diffusion_training import train_diffusion

    result = train_diffusion(model, data, **options)
    if not result.is_main_process:
        return
    if json:
        print_json(result.to_dict())
        return
    per_epoch = [[str(epoch), f"{value:.4f}"] for epoch, value in enumerate(result.test_losses, 1)]
    print_table(f"{model} on {data}", ["epoch", "test loss"], per_epoch[-10:], right=("epoch", "test loss"))
    typer.echo(
        f"{result.steps} steps, last loss {result.losses[-1][1]:.4f}; averaged weights: "
        f"{result.output}/model.safetensors"
    )


def _is_language(model: str) -> bool:
    import os

    return model == "smollm2" or "/" in model or os.path.isdir(model)


def _refuse(kind: str, **options: object) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"{names} cannot be used with a {kind} model")


def model_options(option: list[str] | None, attention_types: str | None, attention: str | None) -> dict:
    """The model's options from the command line, values read as Python literals where they are such.

    >>> model_options(["depths=1,1", "stem=patch"], "spatial", None)
    {'depths': (1, 1), 'stem': 'patch', 'attention_types': ('spatial',)}
    """
    options = {}
    for text in option or []:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ValueError(f"--option {text!r} must be NAME=VALUE")
        options[name.replace("-", "_")] = _literal(value)
    if attention_types is not None:
        options["attention_types"] = tuple(part.strip() for part in attention_types.split(","))
    if attention is not None:
        options["attention"] = attention
    return options


def _literal(text: str) -> object:
    import ast

    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return tuple(part.strip() for part in text.split(",")) if "," in text else text
