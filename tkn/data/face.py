"""Facial landmarks and the piecewise affine warp to a frontal, upright reference face (Sec. 4.1, Pain)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tkn.data.augment import flip_half
from tkn.data.base import to_unit_range
from tkn.data.preparation import normalise

#: Kept around the landmarks' bounding box, in its width and height: room for the landmarks' noise.
MARGIN = 0.1

# The landmarks are iBUG-68 without the inner mouth corners: jaw 0-16, brows 17-21 and 22-26, nose 27-35,
# eyes 36-41 and 42-47, outer mouth 48-59, inner mouth 60-65. "Left" is the picture's left.

#: int64 [66]: the landmark that each landmark becomes when the picture is flipped horizontally.
MIRROR = torch.tensor(
    [
        *range(16, -1, -1),  # jaw
        *range(26, 16, -1),  # brows
        *(27, 28, 29, 30, 35, 34, 33, 32, 31),  # nose: the bridge stays
        *(45, 44, 43, 42, 47, 46, 39, 38, 37, 36, 41, 40),  # eyes
        *range(54, 47, -1),  # outer mouth, upper lip
        *range(59, 54, -1),  # outer mouth, lower lip
        *(62, 61, 60, 65, 64, 63),  # inner mouth
    ]
)

# The left half and the midline in 1/256 of the crop: exact in binary, so that 1 - x is exact too.
_HALF = {
    **dict(enumerate([(0, 62), (3, 95), (9, 128), (18, 159), (32, 189), (52, 215), (77, 236), (102, 251), (128, 256)])),
    **dict(enumerate([(22, 26), (37, 8), (59, 0), (82, 4), (104, 14)], start=17)),
    **dict(enumerate([(128, 44), (128, 67), (128, 88), (128, 111), (102, 128), (115, 133), (128, 137)], start=27)),
    **dict(enumerate([(47, 52), (61, 42), (78, 42), (93, 53), (78, 59), (61, 59)], start=36)),
    **dict(enumerate([(79, 182), (98, 172), (116, 167), (128, 169)], start=48)),
    **dict(enumerate([(128, 205), (115, 203), (96, 196)], start=57)),
    **dict(enumerate([(114, 179), (128, 180)], start=60)),
    **dict(enumerate([(128, 186), (114, 185)], start=64)),
}

#: float32 [66, 2]: (x, y) of the reference face's landmarks in [0, 1] of the crop, from its top left corner;
#: frontal, upright, touching all four sides, and exactly its own mirror image.
REFERENCE = torch.empty(66, 2)
for _index, (_x, _y) in _HALF.items():
    REFERENCE[_index] = torch.tensor([_x, _y]) / 256
    REFERENCE[MIRROR[_index]] = torch.tensor([256 - _x, _y]) / 256


@dataclass(frozen=True, eq=False)
class ReferenceFace:
    """Where a warp puts a face's landmarks.

    points: float32 [n, 2], (x, y) in [0, 1] of the crop, from its top left corner; touching all four sides.
    mirror: int64 [n], the landmark that each becomes when the picture is flipped horizontally; the points are then
        exactly their own mirror image. None: they have none.
    """

    points: Tensor
    mirror: Tensor | None


#: The pain archive's 66 landmarks.
PAIN_FACE = ReferenceFace(REFERENCE, MIRROR)


@lru_cache(maxsize=8)
def pixel_weights(face: ReferenceFace, size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The warp as one matrix [size * size, n], a row of weights over the n landmarks per output pixel (row-major),
    and bool [size, size]: is the pixel inside the reference's convex hull?

    A row holds the pixel centre's barycentric coordinates in the reference's Delaunay triangle around it, averaged
    with the mirrored triangulation's: Delaunay's ties are not broken alike on both sides, the mean is symmetric
    (and still piecewise affine). Rows sum to 1; those of pixels outside the hull are all zero. The matrix is kept
    dense: at this size (2304 x 66) its product is no slower than a sparse one's, and little beside the sampling.
    """
    from scipy.spatial import Delaunay  # here, for it takes a second to import

    points = face.points.double().numpy()
    delaunay = Delaunay(points)
    centres = (np.arange(size) + 0.5) / size
    pixels = np.stack(np.meshgrid(centres, centres), axis=-1).reshape(-1, 2)
    triangle = delaunay.find_simplex(pixels)
    to_barycentric = delaunay.transform[triangle]
    first_two = np.einsum("nij,nj->ni", to_barycentric[:, :2], pixels - to_barycentric[:, 2])
    weights = np.zeros((size * size, len(points)))
    corners = delaunay.simplices[triangle]
    np.put_along_axis(weights, corners, np.c_[first_two, 1 - first_two.sum(axis=1)], axis=1)
    weights[triangle < 0] = 0
    if face.mirror is not None:
        mirrored = weights.reshape(size, size, -1)[:, ::-1].reshape(weights.shape)[:, face.mirror.numpy()]
        weights = (weights + mirrored) / 2
    inside = weights.sum(axis=1) > 0.75  # half where the hull's very edge is inside on one side only
    weights[~inside] = 0
    with torch.inference_mode(False):  # cached: made while testing, it must still serve training
        mask = torch.from_numpy(inside).view(size, size)
        return torch.from_numpy(weights).to(device, dtype), mask.to(device)


@dataclass(frozen=True)
class FaceWarp:
    """Warps faces so that their n landmarks land on the reference's: [B, C, H, W] -> [B, C, size, size] (Sec. 4.1).

    Coordinates are in pixels, (x, y) from the picture's top left corner: the first pixel covers [0, 1] and has its
    centre at 0.5. Piecewise affine, sampled bilinearly; the border's pixels go on beyond the picture, and output
    pixels outside the reference's convex hull are 0. Differentiable in images and landmarks, on any device.
    """

    size: int = 48
    face: ReferenceFace = PAIN_FACE

    def __call__(self, images: Tensor, landmarks: Tensor) -> Tensor:
        """Floating images [B, C, H, W] and landmarks [B, n, 2] of one dtype -> [B, C, size, size]."""
        height, width = images.shape[-2:]
        weights, inside = pixel_weights(self.face, self.size, landmarks.dtype, landmarks.device)
        x, y = landmarks.unbind(-1)
        # grid_sample without aligned corners: -1 and 1 are the outer edges of the border's pixels
        corners = torch.stack((2 * x / width - 1, 2 * y / height - 1), dim=1)
        with torch.autocast(images.device.type, enabled=False):  # half precision would move pixels
            grid = (corners @ weights.T).view(-1, 2, self.size, self.size).permute(0, 2, 3, 1)
            faces = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
        return faces * inside


@dataclass(frozen=True)
class WarpFaces:
    """Crops uint8 [B, 3, H, W] and landmarks float32 [B, n, 2] in pixels -> float32 [B, 3, size, size].

    Augmenting adds Gaussian noise to the landmarks before the warp, its standard deviation `landmark_noise` times
    the face's width (x) and height (y), and flips half of the faces after it (Sec. 4.1), with random numbers of the
    tensors' device's default generator. The pixels are in [0, 1], or else of the normalisation `mean`, `std`.
    """

    landmark_noise: float
    flip: bool
    warp: FaceWarp = FaceWarp()
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __call__(self, batch: tuple[Tensor, ...], augment: bool) -> Tensor:
        crops, landmarks = batch
        if augment and self.landmark_noise:
            face = landmarks.amax(dim=1, keepdim=True) - landmarks.amin(dim=1, keepdim=True)
            landmarks = landmarks + self.landmark_noise * face * torch.randn_like(landmarks)
        faces = self.warp(to_unit_range((crops,), augment), landmarks)
        if augment and self.flip:
            faces = flip_half(faces)
        return normalise(faces, self.mean, self.std)


def crop_face(
    image: Image.Image, landmarks: NDArray[np.float64], side: int
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """A face's surroundings [3, side, side], and its landmarks [n, 2] in their pixels.

    They are the landmarks' bounding box with a margin, cut to the picture. ValueError where that leaves nothing.
    """
    low, high = landmarks.min(axis=0), landmarks.max(axis=0)
    margin = MARGIN * (high - low)
    low, high = np.maximum(low - margin, 0), np.minimum(high + margin, image.size)
    if not (high - low >= 1).all():
        raise ValueError(f"its landmarks do not span a face on the image of {image.width}x{image.height}")
    crop = image.resize((side, side), Image.Resampling.BILINEAR, box=(*low, *high))
    return np.asarray(crop).transpose(2, 0, 1), (landmarks - low) * side / (high - low)


def check_landmark_noise(noise: float) -> None:
    """ValueError for a `data.landmark_noise` that can't be."""
    if not 0 <= noise < math.inf:
        raise ValueError(f"data.landmark_noise={noise}: must be a number >= 0")
