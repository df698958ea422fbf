"""The blocks of KerasHub's backbones, as a person would name them."""

import pytest

from keras_tl import Stage, layerwise_learning_rates
from keras_tl.backbone.blocks import split_into_blocks

hub = pytest.importorskip("keras_hub").models
pytestmark = pytest.mark.clients

IMAGE = (32, 32, 3)
EFFICIENT = {
    "stackwise_kernel_sizes": [3, 3],
    "stackwise_num_repeats": [1, 2],
    "stackwise_input_filters": [32, 16],
    "stackwise_output_filters": [16, 24],
    "stackwise_expansion_ratios": [1, 4],
    "stackwise_strides": [1, 2],
    "stackwise_block_types": ["v1", "v1"],
    "stackwise_squeeze_and_excite_ratios": [0.25, 0.25],
    "width_coefficient": 1.0,
    "depth_coefficient": 1.0,
}
MOBILE = {
    "stackwise_expansion": [[40, 56], [64, 144]],
    "stackwise_num_blocks": [2, 2],
    "stackwise_num_filters": [[16, 16], [24, 24]],
    "stackwise_kernel_size": [[3, 3], [5, 5]],
    "stackwise_num_strides": [[2, 1], [2, 1]],
    "stackwise_se_ratio": [[None, None], [0.25, 0.25]],
    "stackwise_activation": [["relu", "relu"], ["hard_swish", "hard_swish"]],
    "stackwise_padding": [[1, 1], [2, 2]],
    "output_num_filters": 32,
    "input_activation": "hard_swish",
    "output_activation": "hard_swish",
    "input_num_filters": 16,
    "depthwise_filters": 8,
    "depthwise_stride": 2,
    "depthwise_residual": False,
    "squeeze_and_excite": 0.5,
    "last_layer_filter": 32,
}
HG = {
    "depths": [2, 2],
    "embedding_size": 8,
    "hidden_sizes": [16, 16],
    "stem_channels": [3, 8, 8],
    "hidden_act": "relu",
    "use_learnable_affine_block": False,
    "stackwise_stage_filters": [[8, 8, 16, 2, 2, 3], [16, 8, 16, 2, 2, 3]],
    "apply_downsample": [False, True],
    "use_lightweight_conv_block": [False, False],
}
WORDS = {"max_sequence_length": 12}


def resnet(kind, pre):
    settings = {"block_type": kind, "use_pre_activation": pre, "image_shape": IMAGE}
    return hub.ResNetBackbone([64], [7], [64, 64], [2, 1], [1, 2], **settings)


def mit():
    return hub.MiTBackbone(
        layerwise_depths=[1, 2],
        num_layers=2,
        layerwise_num_heads=[1, 2],
        layerwise_sr_ratios=[2, 1],
        max_drop_path_rate=0.1,
        layerwise_patch_sizes=[7, 3],
        layerwise_strides=[4, 2],
        hidden_dims=[8, 16],
        image_shape=IMAGE,
    )


def cspnet():
    settings = {"block_type": "dark_block", "stage_type": "dark", "image_shape": IMAGE}
    return hub.CSPNetBackbone(8, 3, 1, [1, 2], [1, 2], [16, 16], **settings)


def numbered(name, count, start=0):
    return [f"{name}{index}" for index in range(start, start + count)]


TRANSFORMER = numbered("transformer_layer_", 3)
# What makes a backbone, how many blocks come before the named ones, and these.
TABLE = {
    "ResNet": (
        lambda: resnet("basic_block", False),
        1,
        ["stack0_block0", "stack0_block1", "stack1_block0"],
    ),
    "ResNetV2": (
        lambda: resnet("bottleneck_block", True),
        1,
        ["stack0_block0", "stack0_block1", "stack1_block0"],
    ),
    "DenseNet": (
        lambda: hub.DenseNetBackbone([2, 2], growth_rate=8, image_shape=IMAGE),
        1,
        ["stack1_block1", "stack1_block2", "stack2_block1", "stack2_block2"],
    ),
    "EfficientNet": (
        lambda: hub.EfficientNetBackbone(**EFFICIENT, image_shape=IMAGE),
        1,
        ["block1a", "block2a", "block2b"],
    ),
    "MobileNet": (
        lambda: hub.MobileNetBackbone(**MOBILE, image_shape=IMAGE),
        1,
        ["block_0_0", "block_1_0", "block_1_1", "block_2_0", "block_2_1", "block_3"],
    ),
    "Xception": (
        lambda: hub.XceptionBackbone([[8, 8], [16, 16]], [True, False], image_shape=(64, 64, 3)),
        0,
        ["block1", "block2"],
    ),
    "VGG": (
        lambda: hub.VGGBackbone([2, 2], [8, 8], image_shape=IMAGE),
        0,
        ["block1", "block2"],
    ),
    "CSPNet": (
        cspnet,
        1,
        ["stage_0", "stage_0_block_0", "stage_1", "stage_1_block_0", "stage_1_block_1"],
    ),
    "HGNetV2": (
        lambda: hub.HGNetV2Backbone(**HG, image_shape=IMAGE),
        1,
        [
            "encoder/encoder_stage_0/encoder_stage_0_block_0",
            "encoder/encoder_stage_0/encoder_stage_0_block_1",
            "encoder/encoder_stage_1/encoder_stage_1",  # Its downsampling.
            "encoder/encoder_stage_1/encoder_stage_1_block_0",
            "encoder/encoder_stage_1/encoder_stage_1_block_1",
        ],
    ),
    "MiT": (
        mit,
        1,
        [
            "hierarchical_encoder_0_0",
            "patch_and_embed_1",
            "hierarchical_encoder_1_0",
            "hierarchical_encoder_1_1",
        ],
    ),
    "ViT": (
        lambda: hub.ViTBackbone(IMAGE, 8, 4, 2, 16, 32),
        1,
        numbered("vit_encoder/transformer_block_", 4, start=1),
    ),
    "DeiT": (
        lambda: hub.DeiTBackbone(IMAGE, 8, 4, 2, 16, 32),
        1,
        numbered("deit_encoder/transformer_block_", 4, start=1),
    ),
    "DINOV2": (
        lambda: hub.DINOV2Backbone(8, 3, 16, 2, 32, image_shape=IMAGE),
        1,
        numbered("encoder/layers_", 3),
    ),
    "Swin": (
        lambda: hub.SwinTransformerBackbone(IMAGE, 8, [2, 2], [1, 2], 4),
        1,
        # In between, the downsampling that ends a stage.
        [*numbered("stage_0/blocks_", 2), "stage_0", *numbered("stage_1/blocks_", 2)],
    ),
    "Bert": (lambda: hub.BertBackbone(30, 3, 2, 8, 16, **WORDS), 1, TRANSFORMER),
    "Albert": (
        lambda: hub.AlbertBackbone(30, 4, 2, 8, 8, 16, num_groups=2, **WORDS),
        1,
        ["group_0_inner_layer_0", "group_1_inner_layer_0"],
    ),
    "Roberta": (lambda: hub.RobertaBackbone(30, 3, 2, 8, 16, **WORDS), 1, TRANSFORMER),
    "DistilBert": (lambda: hub.DistilBertBackbone(30, 3, 2, 8, 16, **WORDS), 1, TRANSFORMER),
    "DebertaV3": (
        lambda: hub.DebertaV3Backbone(30, 3, 2, 8, 16, bucket_size=4, **WORDS),
        1,
        numbered("disentangled_attention_encoder_layer_", 3),
    ),
    "Electra": (lambda: hub.ElectraBackbone(30, 3, 2, 8, 8, 16, **WORDS), 1, TRANSFORMER),
    "XLNet": (lambda: hub.XLNetBackbone(30, 3, 2, 8, 16), 1, numbered("xlnet_encoder_", 3)),
    "FNet": (lambda: hub.FNetBackbone(30, 3, 8, 16, **WORDS), 1, numbered("f_net_layer_", 3)),
    "GPT2": (lambda: hub.GPT2Backbone(30, 3, 2, 8, 16, **WORDS), 1, TRANSFORMER),
    "OPT": (lambda: hub.OPTBackbone(30, 3, 2, 8, 16, **WORDS), 1, TRANSFORMER),
    "Gemma": (
        lambda: hub.GemmaBackbone(30, 3, 2, 1, 8, 16, 4),
        1,
        numbered("decoder_block_", 3),
    ),
    "Llama": (lambda: hub.LlamaBackbone(30, 3, 2, 8, 16, 1), 1, TRANSFORMER),
    "T5": (
        lambda: hub.T5Backbone(30, 2, 2, 8, 16),
        1,
        [
            *numbered("transformer_encoder_layer_", 2),
            *numbered("transformer_decoder_layer_", 2),
        ],
    ),
}
QUICK = ("MobileNet", "ViT", "Albert", "XLNet")


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TABLE],
)
def test_blocks_are_those_that_a_person_would_name(name):
    make, before, expected = TABLE[name]
    backbone = make()

    blocks = split_into_blocks(backbone)

    assert list(blocks)[before:] == expected
    rates = list(layerwise_learning_rates(backbone, 1.0, decay=0.5).values())
    assert sorted(set(rates)) == [0.5**depth for depth in range(len(blocks))][::-1]
    assert len(Stage.by_depth(backbone, len(blocks), 1e-4)) == len(blocks)
