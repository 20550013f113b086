"""``manyheads evaluate``: accuracy, throughput, size, operations and memory of a vision model."""

from __future__ import annotations

from typing import Annotated

import typer

from manyheads.cli.output import (
    Device,
    Dtype,
    Json,
    human_bytes,
    human_count,
    print_json,
    print_table,
    resolve_device,
    resolve_dtype,
)
from manyheads.cli.train import Attention, AttentionTypes, ModelOption, model_options


def evaluate(
    model: Annotated[str, typer.Argument(help="A registered vision model: davit_tiny, biformer_small, ...")],
    data: Annotated[str, typer.Option(help="digits, textiles, a directory, or a Hugging Face dataset.")] = "digits",
    checkpoint: Annotated[
        str | None, typer.Option(help="The authors' file, a hub id, or the output of manyheads train.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a step.")] = 64,
    image_size: Annotated[int | None, typer.Option(min=1, help="Side in pixels.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Look at the first so many images only.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that load images.")] = 0,
    attention_types: AttentionTypes = None,
    attention: Attention = None,
    option: ModelOption = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    json: Json = False,
) -> None:
    """Measure a vision model on the test part of labelled images."""
    from manyheads.models.evaluation import evaluate_vision

    resolve_dtype(dtype)
    found = evaluate_vision(
        model, data, checkpoint=checkpoint, batch_size=batch_size, device=str(resolve_device(device)), dtype=dtype,
        image_size=image_size, limit=limit, workers=workers, progress=not json,
        model_options=model_options(option, attention_types, attention),
    )  # fmt: skip
    if json:
        print_json(found.to_dict())
        return
    rows = [
        ["top-1", f"{100 * found.top1:.2f} %"],
        ["top-5", f"{100 * found.top5:.2f} %"],
        ["images", str(found.images)],
        ["image size", f"{found.image_size} px"],
        ["images per second", f"{found.images_per_second:.1f}"],
        ["parameters", human_count(found.parameters)],
        ["operations per image", human_count(found.flops)],
        ["peak memory", human_bytes(found.peak_memory_bytes)],
    ]
    weights = checkpoint or "random weights"
    print_table(f"{model} ({weights}) on {data}", ["", "measured"], rows, right=("measured",))
