"""`Classifier`: a stock sequence classifier with one label, the usual form of a reward model, one response a pass."""

from yojo.judges.checkpoints import check_stock, load_beside, load_config, load_stock
from yojo.judges.passes import Passes
from yojo.patching.state import unwrap
from yojo.saving.identity import classifier_fingerprint

_OF_A_CLASS = "ForSequenceClassification"


class Classifier:
    """A stock sequence classifier of transformers with one label, as a judge: the logit of a conversation is its score.

    Every response is a pass of its own, of the prompt with the response as the assistant's turn, through the classifier's own
    chat template (`yojo.judges.conversations`). Conversations share batches, filled up on the right with the token by which the
    model tells padding, and a score is the same in every company, to rounding: it is that of the model's own forward on the
    conversation alone. Where the model has no such token, or would read other scores from padded rows, every conversation
    is a pass of its own. From any number of threads.

    transformers' decoder classifiers read the logit at the last token that is not the padding token: one that was trained
    with its end token for padding reads the one before, here too.

    Args:
        model: a model of transformers' `AutoModelForSequenceClassification`, bare or wrapped by PEFT.
        processor: its tokenizer; or its processor, for one of the few classes that take images.
        max_length: the most tokens a conversation may have, or None. A longer one is an error: nothing is ever cut.
        batch_size: conversations in a pass.
        date: day that the chat template prints, where it prints one; what the processor has settled, or today, by default.

    Raises:
        TypeError, ValueError: another kind of model, more labels than one, no chat template, a bad argument.

    Example:
        >>> judge = yojo.judges.Classifier.from_pretrained("my-classifier")
        >>> judge.score_many([yojo.Example("Which digit is it?", ["It is a 7.", "Who knows."])])
        [tensor([ 1.3, -0.8])]
    """

    def __init__(self, model, processor, max_length=None, batch_size=8, date=None):
        base = unwrap(model)
        _check_model(base)
        padding = getattr(base.config.get_text_config(), "pad_token_id", None)
        self.model, self.processor, self.max_length = model, processor, max_length
        self.passes = Passes(model, processor, self._read, padding, max_length, batch_size, date)

    @property
    def batch_size(self):
        """Conversations in a pass: 1 where the model could not tell padding."""
        return self.passes.batch_size

    @property
    def conversations(self):
        """What the model sees of an example (see `yojo.judges.conversations`)."""
        return self.passes.conversations

    @property
    def order_free(self):
        """True: every response is a pass of its own."""
        return True

    @classmethod
    def from_pretrained(
        cls,
        path,
        *,
        dtype=None,
        device=None,
        max_length=None,
        batch_size=8,
        date=None,
        processor_options=None,
        **kwargs,
    ):
        """Load a stock sequence classifier with all its weights, or not at all.

        Args:
            path: folder or hub name.
            dtype: torch dtype of the weights; the one they were saved in by default.
            device: where the model goes; where transformers puts it (the CPU) by default.
            max_length, batch_size, date: as above.
            processor_options: dict of keyword arguments for the tokenizer or processor.
            **kwargs: handed to `AutoModelForSequenceClassification.from_pretrained`, such as attn_implementation or
                device_map.

        Returns:
            `Classifier`.

        Raises:
            ValueError: no classifier, or one whose head or any other weight is missing: random weights score at random.
        """
        import transformers

        _check_config(load_config(path, "sequence classifier", **kwargs), path)
        model = load_stock(path, transformers.AutoModelForSequenceClassification, dtype=dtype, device=device, **kwargs)
        processor = load_beside(path, model, processor_options, **kwargs)
        return cls(model, processor, max_length=max_length, batch_size=batch_size, date=date)

    def __repr__(self):
        return f"Classifier({type(unwrap(self.model)).__name__}, {unwrap(self.model).config.name_or_path!r})"

    def score_many(self, examples):
        """Score many examples.

        Args:
            examples: iterable of `yojo.Example`.

        Returns:
            list of [N] float32 tensors on the CPU, in the order of examples and responses; higher is better.

        Raises:
            TypeError, ValueError: an example that cannot be scored; the message names it.
        """
        return self.passes.score_many(examples)

    def fingerprint(self):
        """All that changes a score, a dict (see `yojo.saving.identity`)."""
        return classifier_fingerprint(self.model, self.processor)

    def _read(self, inputs):
        logits = self.model(**inputs).logits
        count = inputs["input_ids"].shape[0]
        if logits.shape != (count, 1):
            raise RuntimeError(
                f"{type(unwrap(self.model)).__name__} gave logits of shape {list(logits.shape)} for {count} conversations"
            )
        return logits[:, 0]


# ---- checks ----


def _check_model(base):
    name = check_stock(base)
    if _OF_A_CLASS not in name:
        raise ValueError(f"model must be a sequence classifier (AutoModelForSequenceClassification), got a {name}")
    _check_labels(base.config, name)


def _check_labels(config, name):
    if config.num_labels != 1:
        raise ValueError(
            f"{name} has {config.num_labels} labels, and a judge gives one score: a reward model is a classifier with "
            "num_labels=1"
        )


def _check_config(config, path):
    architectures = config.architectures or []
    if architectures and not any(_OF_A_CLASS in name for name in architectures):
        raise ValueError(
            f"{path} holds a {architectures[0]}, no sequence classifier: it has no head to score with, and a random one "
            "would score at random"
        )
    _check_labels(config, path)
