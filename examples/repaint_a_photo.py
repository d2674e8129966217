"""Repaint the middle of a photo, four times.

python examples/repaint_a_photo.py runs/photos photo.jpg painted.png
"""

import sys

import numpy as np
import torch
from PIL import Image

import unveil

if len(sys.argv) != 4:
    raise SystemExit(__doc__)
run, photo, out = sys.argv[1:]

model, _ = unveil.load_model(run)
clip = model.recipe.clip
picture = Image.open(photo).convert("RGB" if clip.channels == 3 else "L").resize((clip.width, clip.height))
values = torch.from_numpy(np.asarray(picture).copy()).float() / 255
pixels = values.reshape(clip.height, clip.width, -1).permute(2, 0, 1)[None, :, None]  # (1, C, T = 1, H, W)

hole = torch.zeros(1, 1, clip.height, clip.width, dtype=torch.bool)  # True: repaint
hole[..., clip.height // 4 : 3 * clip.height // 4, clip.width // 4 : 3 * clip.width // 4] = True
samples = unveil.repaint(model, pixels, hole, num_steps=50, num_samples=4)[0]  # (4, C, 1, H, W)

row = torch.cat([pixels, samples])[:, :, 0].permute(2, 0, 3, 1).flatten(1, 2)  # side by side, (H, 5 * W, C)
Image.fromarray((row * 255).round().byte().numpy().squeeze()).save(out)
print(f"{out}: the photo, and four answers to what the hole could hold")
