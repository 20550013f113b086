"""``manyheads evaluate``: accuracy, throughput, size, operations and memory of a vision model."""

from __future__ import annotations

from typing import Annotated, Any

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
    corruptions: Annotated[
        str, typer.Option(help="Also measure under corruptions: all (the fifteen of ImageNet-C) or a list: snow,fog.")
    ] = "",
    severities: Annotated[str, typer.Option(help="Strengths of the corruptions, 1 to 5.")] = "1,2,3,4,5",
    attention_types: AttentionTypes = None,
    attention: Attention = None,
    option: ModelOption = None,
    exits: Annotated[bool, typer.Option("--exits", help="Models with early exits: each exit, and 33 budgets.")] = False,
    budget: Annotated[
        float | None, typer.Option(help="Models with early exits: mean operations an image may take, e.g. 2e8.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    json: Json = False,
) -> None:
    """Measure a vision model on the test part of labelled images."""
    if exits or budget is not None:
        if corruptions:
            raise ValueError("--corruptions cannot be used with --exits or --budget")
        resolve_dtype(dtype)
        _early_exits(
            model, data, budget, json, checkpoint=checkpoint, batch_size=batch_size,
            device=str(resolve_device(device)), dtype=dtype, image_size=image_size, limit=limit, workers=workers,
            progress=not json, model_options=model_options(option, attention_types, attention),
        )  # fmt: skip
        return
    from manyheads.data.corruptions import parse_corruptions
    from manyheads.models.evaluation import evaluate_vision

    resolve_dtype(dtype)
    names = parse_corruptions(corruptions) if corruptions else ()
    found = evaluate_vision(
        model, data, checkpoint=checkpoint, batch_size=batch_size, device=str(resolve_device(device)), dtype=dtype,
        image_size=image_size, limit=limit, workers=workers, progress=not json, corruptions=names,
        severities=_strengths(severities),
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
    if found.corruptions:
        rows += [[f"top-1 error, {name}", f"{100 * error:.2f} %"] for name, error in found.corruptions.items()]
        rows.append(["mean corruption error", _mean_error(found.corruptions, data, names, severities)])
    weights = checkpoint or "random weights"
    print_table(f"{model} ({weights}) on {data}", ["", "measured"], rows, right=("measured",))


def _strengths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--severities {text!r} must be numbers from 1 to 5: 1,3,5") from None


def _mean_error(errors: dict[str, float], data: str, names: tuple[str, ...], severities: str) -> str:
    """Relative to AlexNet's where that is defined: all fifteen corruptions at all strengths, on ImageNet."""
    from manyheads.data.corruptions import CORRUPTIONS, SEVERITIES, mean_corruption_error

    plain = 100 * sum(errors.values()) / len(errors)
    if data == "imagenet" and set(names) == set(CORRUPTIONS) and set(_strengths(severities)) == set(SEVERITIES):
        return f"{100 * mean_corruption_error(errors):.2f} % of AlexNet's (plain mean {plain:.2f} %)"
    return f"{plain:.2f} % (plain mean)"


def _early_exits(model: str, data: str, budget: float | None, json: bool, **options: Any) -> None:
    from manyheads.models.exit_evaluation import evaluate_exits

    found = evaluate_exits(model, data, budget=budget, **options)
    if json:
        print_json(found.to_dict())
        return
    weights = options["checkpoint"] or "random weights"
    rows = [
        [str(index), f"{100 * point.top1:.2f}", human_count(point.flops)] for index, point in enumerate(found.exits, 1)
    ]
    print_table(
        f"{model} ({weights}) on {data}: {found.images} images of {found.image_size} px, each exit for all",
        ["exit", "top-1 %", "operations per image"], rows, right=("exit", "top-1 %", "operations per image"),
    )  # fmt: skip
    points = found.curve if found.chosen is None else (found.chosen,)
    columns = ["operations per image", "top-1 %", *(f"at {index} %" for index in range(1, len(found.exits) + 1))]
    rows = [
        [human_count(point.flops), f"{100 * point.top1:.2f}", *(f"{100 * share:.0f}" for share in point.shares)]
        for point in points
    ]
    title = f"an image leaves when an exit is sure (thresholds from {found.calibration_images} training images)"
    print_table(title, columns, rows, right=tuple(columns))
    if found.chosen is not None:
        thresholds = ", ".join(f"{threshold:.4g}" for threshold in found.chosen.thresholds[:-1])
        typer.echo(
            f"thresholds {thresholds}; {found.images_per_second:.1f} images per second, "
            f"{found.static_images_per_second:.1f} when none leaves early"
        )
