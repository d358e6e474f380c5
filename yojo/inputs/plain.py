"""Responses as plain text: nothing in one becomes a special token, and no other thread's text is tokenised so.

A fast tokenizer of transformers has "split special tokens" as state of the Rust tokenizer that all threads share. What is
tokenised as plain text therefore goes through a copy of it, in which the switch is set once.
"""

import contextlib
import copy
import re
import threading
import weakref

from yojo.inputs.placeholders import placeholder_tokens

_copies = weakref.WeakKeyDictionary()  # tokenizer -> {split special tokens: (what was copied, its state, the copy)}
_lock = threading.Lock()


def forbidden_ids(processor, tokenizer, config=None):
    """Find the ids that plain text must never turn into.

    Args:
        processor: the model's processor, or its tokenizer.
        tokenizer: its tokenizer.
        config: the model's config; or None.

    Returns:
        set of ids: the tokenizer's special tokens, and the placeholders of images, videos and audio. A padding or end
        token of the config that the tokenizer does not have as a special token is an ordinary word, and is not among
        them; nor is a special token of a single character (a padding token "!"), which text cannot be without.
    """
    special = set(special_ids(tokenizer))
    ids = {i for i in special if len(str(tokenizer.convert_ids_to_tokens(i))) > 1}
    vocabulary = getattr(tokenizer, "get_added_vocab", dict)()
    for token in set().union(*placeholder_tokens(processor, config).values()):
        found = vocabulary.get(token)
        ids.add(tokenizer.convert_tokens_to_ids(token) if found is None else found)
    for source in (processor, config):  # features would replace these rows, whatever word they are
        for kind in ("image", "video", "audio"):
            names = (f"{kind}_token_id", f"{kind}_token_index", f"{kind}_patch_id")
            ids.update(getattr(source, name, None) for name in names)
    return {i for i in ids if isinstance(i, int)} - {getattr(tokenizer, "unk_token_id", None)}


def special_ids(tokenizer):
    """The ids of a tokenizer's special tokens, a set."""
    ids = set(getattr(tokenizer, "all_special_ids", ()))
    ids.update(i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special)
    return ids


def known_state(tokenizer):
    """What changes when a tokenizer is given another special token, cheap to ask.

    Words that were there before do not show where they are only flagged special (`add_tokens(..., special_tokens=True)`).
    """
    size = len(tokenizer) if hasattr(tokenizer, "__len__") else None
    return size, tuple(getattr(tokenizer, "all_special_ids", ()))


def plain_ids(tokenizer, text, forbidden):
    """Tokenise text as plain text: nothing in it becomes a special token, a separator or an image placeholder.

    From any thread; the tokenizer is not changed.

    Args:
        tokenizer: a tokenizer of transformers.
        text: str.
        forbidden: set of token ids that must not come out.

    Returns:
        list of ids.

    Raises:
        ValueError: a vocabulary that spells a forbidden token from text that does not contain it.
    """
    backend = private_copy(tokenizer, split_special=True)
    ids, pieces = [], [text]  # the pieces that are left, the next one last
    while pieces:
        piece = pieces.pop()
        if backend is None:
            found, cuts = _cut_by_text(tokenizer, piece, forbidden)
        else:
            found, cuts = _cut_by_offsets(backend, piece, forbidden)
        if cuts:
            pieces += [piece[a:b] for a, b in zip([0, *cuts], [*cuts, len(piece)], strict=True)][::-1]
        else:
            ids += found
    return ids


# An added token that is not flagged special is still matched as a whole: it is cut in two behind its first character, and
# the parts are tokenised by themselves. All of them at once, so that it takes as long as the text is long.


def _cut_by_offsets(backend, text, forbidden):
    """(ids of the text, where to cut it so that no forbidden one comes out)."""
    encoding = backend.encode(text, add_special_tokens=False)
    cuts = []
    if not forbidden.isdisjoint(encoding.ids):
        for i, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if i in forbidden:
                at = text.find(backend.id_to_token(i), start, end)  # the token may have taken blanks around it
                cut = max(at, start) + 1
                if cut >= end:
                    _refuse(text[start:end] or text, [backend.id_to_token(i)])
                cuts.append(cut)
    return encoding.ids, cuts


def _cut_by_text(tokenizer, text, forbidden):
    """The same for a tokenizer that does not say which characters a token came from."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    found = forbidden.intersection(ids)
    tokens = sorted((tokenizer.convert_ids_to_tokens(i) for i in found), key=len, reverse=True)
    long = [re.escape(token) for token in tokens if len(token) > 1]
    cuts = [match.start() + 1 for match in re.finditer("|".join(long), text)] if long else []
    if found and not cuts:
        _refuse(text, tokens)
    return ids, cuts


def _refuse(text, tokens):
    short = text if len(text) <= 60 else f"{text[:60]}..."
    raise ValueError(
        f"{short!r} cannot be tokenised as plain text: {tokens}, which the tokenizer or the model takes for a special token "
        "or a placeholder, come out of it"
    )


def private_copy(tokenizer, split_special):
    """A copy of a tokenizer's Rust tokenizer, without truncation and padding, which are state of all threads, too.

    Args:
        tokenizer: a tokenizer of transformers.
        split_special: whether special tokens in a text are split as its other words are.

    Returns:
        `tokenizers.Tokenizer`; None for a tokenizer in Python, which has no such state.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None) if getattr(tokenizer, "is_fast", False) else None
    if backend is None:
        return None
    state = known_state(tokenizer), _pickled(backend.post_processor)
    with _lock:
        copies = _copies.setdefault(tokenizer, {})
        source, known, made = copies.get(split_special, (None, None, None))
        if source is not backend or known != state:
            import tokenizers

            made = tokenizers.Tokenizer.from_str(backend.to_str())
            made.no_truncation()
            made.no_padding()
            made.encode_special_tokens = split_special
            copies[split_special] = backend, state, made
    return made


def private_tokenizer(tokenizer):
    """A tokenizer of transformers for prompts: no other user of the given one can cut, fill up or split its texts.

    Args:
        tokenizer: a tokenizer of transformers; it is not changed.

    Returns:
        A shallow copy around `private_copy`; a tokenizer in Python itself.
    """
    backend = private_copy(tokenizer, split_special=False)
    if backend is None:
        return tokenizer
    own = copy.copy(tokenizer)
    own._tokenizer = backend
    return own


def _pickled(component):
    """What tells a part of a tokenizer from another, which may be changed in place (`add_bos_token`)."""
    return None if component is None else component.__getstate__()


@contextlib.contextmanager
def named_errors(name):
    """Whatever a tokenizer raises becomes a ValueError that begins with a name."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{name}: {str(error) or type(error).__name__}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust, no Exception
            raise
        raise ValueError(f"{name}: the tokenizer failed: {error}") from error
