"""Models by name: timm's registry, suggestions for misspelled names and options."""

from __future__ import annotations

import pytest
import timm
import torch

from manyheads.models import create_model, list_models

SMALL = {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (2, 4), "window_size": 4}


def test_names_work_with_and_without_the_prefix_and_in_timm() -> None:
    for create, name in ((create_model, "davit_tiny"), (create_model, "manyheads_davit_tiny")):
        assert create(name, num_classes=5, **SMALL).num_classes == 5
    assert timm.create_model("manyheads_davit_tiny", num_classes=5, **SMALL).num_classes == 5


def test_list_models_matches_patterns() -> None:
    assert list_models("davit_t*") == list_models("manyheads_davit_t*") == ["manyheads_davit_tiny"]
    assert {"manyheads_davit_tiny", "manyheads_davit_huge_fl"} <= set(list_models("davit*")) <= set(list_models())
    assert list_models("no such model") == []


def test_the_nearest_name_is_suggested() -> None:
    with pytest.raises(ValueError, match=r"unknown model 'davit_tyni'; did you mean 'davit_tiny'\?"):
        create_model("davit_tyni")


def test_the_nearest_option_is_suggested() -> None:
    with pytest.raises(TypeError, match=r"'davit_tiny' has no option 'num_class'; did you mean 'num_classes'\?"):
        create_model("davit_tiny", num_class=10)


def test_features_only_gives_timms_feature_lists() -> None:
    net = create_model("davit_tiny", features_only=True, out_indices=(1,), **SMALL)
    assert net.feature_info.channels() == [32]
    assert net.feature_info.reduction() == [8]
    assert [tuple(x.shape) for x in net(torch.randn(1, 3, 32, 40))] == [(1, 32, 4, 5)]


def test_data_configuration_is_the_published_one() -> None:
    config = timm.data.resolve_model_data_config(create_model("davit_tiny", **SMALL))
    assert config["input_size"] == (3, 224, 224)
    assert config["interpolation"] == "bicubic"
