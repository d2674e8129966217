"""Holes by name: which pixels of a picture or clip are to be repainted."""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from unveil import draws
from unveil.config import Clip, nearest
from unveil.masking import center_tokens, draw_mask
from unveil.tokens import Grid, patchify

# With the share that is meant if none is given: of the tokens, or for irregular of the pixels.
NAMED_HOLES = {"random": 0.75, "center": 0.25, "block": 0.25, "irregular": 0.25, "tube": 0.75}
STROKES_SIDE = 512  # strokes are drawn no larger and then enlarged, which nobody sees


def parse_named(mask: str) -> tuple[str, float]:
    """The name and the share of a word such as random:0.75.

    Raises:
        ValueError: the name is unknown, or the share is no number from 0 to 1.
    """
    name, _, share = mask.partition(":")
    if name not in NAMED_HOLES:
        raise ValueError(
            f"The mask {mask!r} is unknown: name one with its share, as random:0.75. {nearest(name, NAMED_HOLES)}"
        )
    try:
        value = float(share) if share else NAMED_HOLES[name]
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise ValueError(f"The mask {mask!r} needs a share from 0 to 1, as in {name}:{NAMED_HOLES[name]}.")
    return name, value


def named_holes(clip: Clip, mask: str, indices: Sequence[int], seed: int) -> Tensor:
    """The holes that a word and a share name, for the clips with these indices, as pixels (B, T, H, W).

    Args:
        mask: random:SHARE of the tokens; center:SHARE of the area, or block:SHARE anywhere; irregular:SHARE of the pixels, as
            strokes of a brush; tube:SHARE of the places in every frame. Without a share, the usual one. The holes of a clip
            depend on (seed, its index) alone.

    Raises:
        ValueError: as `parse_named`.
    """
    name, share = parse_named(mask)
    generators = [draws.generator(seed, i, "evaluation mask") for i in indices]
    if name == "irregular":
        holes = [strokes(clip.height, clip.width, share, g).expand(clip.frames, -1, -1) for g in generators]
        return torch.stack(holes)
    if name == "block":
        hidden = torch.stack([_block(clip.grid, share, g) for g in generators])
    else:
        hidden = draw_mask(name, generators, clip.grid, share).flags()
    return pixels_of(hidden, clip.grid, clip.patch_size, clip.tubelet_size)


def _block(grid: Grid, share: float, generator: torch.Generator) -> Tensor:
    """The block that hides about a share of the area in every frame, anywhere, as (N,) bool."""
    t, h, w = grid
    if share in (0, 1):
        return center_tokens(grid, share)
    sides = [max(1, round(length * math.sqrt(share))) for length in (h, w)]
    corner = [int(torch.randint(n - side + 1, (), generator=generator)) for n, side in zip((h, w), sides, strict=True)]
    block = torch.zeros(t, h, w, dtype=torch.bool)
    block[:, corner[0] : corner[0] + sides[0], corner[1] : corner[1] + sides[1]] = True
    return block.flatten()


def strokes(height: int, width: int, share: float, generator: torch.Generator) -> Tensor:
    """Strokes of a brush that cover a share of the pixels, a little more at most, as (H, W) bool.

    Free-form masks after Yu et al. 2019, arXiv 1806.03589, algorithm 1, with numbers of ours: each stroke turns by up to 120
    degrees after every line, whose length is a tenth to a quarter of the shorter side, and its width a thirtieth to an eighth.
    """
    if share in (0, 1):
        return torch.full((height, width), bool(share))
    scale = min(1.0, STROKES_SIDE / max(height, width))
    h, w = max(1, round(height * scale)), max(1, round(width * scale))

    def draw(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    canvas = Image.new("L", (w, h))
    pen = ImageDraw.Draw(canvas)
    side = min(h, w)
    while True:
        x, y, angle, thickness = draw(0, w), draw(0, h), draw(0, 2 * math.pi), side * draw(1 / 30, 1 / 8)
        for _ in range(int(draw(3, 10))):
            angle += draw(-math.pi * 2 / 3, math.pi * 2 / 3)
            length = side * draw(0.1, 0.25)
            end = min(max(x + length * math.cos(angle), 0), w), min(max(y + length * math.sin(angle), 0), h)
            pen.line([(x, y), end], fill=255, width=max(1, round(thickness)))
            for px, py in ((x, y), end):  # round ends, which join the lines too
                pen.ellipse([px - thickness / 2, py - thickness / 2, px + thickness / 2, py + thickness / 2], fill=255)
            x, y = end
            if (covered := np.asarray(canvas) > 0).mean() >= share:
                drawn = torch.from_numpy(covered)[None, None].float()
                return F.interpolate(drawn, (height, width), mode="nearest-exact")[0, 0].bool()


def masked_view(clips: Tensor, holes: Tensor, gray: float = 0.5) -> Tensor:
    """The clips with gray where they are hidden, for people to see."""
    return torch.where(holes[:, None], torch.full_like(clips, gray), clips)


def pixels_of(hidden: Tensor, grid: Grid, patch_size: int, tubelet_size: int = 1) -> Tensor:
    """Hidden tokens (B, N) bool as the pixel mask (B, T, H, W) that they cover."""
    blocks = hidden.reshape(len(hidden), *grid)
    for dim, size in ((1, tubelet_size), (2, patch_size), (3, patch_size)):
        blocks = blocks.repeat_interleave(size, dim)
    return blocks


def hardly_touched(holes: Tensor, clip: Clip, share: float) -> Tensor:
    """The part of holes (B, T, H, W) for which a model, which hides whole patches, would hide more than it paints: what lies in
    patches with a hole in at most this share of their pixels, (B, T, H, W).

    If every patch of a clip is touched, so that nothing would be left to go by, it is at least what lies in the quarter of the
    patches that are touched least, as far as these are not hidden whole.
    """
    shares = patchify(holes[:, None].float(), clip.patch_size, clip.tubelet_size).mean(-1)
    partial, N = (shares > 0) & (shares < 1), shares.shape[1]
    count = (partial & (shares <= share)).sum(1)
    least = torch.where((shares == 0).any(1), 0, partial.sum(1).clamp(max=-(-N // 4)))
    # in no order among those that are touched alike, which would all lie in a corner
    scattered = torch.rand(N, generator=draws.generator(0, "hardly touched")).to(shares) / clip.token_dim
    rank = torch.where(partial, shares + scattered, 2).argsort(dim=1).argsort(dim=1)
    patches = rank < count.maximum(least)[:, None]
    return holes & pixels_of(patches, clip.grid, clip.patch_size, clip.tubelet_size)


def filled_smoothly(clips: Tensor, holes: Tensor, part: Tensor) -> Tensor:
    """Clips (B, C, T, H, W) with a part of their holes (B, T, H, W both) filled: each pixel is the mean of its neighbours,
    in time too. Neighbours in other parts of the holes do not count.

    From every pixel of the part, a pixel outside the holes must be within reach through the part.
    """
    from scipy import sparse  # not needed to train
    from scipy.sparse import linalg

    filled = clips.clone()
    for i, (hole, inside) in enumerate(zip(holes.cpu().numpy(), part.cpu().numpy(), strict=True)):
        places = np.argwhere(inside)
        n = len(places)
        if n == 0:
            continue
        number = np.zeros(hole.shape, dtype=int)
        number[inside] = np.arange(n)
        values = clips[i].movedim(0, -1).double().cpu().numpy()
        degree, sums, pairs = np.zeros(n), np.zeros((n, values.shape[-1])), []
        for step in (*np.eye(3, dtype=int), *-np.eye(3, dtype=int)):
            near = places + step
            exists = ((near >= 0) & (near < hole.shape)).all(1)
            here, near = np.flatnonzero(exists), tuple(near[exists].T)
            known, ours = ~hole[near], inside[near]
            sums[here[known]] += values[near][known]
            degree[here[known | ours]] += 1
            pairs.append((here[ours], number[near][ours]))
        rows, columns = (np.concatenate(side) for side in zip(*pairs, strict=True))
        between = sparse.csc_array((np.ones(len(rows)), (rows, columns)), shape=(n, n))
        solved = linalg.spsolve((sparse.diags_array(degree) - between).tocsc(), sums).reshape(n, -1)
        filled[i][:, torch.from_numpy(inside)] = torch.from_numpy(solved.T).to(filled)
    return filled
