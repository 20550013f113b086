"""``manyheads inspect``: what do the heads of my language model do, which parts does my DependencyViT see?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from manyheads.cli.output import Device, Dtype, Json, print_json, print_table, resolve_device, resolve_dtype


def inspect(
    model: Annotated[
        str, typer.Argument(help="smollm2, a directory, a Hugging Face hub id; or a vision model: dependency_vit_tiny.")
    ] = "smollm2",
    lengths: Annotated[str, typer.Option(help="Context lengths in tokens.")] = "400,800",
    depths: Annotated[str, typer.Option(help="Depths of the needle in percent.")] = "10,50,90",
    mask: Annotated[str, typer.Option(help="Also answer with so many of the best heads masked, e.g. 5,10.")] = "",
    top: Annotated[int, typer.Option(min=1, help="Heads (or parts) to list.")] = 10,
    batch: Annotated[int, typer.Option(min=1, help="Tests that run together.")] = 1,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the results; a run that was interrupted continues from it.")
    ] = None,
    image: Annotated[str, typer.Option(help="Vision: an image file, or a photo: china, flower.")] = "china",
    image_size: Annotated[int, typer.Option(min=1, help="Vision: side in pixels.")] = 224,
    checkpoint: Annotated[str | None, typer.Option(help="Vision: weights, a file or hub id; none are random.")] = None,
    option: Annotated[list[str] | None, typer.Option("--option", help="Vision: an option, NAME=VALUE.")] = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    json: Json = False,
) -> None:
    """Score every attention head of MODEL by how much it copies from a long context (retrieval heads).

    The folder given by --output gets retrieval_heads.json (everything), scores.json (the format of the paper's authors)
    and heads.html (the map of all heads).

    For a DependencyViT: the dependency tree of an image instead, tree.json and tree.html (drawn on the image).
    """
    if model.removeprefix("manyheads_").startswith("dependency_vit"):
        from manyheads.cli.train import model_options

        options = model_options(option, None, None)
        _tree(model, image, image_size, checkpoint, options, resolve_device(device), top, output, json)
        return
    asked, deep = _numbers("--lengths", lengths), _numbers("--depths", depths)
    counts = _numbers("--mask", mask) if mask else []
    place, kind = resolve_device(device), resolve_dtype(dtype)
    from manyheads.data.language_models import load_language_model
    from manyheads.data.needles import NEEDLES, needle_prompt
    from manyheads.interpret.masking_recall import masking_recall
    from manyheads.interpret.retrieval_heads import retrieval_heads

    loaded, tokenizer = load_language_model(model, device=place, dtype=kind)
    resume = None if output is None else output / "tests"
    found = retrieval_heads(loaded, tokenizer, lengths=asked, depths=deep, batch_size=batch, resume=resume)
    prompts = [
        needle_prompt(tokenizer, needle, length=length, depth=depth)
        for length in asked
        for needle in NEEDLES
        for depth in deep
    ]
    masked = {
        count: masking_recall(loaded, tokenizer, found, prompts, count, batch_size=batch)
        if count
        else (found.recall, [])
        for count in counts
    }
    if output is not None:
        found.save(output / "retrieval_heads.json")
        found.write_scores(output / "scores.json")
        found.plot().write_html(output / "heads.html")
    if json:
        best = [{"layer": i, "head": j, "score": float(found.mean[i, j])} for i, j in found.top(top)]
        recalls = {count: {"best": best_, "others": others} for count, (best_, others) in masked.items()}
        print_json(found.summary() | {"top": best} | ({"masked_recall": recalls} if counts else {}))
        return
    from rich.console import Console

    Console().print(found.table(top))
    if counts:
        rows = [
            [str(count), f"{best_:.0f} %", " ".join(f"{other:.0f} %" for other in others) or "-"]
            for count, (best_, others) in masked.items()
        ]
        print_table("Recall with heads masked", ["heads", "the best", "others, three draws"], rows)


def _tree(model, image, size, checkpoint, options, device, top, output, json) -> None:
    from manyheads.interpret.dependency_trees import dependency_trees
    from manyheads.models import create_model
    from manyheads.models.recipes import recipe_for
    from manyheads.models.transforms import test_transform

    picture = _picture(image)
    network = create_model(model, checkpoint=checkpoint, **{**options, "num_classes": 0}).eval()
    prepare = test_transform(network, size, recipe_for(model))
    pixels = prepare(picture.convert("L" if getattr(network, "in_chans", 3) == 1 else "RGB"))
    tree = dependency_trees(network.to(device), pixels[None].to(device)).trees[0]  # pyright: ignore[reportArgumentType]
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        tree.save(output / "tree.json")
        # Behind the tree stands what the model saw: the resized and cropped image, brought back to [0, 1].
        low, high = pixels.amin((1, 2), keepdim=True), pixels.amax((1, 2), keepdim=True)
        tree.plot((pixels - low) / (high - low).clamp(min=1e-6), top).write_html(output / "tree.html")
    if json:
        print_json({"model": model, "image": image, "trained": checkpoint is not None, **vars(tree)})
        return
    from rich.console import Console

    Console().print(tree.table(top))
    if checkpoint is None:
        typer.echo("The weights are random: give trained ones with --checkpoint.")


def _picture(image: str):
    from PIL import Image, UnidentifiedImageError

    from manyheads.data.images import photos

    found = photos()
    if image in found:
        return Image.fromarray(found[image].permute(1, 2, 0).numpy())
    try:
        return Image.open(image).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"--image {image!r} is no image file ({error}) and none of {', '.join(found)}") from None


def _numbers(option: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} {text!r} must be whole numbers with commas between, such as 10,50,90") from None
    if min(numbers) < 0:
        raise ValueError(f"{option} {text!r} must not be negative")
    return numbers
