"""Pre-train a small DiffMAE on a folder of pictures and look at what it learned.

    python examples/train_on_your_folder.py photos/ runs/photos

Stop it whenever you like; the same command goes on where it stopped.
"""

import sys

import unveil

if len(sys.argv) != 3:
    raise SystemExit(__doc__)
data, out = sys.argv[1:]

result = unveil.pretrain(
    data=data,  # nested folders are fine; labels are not needed
    out=out,
    recipe="diffmae",  # paints and represents
    size="Micro/8",  # two million parameters, patches of 8 pixels
    image_size="64",
    epochs=200,
    on_progress=lambda p: print(f"\rstep {p.step} of {p.num_steps}, loss {p.loss:.4f}", end="", flush=True),
)
print(f"\n{result['images_seen']:,} pictures seen; look at {out}/contact_sheet.png")
