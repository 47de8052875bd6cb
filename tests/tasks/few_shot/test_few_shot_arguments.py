"""Settings of few-shot learning that cannot work are refused before anything is loaded."""

import pytest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"domains": []}, r"expected at least 3 entries .* got 0"),
        ({"domains": ["a"]}, r"entries such as birds=birds\.parquet, got 'a'"),
        ({"domains": ["a=", "b=c"]}, r"entries such as birds=birds\.parquet, got 'a='"),
        ({"domains": ["a=x", "a=y", "b=z"]}, "names 'a' twice: 'x' and 'y'"),
        ({"domains": ["a=x", "b=y", "c=z"]}, "held_out_domain should be one of a, b, c, got 'infrared'"),
        ({"held_out_domain": None}, "held_out_domain should be one of red, .* got None"),
        ({"domains": ["red=x", "green=y", "infrared=nowhere.parquet"]}, "no file .*nowhere.parquet"),
        ({"domains": ["red=x", "green=y", f"infrared={__file__}"]}, r"expected a file that ends in one of \.parquet"),
        ({"domains": ["red=x", "green=y", "infrared=./nowhere"]}, "domains, infrared: there is no folder .*nowhere"),
        ({"n_way": 1}, "n_way must be at least 2, got 1"),
        ({"k_shot": 0}, "k_shot must be at least 1, got 0"),
        ({"max_images_per_class": 0}, "max_images_per_class must be at least 1, got 0"),
        ({"auxiliary_weight": -1.0}, "auxiliary_weight must not be negative"),
        ({"auxiliary_weight": float("nan")}, "auxiliary_weight must not be negative"),
        ({"backbone": "resnet18"}, "backbone should be one of resnet10, resnet34, got 'resnet18'"),
        ({"stem": "large"}, "stem should be one of imagenet, small, small_pooled, got 'large'"),
    ],
)
def test_a_wrong_setting_is_refused(arguments, changes, message):
    with pytest.raises(ValueError, match=message):
        arguments(**changes)


def test_domains_keep_their_order_and_the_held_out_one_is_not_trained_on(arguments):
    assert arguments().training_domains == ["red", "green", "yellow"]
    assert arguments(held_out_domain="green").training_domains == ["red", "yellow", "infrared"]
    assert arguments().dataset_name == "red, green, yellow"


def test_a_hub_name_is_left_for_later(arguments):
    assert arguments(domains=["a=timm/x", "b=timm/y", "infrared=timm/z"]).places["b"] == "timm/y"
