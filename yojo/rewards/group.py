"""`GroupReward`: a reward function for TRL's GRPOTrainer, and whoever calls one as it does; `AsyncGroupReward`, awaited."""

import asyncio
import difflib
import inspect
import threading

from yojo.rewards.gathering import Alone, Exchange, is_spread, whole_groups
from yojo.rewards.groups import with_key
from yojo.rewards.measures import measures
from yojo.rewards.rows import rows_of
from yojo.rewards.scorer import GroupScorer, RewardError, check_int
from yojo.rewards.threads import in_thread


class GroupReward:
    """A reward function that has a judge score whole groups, N completions of one prompt in one pass.

    Rows are grouped by prompt and by the content of images and videos, whatever their order; the groups of a call are packed
    into rows of a token budget and scored together. Where several processes train, each has a slice of the rows: those of a
    group that is split are brought together, scored once, and given back. A call ends with the rewards of all rows or with an
    error, never with a reward in place of one.

    Args:
        judge: anything with `score_many(examples)`, such as a `yojo.RewardModel` (see `yojo.judges.Judge`).
        group_size: completions of a prompt; None: read from the trainer (`num_generations`, in evaluation
            `num_generations_eval`), where it hands over `log_metric`.
        text: function from a completion to the text that is judged, such as the answer without the reasoning in front; by
            default the whole completion, a string or one message of the assistant.
        gather: whether groups may be split over the processes of torch.distributed; None: wherever there are several.
        eos_token_ids: ids one of which ends a completion that is not truncated; None: read from the trainer.
        name: in front of the names of metrics and columns, and the reward's name in the trainer's logs. Two rewards of one trainer
            need two names.
        **options: normalize, empty, truncated, forged, order, seed, retries, deadline, token_budget, as for
            `yojo.rewards.GroupScorer`.

    Raises:
        TypeError, ValueError: an argument that does not fit the above.

    Example:
        >>> reward = yojo.GroupReward(yojo.RewardModel.from_pretrained("my-reward-model"))
        >>> GRPOTrainer(model, reward_funcs=reward, args=GRPOConfig(num_generations=8), train_dataset=dataset).train()
    """

    def __init__(self, judge, *, group_size=None, text=None, gather=None, eos_token_ids=None, name="yojo", **options):
        if group_size is not None and (
            isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1
        ):
            raise ValueError(f"group_size must be an int of at least 1, or None, got {group_size!r}")
        if text is not None and not callable(text):
            raise TypeError(f"text must be a function from a completion to a string, or None, got {text!r}")
        if gather is not None and not isinstance(gather, bool):
            raise TypeError(f"gather must be True, False or None, got {gather!r}")
        if not isinstance(name, str) or not name:
            raise ValueError(f"name must be a string that is not empty, got {name!r}")
        _check_known(options)
        self.scorer = GroupScorer(judge, **options)
        self.group_size, self.text, self.gather, self.name = group_size, text, gather, name
        self.eos_token_ids = None if eos_token_ids is None else _checked_ids(eos_token_ids)
        self.__name__ = name  # how trainers name a reward
        self._state, self._calls, self._exchange, self._lock = None, {}, None, threading.Lock()

    @property
    def judge(self):
        """What scores."""
        return self.scorer.judge

    def __getstate__(self):
        return {**self.__dict__, "_state": None, "_exchange": None, "_lock": None}

    def __setstate__(self, state):
        self.__dict__.update(state, _lock=threading.Lock())

    def __call__(
        self,
        prompts,
        completions,
        completion_ids=None,
        *,
        trainer_state=None,
        log_extra=None,
        log_metric=None,
        **columns,
    ):
        """The rewards of some rows.

        Args:
            prompts: list of R prompts, strings or chat messages, which may hold images.
            completions: list of R completions, strings or lists of one message of the assistant.
            completion_ids: list of R lists of token ids, or None; they tell what is truncated.
            trainer_state: transformers' `TrainerState`, or None: its step is part of what orders are drawn with.
            log_extra, log_metric: the trainer's functions for columns and metrics, or None.
            columns: dict of lists of R values, of which `images`, `image`, `videos` and `video` are read.

        Returns:
            list of R floats, or None where there is no reward to give (see `empty`, `truncated` and `forged`).

        Raises:
            RewardError: there are no rewards: the judge failed, here or in another process.
            TypeError, ValueError: rows that are no whole groups, or cannot be judged.
        """
        exchange = self._begin()
        return self._rewards(
            exchange, prompts, completions, completion_ids, trainer_state, log_extra, log_metric, columns
        )

    def _begin(self):
        """How processes talk. The first call makes it, in each of them."""
        if self.gather is False or not (self.gather or is_spread()):
            return Alone()
        if not is_spread():
            raise ValueError("gather=True, and there is one process: torch.distributed is not initialised")
        if self._exchange is None or not self._exchange.is_current():
            self._exchange = Exchange(self.scorer.deadline)
        return self._exchange

    def _rewards(self, exchange, prompts, completions, completion_ids, trainer_state, log_extra, log_metric, columns):
        trainer = getattr(log_metric, "__self__", None)
        mode = _mode(trainer)

        def read():
            _check_nones(trainer, self.scorer)
            _check_names(trainer, self.name)
            size = self._size(trainer, mode)
            rows = self._rows(trainer, prompts, completions, completion_ids, columns)
            return size, rows, [row.group([row.text]).key for row in rows]

        def told(found):
            size, rows, keys = found
            return size, [(key, row.text, row.truncated) for key, row in zip(keys, rows, strict=True)]

        (_, rows, _), everyone = _agreed(exchange, read, told)
        sizes = {size for size, _ in everyone}
        if len(sizes) > 1:
            raise ValueError(f"processes have groups of different sizes: {sorted(sizes)}")
        wholes = whole_groups([[key for key, _, _ in told] for _, told in everyone], sizes.pop())
        own = {
            n: self._group(whole, rows, everyone, exchange.rank)
            for n, whole in enumerate(wholes)
            if whole.owner == exchange.rank
        }
        draw = self._draw(mode, trainer_state)
        _, found = _agreed(
            exchange,
            lambda: dict(zip(own, self.scorer.score(list(own.values()), draw), strict=True)),
            lambda found: found,
        )
        rewarded = {n: one for part in found for n, one in part.items()}
        if log_metric is not None:
            for metric, value in measures(list(own.values()), [rewarded[n] for n in own]).items():
                log_metric(f"{self.name}/{metric}", value)
        return self._mine(exchange.rank, len(rows), wholes, rewarded, log_extra)

    def _rows(self, trainer, prompts, completions, completion_ids, columns):
        """list of R `yojo.rewards.rows.Row`: what a call's arguments say, each trainer's in its own way."""
        eos = self._eos(trainer, completion_ids)
        return rows_of(prompts, completions, completion_ids, columns, text=self.text, eos_token_ids=eos)

    def _group(self, whole, rows, everyone, rank):
        """A group to score, of which this process has some rows."""
        told = [everyone[other][1][row] for other, row in whole.members]
        row = next(row for other, row in whole.members if other == rank)
        texts, truncated = [text for _, text, _ in told], [flag for _, _, flag in told]
        return with_key(rows[row].group(texts, truncated, id=f"row {row}"), whole.key)

    def _mine(self, rank, count, wholes, rewarded, log_extra):
        rewards, scores, places = [None] * count, [None] * count, [None] * count
        for n, whole in enumerate(wholes):
            for place, (other, row) in enumerate(whole.members):
                if other == rank:
                    one = rewarded[n]
                    rewards[row], scores[row], places[row] = one.rewards[place], one.scores[place], one.places[place]
        if log_extra is not None:
            log_extra(f"{self.name}/score", scores)
            log_extra(f"{self.name}/place", places)
        return rewards

    def _size(self, trainer, mode):
        name = "num_generations_eval" if mode == "eval" else "num_generations"
        found = getattr(trainer, name, None)
        if found is None:
            if self.group_size is None:
                raise ValueError(
                    "how many completions a group has cannot be read from the trainer: set group_size to its num_generations"
                )
            return self.group_size
        if mode != "eval" and self.group_size not in (None, found):
            raise ValueError(
                f"group_size is {self.group_size}, and the trainer's {name} is {found}: leave group_size out"
            )
        return found

    def _eos(self, trainer, completion_ids):
        if completion_ids is None and self.scorer.truncated != "score":
            raise ValueError(f"truncated={self.scorer.truncated!r} needs completion_ids, which tell what is truncated")
        if self.eos_token_ids is not None:
            return self.eos_token_ids
        found = getattr(trainer, "eos_token_ids", None)
        if found is None:
            if self.scorer.truncated != "score":
                raise ValueError(
                    f"truncated={self.scorer.truncated!r}, and the ids that end a completion cannot be read from the trainer: set "
                    "eos_token_ids"
                )
            return None
        pad = getattr(getattr(trainer, "_tokenizer", None), "pad_token_id", None)
        return frozenset(found) | ({pad} if pad is not None else set())

    def _draw(self, mode, trainer_state):
        """What tells this drawing of orders from others: the trainer's step and which call of that step it is."""
        if trainer_state is None:
            return None
        with self._lock:
            if self._state is not trainer_state:  # of another run, whose calls are counted anew
                self._state, self._calls = trainer_state, {}
            step = trainer_state.global_step
            last, count = self._calls.get(mode, (None, 0))
            count = count + 1 if last == step else 0
            self._calls[mode] = step, count
        return [mode, step, count]


class AsyncGroupReward(GroupReward):
    """`GroupReward` to be awaited, for judges behind a network: other rewards of the trainer run meanwhile."""

    async def __call__(
        self,
        prompts,
        completions,
        completion_ids=None,
        *,
        trainer_state=None,
        log_extra=None,
        log_metric=None,
        **columns,
    ):
        """As `GroupReward.__call__`."""
        exchange = self._begin()  # before anything is awaited: every process makes it at the same point
        arguments = prompts, completions, completion_ids, trainer_state, log_extra, log_metric, columns
        return await asyncio.wrap_future(in_thread(self._rewards, exchange, *arguments))


def _checked_ids(found):
    ids = found.tolist() if hasattr(found, "tolist") else found
    if isinstance(ids, (str, bytes)) or not hasattr(ids, "__iter__") or not (ids := list(ids)):
        raise ValueError(f"eos_token_ids must be a list of ids, such as [2], or None, got {found!r}")
    for one in ids:
        check_int("eos_token_ids", one)
    return frozenset(map(int, ids))


def _check_known(options):
    """Refuse an argument that nothing takes, with the one that was meant."""
    known = [*inspect.signature(GroupReward).parameters, *inspect.signature(GroupScorer).parameters]
    known = sorted({*known} - {"judge", "options"})
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise TypeError(f"a reward has no argument {name!r}; {hint}")


def _check_nones(trainer, scorer):
    """TRL adds its rewards up without those that are None: no reward beside one of another function would be a reward of 0."""
    named = [name for name in ("empty", "truncated", "forged") if getattr(scorer, name) == "none"]
    if named and len(getattr(trainer, "reward_funcs", None) or ()) > 1:
        raise ValueError(
            f"{named[0]}='none', and the trainer has other rewards, beside which a reward that is None counts as 0: say 'lowest', or "
            "a number"
        )


def _check_names(trainer, name):
    """Metrics of one name are averaged, and columns put one behind the other, without a word."""
    others = getattr(trainer, "reward_funcs", None) or ()
    if sum(getattr(other, "name", None) == name and isinstance(other, GroupReward) for other in others) > 1:
        raise ValueError(f"the trainer has several rewards with name={name!r}: give each a name of its own")


def _mode(trainer):
    model = getattr(trainer, "model", None)
    return "train" if model is None or model.training else "eval"


def _agreed(exchange, function, told):
    """What a function returns here, and what all processes tell of theirs; if one fails, all do, each with an error."""
    try:
        found = function()
    except Exception as error:
        exchange.all((f"{type(error).__name__}: {error}", None))
        raise
    everyone = exchange.all((None, told(found)))
    for rank, (error, _) in enumerate(everyone):
        if error is not None:
            raise RewardError(f"process {rank} has no rewards: {error}")
    return found, [value for _, value in everyone]
