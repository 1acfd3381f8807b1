"""Networks that were made for large colour images, on other ones."""

from __future__ import annotations

from torch import nn

STEMS = ("small",)


def first_convolution(model: nn.Module) -> tuple[str, nn.Conv2d]:
    """(name, module) of the first convolution by definition; ValueError if there is none."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            return name, module
    raise ValueError(f"{type(model).__name__} has no convolution of images")


def take_channels_(model: nn.Module, channels: int) -> None:
    """Give the first convolution so many input channels, with fresh weights if it had others; in place."""
    _, conv = first_convolution(model)
    if conv.in_channels == channels:
        return
    if conv.groups != 1:
        raise ValueError(f"{type(model).__name__} takes images of {conv.in_channels} channels, not of {channels}")
    conv.in_channels = channels
    conv.weight = nn.Parameter(conv.weight.new_empty(conv.out_channels, channels, *conv.kernel_size))
    conv.reset_parameters()


def keep_size_(model: nn.Module) -> None:
    """Let the first convolution keep the images' size, and leave out the pooling before the second one; in place.

    Its kernels stay as they are, and so do pretrained weights. ValueError if neither is there to change.
    """
    try:
        first_name, conv = first_convolution(model)
    except ValueError as error:
        raise ValueError(f"model.stem=small: {error}") from error
    changed = conv.stride != (1, 1)
    conv.stride = (1, 1)
    modules = list(model.named_modules())
    position = next(i for i, (name, _) in enumerate(modules) if name == first_name)
    for name, module in modules[position + 1 :]:
        if isinstance(module, nn.Conv2d):
            break
        if isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, nn.Identity())
            changed = True
    if not changed:
        raise ValueError(
            f"model.stem=small changes nothing: the first convolution of {type(model).__name__} keeps the size already"
        )
