"""Dynamic Perceiver: sizes, the authors' layout, exits, features, export."""

from __future__ import annotations

import re

import pytest
import torch
import torchvision

from manyheads.models import create_model, load_checkpoint
from manyheads.models.checkpoints import CheckpointError
from manyheads.models.exit_evaluation import exit_flops
from manyheads.models.recipes import recipe_for
from manyheads.models.vision.dyn_perceiver import VARIANTS, DynPerceiver, checkpoint_filter_fn

PARAMETERS = {
    "regnet_y_400mf": 11_606_544,
    "regnet_y_800mf": 21_798_360,
    "regnet_y_1_6gf": 27_161_246,
    "regnet_y_3_2gf": 62_743_346,
    "mobilenet_v3_0x5": 4_698_264,
    "mobilenet_v3_0x75": 9_299_040,
    "mobilenet_v3_1x0": 15_162_448,
    "mobilenet_v3_1x25": 22_730_000,
    "mobilenet_v3_1x5": 31_559_632,
    "resnet50_0x375": 20_283_336,
    "resnet50_0x5": 34_187_376,
    "resnet50_0x625": 51_665_432,
    "resnet50_0x75": 72_717_504,
    "resnet50_1x0": 125_543_696,
}
# Multiply-adds at the four exits for 224 pixels, in billions, as the authors counted them.
OPERATIONS = {
    "mobilenet_v3_0x5": (0.048, 0.086, 0.097, 0.124),
    "regnet_y_800mf": (0.459, 1.065, 1.228, 1.298),
}
SMALL = {"num_latents": 8, "mlp_ratio": 1, "depth_factor": (1, 1, 1, 1), "num_classes": 5}
SHALLOW = {"depth_factor": (1, 0, 0, 0)}
FAMILIES = ("mobilenet_v3_0x5", "regnet_y_400mf", "resnet50_0x375")


def _small(name: str = "mobilenet_v3_0x5", **options) -> DynPerceiver:
    return create_model(f"dyn_perceiver_{name}", **{**SMALL, **options}).eval()


def _shaken(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand_like(tensor) if "var" in name else 0.03 * torch.randn_like(tensor))
    return model


def _official(key: str, regnet: bool) -> str:
    """The authors' name of one of our tensors."""
    key = re.sub(r"^stages\.(\d)\.(read|write)\.", lambda m: f"cross_att{int(m[1]) + 1}_{_WAYS[m[2]]}.", key)
    key = re.sub(r"^stages\.(\d)\.latent\.(\d+)\.", lambda m: f"self_att{int(m[1]) + 1}.{m[2]}.", key)
    key = re.sub(r"^stages\.(\d)\.conv\.", lambda m: f"dwc{int(m[1]) + 1}_x2z.", key)
    key = re.sub(r"^stages\.(\d)\.shrink\.", lambda m: f"token_mixer.{int(m[1]) - 1}.", key)
    key = re.sub(r"^stages\.(\d)\.widen\.", lambda m: f"token_expander.{int(m[1]) - 1}.", key)
    if regnet:
        key = re.sub(r"^stages\.(\d)\.cnn\.", lambda m: f"cnn_body.block{int(m[1]) + 1}.block{int(m[1]) + 1}-", key)
    key = re.sub(r"^stages\.(\d)\.cnn\.", lambda m: f"cnn_body_stage{int(m[1]) + 1}.", key)
    key = key.replace("last_write.", "last_cross_att_z2x.").replace("exits.early.", "early_classifier3.")
    key = key.replace("exits.latent.", "classifier_att.").replace("exits.transfer", "isc")
    key = key.replace("exits.", "classifier_").replace("key_table", "relative_position_bias")
    kind = "cross_attn" if "cross_att" in key else "self_attn"
    if "_att" in key:
        key = re.sub(r"\.(q_norm|kv_norm|norm|attention)\.", rf".{kind}.\1.", key)
    return re.sub(r"^stem\.", "cnn_stem.", key)


_WAYS = {"read": "x2z", "write": "z2x"}


def _in_their_layout(model: torch.nn.Module, regnet: bool) -> dict:
    return {"model": {_official(key, regnet): value for key, value in model.state_dict().items()}}


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_sizes(name: str) -> None:
    with torch.device("meta"):
        model = create_model(f"dyn_perceiver_{name}")
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_every_variant_is_known_and_has_a_recipe() -> None:
    assert {f"dyn_perceiver_{name}" for name in PARAMETERS} == set(VARIANTS)
    assert recipe_for("dyn_perceiver_mobilenet_v3_0x75").epochs == 600
    assert recipe_for("dyn_perceiver_regnet_y_800mf").drop_path == 0
    assert recipe_for("dyn_perceiver_resnet50_0x375").lr == 6e-4


@pytest.mark.parametrize("name", ["mobilenet_v3_0x5", pytest.param("regnet_y_800mf", marks=pytest.mark.slow)])
def test_published_operations(name: str) -> None:
    with torch.device("meta"):
        found = exit_flops(create_model(f"dyn_perceiver_{name}").eval(), torch.zeros(1, 3, 224, 224))
    assert [count / 2e9 for count in found] == pytest.approx(OPERATIONS[name], rel=0.01)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_authors_layout_loads(name: str, tmp_path) -> None:
    source = _shaken(_small(name))
    file = tmp_path / "their.pth"
    torch.save(_in_their_layout(source, name.startswith("regnet")), file)
    model = create_model(f"dyn_perceiver_{name}", checkpoint=file, **SMALL).eval()
    x = torch.randn(1, 3, 40, 64)
    for ours, expected in zip(model.forward_exits(x), source.forward_exits(x), strict=True):
        torch.testing.assert_close(ours, expected)


def test_a_thousand_classes_at_exit_3_load() -> None:
    source = _small("regnet_y_400mf", cnn_classes=1000)
    state = _in_their_layout(source, True)
    model = _small("regnet_y_400mf", cnn_classes=1000)
    load_checkpoint(model, state, checkpoint_filter_fn)
    assert [y.shape[1] for y in model.forward_exits(torch.randn(1, 3, 32, 32))] == [5, 5, 1000, 5]
    with pytest.raises(CheckpointError, match=r"exits\.cnn\.weight is \(1000, 440\)"):
        load_checkpoint(_small("regnet_y_400mf"), state, checkpoint_filter_fn)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_convolutional_branch_is_torchvisions(name: str) -> None:
    """Without what the latents write, the last map is that of the plain network."""
    alone = {"write": False, "last_write": False}
    x = torch.randn(1, 3, 32, 64, dtype=torch.double)
    if name.startswith("regnet"):
        theirs = _shaken(torchvision.models.regnet_y_400mf()).double().eval()
        names, model = (("stem.", "cnn_stem."), ("trunk_output.", "cnn_body.")), _small(name, **alone)
        expected = theirs.trunk_output(theirs.stem(x))
    elif name.startswith("resnet"):
        theirs = _shaken(torchvision.models.resnet50()).double().eval()
        names, model = (("conv1.", "cnn_stem.0."), ("bn1.", "cnn_stem.1.")), _small("resnet50_1x0", **alone)
        names += tuple((f"layer{s}.", f"cnn_body_stage{s}.") for s in range(1, 5))
        expected = torch.nn.Sequential(*list(theirs.children())[:-2])(x)
    else:
        theirs = _shaken(torchvision.models.mobilenet_v3_large(width_mult=0.5)).double().eval()
        starts = (0, 3, 5, 8, 14)
        names = tuple(
            (f"features.{i}.", f"cnn_body_stage{s}.{i - starts[s]}." if s else f"cnn_stem.{i}.")
            for i in reversed(range(17))
            for s in [sum(i >= start for start in starts) - 1]
        )
        model, expected = _small(name, **alone), theirs.features(x)
    state = {}
    for key, value in theirs.state_dict().items():
        match = next(((a, b) for a, b in names if key.startswith(a)), None)
        if match:
            state[match[1] + key.removeprefix(match[0])] = value
    converted = checkpoint_filter_fn(state, model)
    assert len(converted) == sum(key.startswith("stem.") or ".cnn." in key for key in model.state_dict()) - sum(
        key.startswith("exits.cnn") for key in model.state_dict()
    )
    load_checkpoint(model, model.state_dict() | converted)
    with torch.no_grad():
        torch.testing.assert_close(model.double().forward_intermediates(x)[0], expected)


def test_steps_exits_features_and_forward_agree() -> None:
    model = _shaken(_small())
    x = torch.randn(3, 3, 64, 48)
    exits = model.forward_exits(x)
    torch.testing.assert_close(model(x), exits[-1])
    torch.testing.assert_close(model.forward_exits(x, 2), exits[:2])
    torch.testing.assert_close(model.forward_head(model.forward_features(x)), exits[-1])
    last, maps = model.forward_intermediates(x)
    torch.testing.assert_close(model.forward_features(x)[0], last)
    assert [tuple(m.shape[1:]) for m in maps] == [(24, 8, 6), (40, 4, 3), (80, 2, 2), (480, 2, 2)]
    flow: tuple = (None, x, None, None)
    for index in range(4):
        flow = model.step(index, *flow[1:])
        torch.testing.assert_close(flow[0], exits[index])
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (3, model.head_hidden_size)


def test_training_returns_all_exits_and_teaches_the_early_ones() -> None:
    model = _small().train()
    outputs = model(torch.randn(4, 3, 32, 32))
    assert len(outputs) == 4
    model.training_loss(outputs, torch.tensor([0, 1, 2, 3]), label_smoothing=0.1).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    "options",
    [{"read": False}, {"write": False}, {"read_conv": False}, {"last_write": False}, {"transfer": False}],
)
def test_parts_can_be_left_away(options: dict) -> None:
    whole, model = _small(), _small(**options)
    assert set(model.state_dict()) < set(whole.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert [tuple(y.shape) for y in model.forward_exits(x)] == [(2, 5)] * 4
    outputs = model.train()(x)
    torch.stack([y.sum() for y in outputs]).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_first_stage_always_reads() -> None:
    stages = _small(read=False, write=False).stages
    assert [stage.read is not None for stage in stages] == [True, False, False, False]
    assert [stage.conv is not None for stage in stages] == [True, False, False, False]


def test_depth_factors_and_latents() -> None:
    model = _small(depth_factor=(1, 2, 1, 3), num_latents=16)
    assert [len(stage.latent) for stage in model.stages] == [3, 6, 9, 9]
    assert [stage.shrink[1].out_features for stage in model.stages[1:]] == [8, 4, 2]
    assert model.latent.abs().max() <= 2


def test_features_only_and_pruning(tmp_path) -> None:
    model = _shaken(_small())
    torch.save(_in_their_layout(model, False), tmp_path / "dyn.pth")
    net = create_model(
        "dyn_perceiver_mobilenet_v3_0x5", checkpoint=tmp_path / "dyn.pth", features_only=True, out_indices=(0, 2),
        **SMALL,
    ).eval()  # fmt: skip
    x = torch.randn(2, 3, 80, 64)
    expected = model.forward_intermediates(x, [0, 2], intermediates_only=True)
    for ours, theirs in zip(net(x), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert net.feature_info.channels() == [24, 80]
    assert net.feature_info.reduction() == [8, 32]
    assert not any("stages.3" in name for name, _ in net.named_parameters())


def test_a_backbone_leaves_the_exits_of_a_file_aside() -> None:
    source, backbone = _shaken(_small()), _small(num_classes=0)
    load_checkpoint(backbone, source.state_dict(), checkpoint_filter_fn)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(backbone.forward_features(x)[0], source.forward_features(x)[0])
    assert backbone(x).shape == (1, 480 + 80)
    assert backbone.train()(torch.randn(2, 3, 32, 32)).shape == (2, backbone.head_hidden_size)
    with pytest.raises(ValueError, match="num_classes=0 has no exits"):
        backbone.forward_exits(x)


def test_classifier_can_be_replaced_and_other_channels_read() -> None:
    for name in FAMILIES:
        model = _small(name, in_chans=1)
        model.reset_classifier(2)
        assert model(torch.randn(1, 1, 32, 32)).shape == (1, 2)
        assert model.get_classifier().out_features == 2
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), torch.nn.Identity)


def test_recomputing_activations_gives_the_same_gradients() -> None:
    model = _shaken(_small(drop_rate=0.0, **SHALLOW)).double().train()
    x = torch.randn(3, 3, 64, 64, dtype=torch.double)
    plain = torch.autograd.grad(torch.stack(model(x)).square().sum(), list(model.parameters()))
    model.set_grad_checkpointing()
    again = torch.autograd.grad(torch.stack(model(x)).square().sum(), list(model.parameters()))
    torch.testing.assert_close(plain, again)


def test_drop_path_belongs_to_the_resnet() -> None:
    model = _small("resnet50_0x375", drop_path_rate=0.3)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.cnn]
    assert rates == pytest.approx([0.02 * i for i in range(16)])


class UpTo(torch.nn.Module):
    """A model that ends at an exit."""

    def __init__(self, model: DynPerceiver, last: int) -> None:
        super().__init__()
        self.model, self.last = model, last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.forward_exits(x, self.last)[-1]


@pytest.mark.parametrize("last", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_export_survives_a_free_batch_for_every_exit(compiling: None, last: int) -> None:
    part = UpTo(_shaken(_small(**SHALLOW)), last)
    x, more = torch.randn(2, 3, 64, 96), torch.randn(5, 3, 64, 96)
    free = ({0: torch.export.Dim("batch", min=1, max=64)},)
    with torch.no_grad():
        program = torch.export.export(part, (x,), dynamic_shapes=free)
        torch.testing.assert_close(program.module()(more), part(more), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiles_whole(compiling: None) -> None:
    model = _shaken(_small(**SHALLOW))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


def test_bfloat16_stays_close() -> None:
    model = _small()
    x = torch.randn(1, 3, 64, 64)
    expected = model(x)
    torch.testing.assert_close(model.bfloat16()(x.bfloat16()).float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth_factor": (1, 1, 1)}, "a value for each stage"),
        ({"num_heads": (1, 2, 4)}, "a value for each stage"),
        ({"num_heads": (1, 2, 3, 8)}, "heads=3 must divide"),
        ({"num_latents": 12}, "multiple of 8"),
        ({"cnn": "vgg"}, "'vgg' is not one of"),
        ({"width": 0}, "width=0 must be positive"),
        ({"cnn": "regnet_y_400mf"}, "1 for RegNet"),
        ({"drop_path_rate": 0.1}, "only the branch resnet50"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _small(**options)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 4, 64, 64), r"image must be \(batch, 3, height, width\)"),
        ((3, 64, 64), r"image must be \(batch, 3, height, width\)"),
        ((1, 3, 31, 64), "31 x 64 pixels; its last stage needs sides of at least 32"),
    ],
)
def test_bad_images(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _small()(torch.randn(shape))


def test_bad_steps() -> None:
    model = _small()
    x = torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match=r"needs the latents that step\(0\) returned"):
        model.step(1, x)
    with pytest.raises(ValueError, match="exits are 0 to 3"):
        model.step(4, x, x)
    with pytest.raises(ValueError, match="last=5"):
        model.forward_exits(x, 5)
    model.prune_intermediate_layers([1])
    with pytest.raises(ValueError, match="pruned to 2 stages"):
        model.forward_intermediates(x, [3])
