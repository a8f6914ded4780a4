"""Which networks need no check when they are built: those of the sweep, as they were swept."""

from spark_fast.encoder.verified_networks import is_verified, sweep_results


def test_only_the_very_network_that_was_swept_counts_as_verified():
    assert is_verified("resnet50") == bool(sweep_results()["verified"])
    assert not is_verified("resnet50", stages=2)
    assert not is_verified("resnet50", in_chans=4)
    assert not is_verified("resnet50", {"norm_layer": "groupnorm"})
    assert is_verified("resnet50", {"drop_path_rate": 0.1}) == bool(sweep_results()["verified"])
    assert not is_verified("vit_tiny_patch16_224")
    assert sweep_results("0.0.0") == {"verified": {}, "refused": {}}
