"""`RewardModel`: a patched model and its processor, ready to score."""

import logging

import torch

from yojo.inputs.example import Example
from yojo.inputs.packing import Collator, pack_in_parts
from yojo.patching import devices, graphs
from yojo.patching.eval_mode import Modules
from yojo.patching.state import unwrap
from yojo.saving.load import load_pretrained
from yojo.saving.save import push_to_hub, save_pretrained

logger = logging.getLogger(__name__)


def _named_scores(encoded, scores, dtype):
    """The scores of each example, from the table of a batch; a warning names those that are not finite."""
    scores = [row[: len(item.responses)].clone() for row, item in zip(scores, encoded, strict=True)]
    for row, item in zip(scores, encoded, strict=True):
        if broken := (~row.isfinite()).nonzero()[:, 0].tolist():
            logger.warning(
                "%s: the scores of responses %s are not finite (%s): hidden states overflow in %s, or weights are not "
                "finite; bfloat16 and float32 reach further than float16",
                item.name,
                ", ".join(map(str, broken)),
                ", ".join(str(row[n].item()) for n in broken),
                str(dtype).removeprefix("torch."),
            )
    return scores


class RewardModel:
    """A patched model and its processor, ready to score, from any number of threads.

    A model that is in training mode is put into eval mode while any thread scores with it, and back behind the last. Train
    it meanwhile and the training passes run without dropout; where training mode is set under a pass that scores, that
    pass raises a RuntimeError rather than returning a score with dropout in it.

    Args:
        model: a model that `yojo.patch` has patched, bare or wrapped by PEFT.
        processor: its processor, or its tokenizer for a text-only model.
        max_length: the most tokens one example may take (see `yojo.Collator`), or None.

    Example:
        >>> reward_model = yojo.RewardModel.from_pretrained("my-reward-model")
        >>> reward_model.score("Which digit is shown?", ["It is a 7.", "It is a 2."], images=["seven.png"])
        tensor([ 1.3, -0.8])
    """

    def __init__(self, model, processor, max_length=None):
        self.collator = Collator(processor, model, max_length)
        self.model = model
        self.processor = processor

    @property
    def config(self):
        """The `YojoConfig` the model is patched with."""
        return self.collator.config

    def score(self, prompt, responses, images=None, videos=None, *, tools=None, literal_tags=False):
        """Score the responses to one prompt in one forward pass.

        Args:
            prompt: string or chat messages (see `yojo.Example`).
            responses: N strings.
            images, videos: lists, or None.
            tools: list of dicts for the chat template, or None.
            literal_tags: `<image>` and `<video>` in the prompt are text, not places.

        Returns:
            [N] float32 on the CPU, in the order of responses; higher is better.

        Raises:
            TypeError, ValueError: an input that cannot be scored; the message names it.
        """
        example = Example(prompt, responses, images=images, videos=videos, tools=tools, literal_tags=literal_tags)
        return self.score_many([example])[0]

    def score_many(self, examples, progress=False, token_budget=8192):
        """Score many examples, several in one forward pass where they fit.

        Rankings are not looked at. A response whose states overflow has a score that is not finite, and changes no other
        response's but those that see it (later ones, in comparative mode); a warning names it.

        Args:
            examples: iterable of `yojo.Example`.
            progress: show a progress bar.
            token_budget: packed rows are filled up to this many tokens; an example that is longer by itself gets a
                row of its own.

        Returns:
            list of [N] float32 tensors on the CPU, in the order of examples.
        """
        from tqdm.auto import tqdm

        if token_budget < 1:
            raise ValueError(f"token_budget must be at least 1, got {token_budget}")
        total = len(examples) if hasattr(examples, "__len__") else None
        scores, row, tokens, modules = [], [], 0, Modules()
        base = unwrap(self.model)
        ahead = devices.input_device(base).type != "cpu"
        with tqdm(total=total, disable=not progress, desc="scoring", unit="example") as bar:
            under_way = []  # functions that wait for the scores of a row

            def begin(row):
                """Begin a row, then wait for the one before: a device has work while the next row is encoded."""
                under_way.append(self._begin_row(row, modules))
                end(all_but=1 if ahead else 0)

            def end(all_but=0):
                while len(under_way) > all_but:
                    found = under_way.pop(0)()
                    scores.extend(found)
                    bar.update(len(found))

            for place, example in enumerate(examples):
                encoded = self.collator.encode(example, place, rankings=False)
                size = encoded.num_tokens(self.config)
                if row and tokens + size > token_budget:
                    begin(row)
                    row, tokens = [], 0
                row.append(encoded)
                tokens += size
            if row:
                begin(row)
            end()
        return scores

    def _score_row(self, encoded):
        return self._begin_row(encoded)()

    def _begin_row(self, encoded, modules=None):
        """Hand a row to the device, in parts where it must be; returns a function that waits for its scores.

        `modules`: the `Modules` of the rows before.
        """
        parts = [self._score_batch(some, batch, modules) for some, batch in pack_in_parts(self._pack, encoded)]
        return lambda: [scores for part in parts for scores in part()]

    def _pack(self, encoded):
        base, multiple = unwrap(self.model), None
        if limit := base.yojo.graphs:
            tokens = sum(item.num_tokens(self.config) for item in encoded)
            multiple = graphs.BUCKET if graphs.bucket_of(tokens, limit) else None
        self.collator.tables.follow(base)
        return self.collator.pack(encoded, pad_to_multiple_of=multiple)

    def _score_batch(self, encoded, batch, modules=None):
        """Begin the pass over a batch; returns a function that waits for its scores, one tensor per example."""
        base = unwrap(self.model)
        device = devices.input_device(base)
        batch = {name: devices.sent(value, device) for name, value in batch.items()}
        with base.yojo.eval_mode.of(self.model, modules), torch.inference_mode():
            scores = devices.fetched(self.model(**batch).scores.float())
        return lambda: _named_scores(encoded, scores(), base.dtype)

    def save_pretrained(self, path, **options):
        """Write everything that changes a score into a folder, whole or not at all.

        Args:
            path: folder, made if it is missing.
            **options: as for `yojo.saving.save.save_pretrained`: state_dict, card, provenance.
        """
        save_pretrained(self, path, **options)

    def push_to_hub(self, repo_id, private=None, token=None, commit_message=None, **options):
        """Save and upload to the hub; the repository is made if it is missing.

        Args:
            repo_id: "name/repository".
            private: whether a new repository is private; the account's default by default.
            token: a hub token; the one that is logged in by default.
            commit_message: of the upload.
            **options: as for `save_pretrained`.

        Returns:
            What `huggingface_hub.HfApi.upload_folder` returns.
        """
        return push_to_hub(self, repo_id, private=private, token=token, commit_message=commit_message, **options)

    @classmethod
    def from_pretrained(cls, path, **kwargs):
        """Load what `save_pretrained` wrote, or a checkpoint of transformers' own Trainer with a patched model.

        Args:
            path: folder, or a hub name.
            **kwargs: as for `yojo.saving.load.load_pretrained`: base_model, dtype, device, fuse, trainable, check_base, ...

        Returns:
            `RewardModel`, in eval mode.

        Raises:
            ValueError: something is missing, damaged, or of another save; nothing is ever filled with random weights.
        """
        return cls(*load_pretrained(path, **kwargs))
