"""How much do a model's features know of your classes? Pictures lie in a folder for each class.

python examples/probe_your_folder.py runs/photos labelled/
"""

import sys

import unveil

if len(sys.argv) != 3:
    raise SystemExit(__doc__)
run, data = sys.argv[1:]

result = unveil.probe(run=run, data=data)  # a random fifth is held out
print(
    f"{result['train_samples']} pictures of {result['num_classes']} classes; tested on {result['test_samples']} others"
)
for features, scores in result["results"].items():
    print(f"{features:>20}: " + ", ".join(f"{method} {score:.1f} %" for method, score in scores.items()))

unveil.embed(run=run, data=data, out="features.npz")
print("features.npz: the features of every picture, with its path")
