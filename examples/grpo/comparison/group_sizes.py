"""How well reward models tell right captions of the initial policy from wrong ones, in groups of 2, 4, 8 and 16."""

import argparse
import json
from pathlib import Path

import captioner
import measures

from yojo.demo import digits

SIZES = (2, 4, 8, 16)


def pairwise(judge, images, labels, captions, size, seed):
    """Share of pairs of a right and a wrong caption that are in order, in groups of a size.

    Args:
        judge: see `yojo.judges.Judge`.
        images, labels: lists of B PIL images and digits.
        captions: list of B lists of strings, cut into groups of `size`; a multiple of it.
        size: captions of a group.
        seed: of the orders in which they are judged.

    Returns:
        dict: size, and pairs and pairwise as `measures.groups` says them.
    """
    from yojo.rewards.groups import Group
    from yojo.rewards.scorer import GroupScorer

    groups, right = [], []
    for image, label, texts in zip(images, labels, captions, strict=True):
        for start in range(0, len(texts), size):
            part = texts[start : start + size]
            groups.append(Group(digits.PROMPT, part, images=[image]))
            right.append([captioner.is_right(text, label) for text in part])
    found = GroupScorer(judge, seed=seed).score(groups)
    made = measures.groups([one.rewards for one in found], right)
    return {"size": size, "pairs": made["pairs"], "pairwise": round(made["pairwise"], 4)}


def main(argv=None):
    """Print a line of JSON for each judge and size."""
    parser = argparse.ArgumentParser(description="How well judges order captions, by the size of the group.")
    parser.add_argument("judges", nargs="+", help="names of judges, as for yojo eval")
    parser.add_argument("--policy", type=Path, required=True, help="folder of the captioner, see captioner.py")
    parser.add_argument("--images", type=int, default=120, help="held-out images (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of captions and orders (%(default)s)")
    options = parser.parse_args(argv)
    from yojo.judges import load_judge

    model, processor = captioner.load(options.policy)
    images, labels = zip(*digits.load_digits_split()[1][: options.images], strict=True)
    captions = captioner.sample(model, processor, list(images), max(SIZES), options.seed)
    for name in options.judges:
        judge = load_judge(name)
        for size in SIZES:
            found = pairwise(judge, images, labels, captions, size, options.seed)
            print(json.dumps({"judge": name} | found), flush=True)


if __name__ == "__main__":
    main()
