import pytest
import torch
from torch import Tensor

from tkn.data.face import MIRROR, PAIN_FACE, REFERENCE, FaceWarp, pixel_weights

CPU = torch.device("cpu")


def make_face(width: int, height: int, seed: int) -> tuple[Tensor, Tensor]:
    """A noise picture [1, 3, height, width] and landmarks [1, 66, 2] of a bent face on it, double."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(1, 3, height, width, generator=generator, dtype=torch.float64)
    noise = 0.003 * torch.randn(1, 66, 2, generator=generator, dtype=torch.float64)
    bend = 0.05 * torch.sin(4 * REFERENCE.double().flip(-1) + seed)
    return images, (0.15 + 0.7 * REFERENCE + bend + noise) * torch.tensor([width, height])


def draw_blobs(landmarks: Tensor, width: int, height: int) -> Tensor:
    """[1, 66, height, width]: channel k has a bright blob at landmark k of [1, 66, 2]."""
    x, y = landmarks[..., None, None].unbind(2)
    columns, rows = torch.arange(width) + 0.5, torch.arange(height)[:, None] + 0.5
    return torch.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * 3**2))


def find_blobs(images: Tensor) -> Tensor:
    """(x, y) in [0, 1] of every channel's brightest pixel: [1, C, H, W] -> [1, C, 2]."""
    size = images.shape[-1]
    index = images.flatten(2).argmax(dim=-1)
    return (torch.stack([index % size, index // size], dim=-1) + 0.5) / size


def mirror(landmarks: Tensor, width: int) -> Tensor:
    x, y = landmarks[:, MIRROR].unbind(-1)
    return torch.stack([width - x, y], dim=-1)


def test_mirror_is_an_involution() -> None:
    assert torch.equal(MIRROR[MIRROR], torch.arange(66))
    midline = [8, 27, 28, 29, 30, 33, 51, 57, 61, 64]
    assert (torch.arange(66) == MIRROR).nonzero().flatten().tolist() == midline


def test_reference_is_symmetric_and_fills_the_crop() -> None:
    assert torch.equal(mirror(REFERENCE[None], 1)[0], REFERENCE)
    assert torch.equal(REFERENCE.amin(0), torch.zeros(2))
    assert torch.equal(REFERENCE.amax(0), torch.ones(2))
    brows, eyes, nose, mouth, chin = (REFERENCE[part, 1].mean() for part in (19, slice(36, 48), 30, slice(48, 66), 8))
    assert brows < eyes < nose < mouth < chin


@pytest.mark.parametrize("size", [7, 48, 96])
def test_pixel_weights(size: int) -> None:
    weights, inside = pixel_weights(PAIN_FACE, size, torch.float64, CPU)
    assert torch.equal(inside, weights.any(dim=1).view(size, size))
    assert 0.7 < inside.double().mean() < 0.85
    assert (weights >= -1e-12).all()
    torch.testing.assert_close(weights.sum(dim=1), inside.double().flatten(), rtol=0, atol=1e-12)
    grid = weights.view(size, size, 66)
    assert torch.equal(grid, grid.flip(1)[..., MIRROR])


def test_reference_onto_itself_is_the_picture_inside_the_hull() -> None:
    images = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    faces = FaceWarp(48)(images, (REFERENCE * 48).expand(2, -1, -1))
    _, inside = pixel_weights(PAIN_FACE, 48, torch.float32, CPU)
    torch.testing.assert_close(faces, images * inside, rtol=0, atol=1e-5)


def test_affine_landmarks_sample_at_affine_places() -> None:
    """On a picture that holds its own coordinates, the warp must read the affine map of its pixels' centres."""
    height, width, size = 70, 90, 32
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    images = torch.stack([columns, rows])[None].double()
    matrix = torch.tensor([[50.0, 12.0], [-9.0, 40.0]], dtype=torch.float64)
    offset = torch.tensor([15.0, 20.0], dtype=torch.float64)
    faces = FaceWarp(size)(images, (REFERENCE.double() @ matrix.T + offset)[None])
    centres = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    pixels = torch.cartesian_prod(centres, centres).flip(-1)
    _, inside = pixel_weights(PAIN_FACE, size, torch.float64, CPU)
    expected = (pixels @ matrix.T + offset) * inside.view(-1, 1)
    torch.testing.assert_close(faces, expected.T.reshape(1, 2, size, size), rtol=0, atol=1e-9)


def test_affine_transform_of_picture_and_landmarks_changes_nothing() -> None:
    images, landmarks = make_face(40, 50, seed=1)
    quarter_turn = torch.stack([50 - landmarks[..., 1], landmarks[..., 0]], dim=-1)
    faces = FaceWarp(24)(images, landmarks)
    torch.testing.assert_close(FaceWarp(24)(images.rot90(-1, (2, 3)), quarter_turn), faces, rtol=0, atol=1e-12)
    smooth = torch.nn.functional.avg_pool2d(images, 5, stride=1, padding=2)
    doubled = torch.nn.functional.interpolate(smooth, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(FaceWarp(24)(doubled, 2 * landmarks), FaceWarp(24)(smooth, landmarks), rtol=0, atol=0.05)


def test_landmarks_land_on_the_reference() -> None:
    _, landmarks = make_face(150, 130, seed=2)
    found = find_blobs(FaceWarp(96)(draw_blobs(landmarks, 150, 130), landmarks))
    assert (found - REFERENCE).norm(dim=-1).max() < 2 / 96


def test_flipping_before_the_warp_is_flipping_after_it() -> None:
    images, landmarks = make_face(60, 50, seed=3)
    faces = FaceWarp(48)(images, landmarks)
    flipped = FaceWarp(48)(images.flip(-1), mirror(landmarks, 60))
    torch.testing.assert_close(flipped, faces.flip(-1), rtol=0, atol=1e-12)


def test_flipped_face_is_in_reference_position() -> None:
    _, landmarks = make_face(150, 130, seed=4)
    found = find_blobs(FaceWarp(96)(draw_blobs(landmarks, 150, 130), landmarks).flip(-1))
    assert (found[:, 36:48] - REFERENCE[MIRROR[36:48]]).norm(dim=-1).max() < 2 / 96


def test_gradients() -> None:
    images, landmarks = make_face(7, 6, seed=5)
    assert torch.autograd.gradcheck(FaceWarp(5), (images.requires_grad_(), landmarks.requires_grad_()))


def test_batch_equals_one_by_one() -> None:
    images, landmarks = (torch.cat(parts) for parts in zip(*(make_face(30, 20, s) for s in range(3)), strict=True))
    one_by_one = [FaceWarp(12)(images[i : i + 1], landmarks[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(FaceWarp(12)(images, landmarks), torch.cat(one_by_one), rtol=0, atol=1e-12)


def test_autocast_moves_no_pixel() -> None:
    images, landmarks = (tensor.float() for tensor in make_face(60, 50, seed=6))
    expected = FaceWarp(48)(images, landmarks)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(FaceWarp(48)(images, landmarks), expected)


def test_first_use_in_inference_mode_still_allows_training() -> None:
    images, landmarks = make_face(9, 8, seed=7)
    pixel_weights.cache_clear()
    with torch.inference_mode():
        FaceWarp(6)(images, landmarks)
    FaceWarp(6)(images, landmarks.requires_grad_()).sum().backward()
    assert landmarks.grad is not None
    assert landmarks.grad.any()
