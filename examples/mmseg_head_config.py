"""The model of mmseg_head.py, as an mmsegmentation configuration."""

default_scope = "mmseg"
norm_cfg = {"type": "BN"}
model = {
    "type": "EncoderDecoder",
    "data_preprocessor": {
        "type": "SegDataPreProcessor", "mean": [127.5] * 3, "std": [60.0] * 3,
        "size": (64, 64), "pad_val": 0, "seg_pad_val": 255,
    },
    "backbone": {
        "type": "ResNetV1c", "depth": 18, "base_channels": 8, "norm_cfg": norm_cfg,
        "num_stages": 2, "strides": (1, 2), "dilations": (1, 1), "out_indices": (0, 1),
    },
    "decode_head": {
        "type": "FCNHead", "in_channels": 16, "in_index": 1, "channels": 8, "num_convs": 1,
        "num_classes": 2, "norm_cfg": norm_cfg, "ignore_index": 255,
        "loss_decode": {
            "type": "gpl_fast.integrations.mmseg.SegmentationLoss",
            "num_classes": 2, "gpl_weight": 0.1,
        },
    },
    "train_cfg": {},
    "test_cfg": {"mode": "whole"},
}  # fmt: skip
