"""Modules that torch runs in a plan, as calls of functions that a file may name."""

from __future__ import annotations

from typing import Any

from torch import nn

from tkn.layers import AttentiveRegularization2d

#: Modules as functions of the same arguments: the function's name, and the attributes that are its arguments.
_MODULES: dict[type[nn.Module], tuple[str, str]] = {
    nn.AdaptiveAvgPool1d: ("functional.adaptive_avg_pool1d", "output_size"),
    nn.AdaptiveAvgPool2d: ("functional.adaptive_avg_pool2d", "output_size"),
    nn.AdaptiveMaxPool1d: ("functional.adaptive_max_pool1d", "output_size return_indices"),
    nn.AdaptiveMaxPool2d: ("functional.adaptive_max_pool2d", "output_size return_indices"),
    nn.AvgPool1d: ("functional.avg_pool1d", "kernel_size stride padding ceil_mode count_include_pad"),
    nn.AvgPool2d: (
        "functional.avg_pool2d",
        "kernel_size stride padding ceil_mode count_include_pad divisor_override",
    ),
    nn.CELU: ("functional.celu", "alpha inplace"),
    nn.ChannelShuffle: ("functional.channel_shuffle", "groups"),
    nn.ConvTranspose2d: ("functional.conv_transpose2d", "weight bias stride padding output_padding groups dilation"),
    nn.ELU: ("functional.elu", "alpha inplace"),
    nn.Flatten: ("torch.flatten", "start_dim end_dim"),
    nn.GELU: ("functional.gelu", "approximate"),
    nn.GLU: ("functional.glu", "dim"),
    nn.GroupNorm: ("functional.group_norm", "num_groups weight bias eps"),
    nn.Hardsigmoid: ("functional.hardsigmoid", "inplace"),
    nn.Hardswish: ("functional.hardswish", "inplace"),
    nn.Hardtanh: ("functional.hardtanh", "min_val max_val inplace"),
    nn.LayerNorm: ("functional.layer_norm", "normalized_shape weight bias eps"),
    nn.LeakyReLU: ("functional.leaky_relu", "negative_slope inplace"),
    nn.Linear: ("functional.linear", "weight bias"),
    nn.LogSigmoid: ("functional.logsigmoid", ""),
    nn.LogSoftmax: ("functional.log_softmax", "dim"),
    nn.MaxPool1d: ("functional.max_pool1d", "kernel_size stride padding dilation ceil_mode return_indices"),
    nn.MaxPool2d: ("functional.max_pool2d", "kernel_size stride padding dilation ceil_mode return_indices"),
    nn.Mish: ("functional.mish", "inplace"),
    nn.PReLU: ("functional.prelu", "weight"),
    nn.PixelShuffle: ("functional.pixel_shuffle", "upscale_factor"),
    nn.ReLU: ("functional.relu", "inplace"),
    nn.ReLU6: ("functional.relu6", "inplace"),
    nn.SELU: ("functional.selu", "inplace"),
    nn.SiLU: ("functional.silu", "inplace"),
    nn.Sigmoid: ("torch.sigmoid", ""),
    nn.Softmax: ("functional.softmax", "dim"),
    nn.Softplus: ("functional.softplus", "beta threshold"),
    nn.Softsign: ("functional.softsign", ""),
    nn.Tanh: ("torch.tanh", ""),
    nn.Upsample: ("functional.interpolate", "size scale_factor mode align_corners recompute_scale_factor"),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d), ("", "weight bias stride padding dilation groups")),
    **dict.fromkeys((nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d), ("tkn.identity", "")),
    **dict.fromkeys(
        (nn.ReflectionPad1d, nn.ReplicationPad1d, nn.ZeroPad1d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.ZeroPad2d),
        ("functional.pad", ""),
    ),
    **dict.fromkeys(
        (nn.BatchNorm1d, nn.BatchNorm2d), ("functional.batch_norm", "running_mean running_var weight bias eps")
    ),
    nn.InstanceNorm2d: ("functional.instance_norm", "running_mean running_var weight bias eps"),
    AttentiveRegularization2d: ("tkn.attend", "loc scale rho attention scale_unit clip"),
}
_PAD_MODES: dict[type[nn.Module], str] = {
    **dict.fromkeys((nn.ReflectionPad1d, nn.ReflectionPad2d), "reflect"),
    **dict.fromkeys((nn.ReplicationPad1d, nn.ReplicationPad2d), "replicate"),
    **dict.fromkeys((nn.ZeroPad1d, nn.ZeroPad2d), "constant"),
}


def as_function(module: nn.Module) -> tuple[str, dict[str, Any]] | None:
    """A module in evaluation mode as a function's name and its arguments after the first; None if it is no other."""
    kind = type(module)
    if kind not in _MODULES:
        return None
    name, attributes = _MODULES[kind]
    arguments = {attribute: getattr(module, attribute) for attribute in attributes.split()}
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        if module.padding_mode != "zeros":
            return None
        name = "functional.conv1d" if isinstance(module, nn.Conv1d) else "functional.conv2d"
    if kind in _PAD_MODES:
        arguments = {"pad": module.padding, "mode": _PAD_MODES[kind]}
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        arguments["training"] = module.running_mean is None
    if isinstance(module, nn.InstanceNorm2d):
        arguments["use_input_stats"] = module.running_mean is None
    return name, arguments
