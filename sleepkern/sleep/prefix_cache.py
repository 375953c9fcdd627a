"""A store of what a model carries after known prefixes, for requests that start alike."""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from sleepkern.integrations.transformers import RollbackCache

KeysValues = list[tuple[Tensor, Tensor]]


class PrefixHit(NamedTuple):
    """What `PrefixCache.lookup` found.

    cache   a cache of the model for this request alone, which has read the first `length` tokens
    length  a multiple of `every`, and less than the number of tokens; 0 where nothing is known
    """

    cache: RollbackCache
    length: int


class _Node:
    """`every` tokens after those of its parent: keys and values, and what the recurrent layers carry after them."""

    def __init__(self, parent: _Node | None, key: bytes, keys_values: KeysValues) -> None:
        self.parent, self.key, self.keys_values = parent, key, keys_values
        self.children: dict[bytes, _Node] = {}
        self.snapshots: list[Any] | None = None
        self.bytes = len(key) + _bytes(t for pair in keys_values for t in pair)

    def path(self) -> list[_Node]:
        """The nodes from the first tokens to this one."""
        found, node = [], self
        while node.parent is not None:
            found.append(node)
            node = node.parent
        return found[::-1]


class PrefixCache:
    """What a patched hybrid model carries after prefixes that it has read, shared by all requests and threads.

    A recurrent state stands for one prefix and no shorter one, so the model's caches keep their states after every
    `every` tokens while they read and generate; `insert` stores these, with the keys and values between them. `lookup`
    gives the longest known prefix as a cache of its own: it shares the recurrent states until it decodes, and copies
    keys and values. Tokens are compared one by one. Beyond `max_bytes`, states that were not used for the longest time
    go first, and keys and values that lead to no state with them.

        cache, known = prefixes.lookup(ids)
        out = model.generate(ids, past_key_values=cache)
        prefixes.insert(out, cache)

    The weights must not change; `clear` forgets everything.

    Args:
        model: a hybrid model of transformers that `patch` has replaced, whose attention keeps all keys and values.
        max_bytes: bytes of all stored tensors and tokens, at least 1.
        every: tokens between two stored states, at least 1; default 256. Every stored state takes the memory of all
            recurrent layers, and a hit leaves up to `every` known tokens to be read again.

    Raises:
        TypeError: an argument of another type.
        ValueError: a model that is not patched or has no recurrence, or a number out of range.
    """

    def __init__(self, model: nn.Module, max_bytes: int, every: int = 256) -> None:
        for name, x in (("max_bytes", max_bytes), ("every", every)):
            if isinstance(x, bool) or not isinstance(x, int):
                raise TypeError(f"{name}: got {x!r}; expected a whole number")
            if x < 1:
                raise ValueError(f"{name}: got {x}; expected at least 1")
        from sleepkern.integrations.transformers import RollbackCache

        self.model, self.max_bytes, self.every = model, max_bytes, every
        self._empty = RollbackCache(model, every=every)
        self._empty.attention_layers()
        self._lock = threading.Lock()
        self.clear()

    def __len__(self) -> int:
        """The number of prefixes that `lookup` can find."""
        return len(self._used)

    def __repr__(self) -> str:
        return (
            f"PrefixCache({type(self.model).__name__}, max_bytes={self.max_bytes}, every={self.every}): {len(self)} "
            f"prefixes, {self.bytes} bytes"
        )

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._root = _Node(None, b"", [])
            self._used: OrderedDict[int, _Node] = OrderedDict()  # nodes with states by id, the last used one last
            self.bytes = 0

    def lookup(self, ids: Any) -> PrefixHit:
        """The longest known prefix that leaves a token to be read; an empty cache where nothing is known.

        Args:
            ids: the tokens of one request: integers [T] or [1,T], or a list of them.

        Raises:
            TypeError, ValueError: other ids.
        """
        tokens = _tokens(ids)
        cache = self._empty.copy()
        with self._lock:
            found: _Node | None = None
            for node in self._known(tokens, len(tokens) - 1):
                found = node if node.snapshots is not None else found
            if found is None:
                return PrefixHit(cache, 0)
            self._used.move_to_end(id(found))
            path, snapshots = found.path(), found.snapshots
        assert snapshots is not None
        pieces = zip(*(node.keys_values for node in path), strict=True)
        keys_values = [(torch.cat([k for k, _ in x], dim=2), torch.cat([v for _, v in x], dim=2)) for x in pieces]
        return PrefixHit(cache.carry(snapshots, keys_values), len(path) * self.every)

    def insert(self, ids: Any, cache: RollbackCache) -> int:
        """Store what a cache carries after each `every` tokens; the cache can go on.

        Args:
            ids: the tokens that the cache has read, integers [T] or [1,T] or a list; later ones, such as the last one
                that was generated, are left out.
            cache: one that `lookup` of this PrefixCache gave.

        Returns:
            The number of prefixes that were not known before.

        Raises:
            TypeError, ValueError: other ids, fewer than the cache has read, or another cache.
        """
        tokens = _tokens(ids)
        self._check_cache(cache)
        length = cache.get_seq_length()
        if len(tokens) < length:
            raise ValueError(f"ids: got {len(tokens)} tokens; expected at least the {length} that the cache has read")
        marks, new = cache.take_marks(), 0
        with self._lock:
            node = self._root
            for end in range(self.every, length + 1, self.every):
                key = tokens[end - self.every : end].tobytes()
                child = node.children.get(key)
                if child is None:
                    child = node.children[key] = _Node(node, key, cache.keys_values(end - self.every, end))
                    self.bytes += child.bytes
                node = child
                if end in marks and node.snapshots is None:
                    self._store(node, marks[end])
                    new += 1
            self._prune(node)
            while self.bytes > self.max_bytes and self._used:
                self._evict()
        return new

    def _check_cache(self, cache: Any) -> None:
        if getattr(cache, "model", lambda: None)() is not self.model or cache.every != self.every:
            raise ValueError(
                f"cache: got a {type(cache).__name__} of another model or another `every`; expected one that lookup of "
                "this PrefixCache gave"
            )
        if cache.rows > 1:
            raise ValueError(f"cache: got {cache.rows} rows; expected one request")

    def _known(self, tokens: array[int], most: int) -> Iterator[_Node]:
        """The nodes of the first tokens, up to `most` of them."""
        node = self._root
        for end in range(self.every, most + 1, self.every):
            child = node.children.get(tokens[end - self.every : end].tobytes())
            if child is None:
                return
            node = child
            yield node

    def _store(self, node: _Node, snapshots: list[Any]) -> None:
        node.snapshots = snapshots
        self.bytes += _bytes(t for s in snapshots for t in s[1:])
        self._used[id(node)] = node

    def _evict(self) -> None:
        """Forget the state that was not used for the longest time."""
        _, node = self._used.popitem(last=False)
        assert node.snapshots is not None
        self.bytes -= _bytes(t for s in node.snapshots for t in s[1:])
        node.snapshots = None
        self._prune(node)

    def _prune(self, node: _Node) -> None:
        """Forget the keys and values of nodes that lead to no state, from this one upwards."""
        while node.parent is not None and node.snapshots is None and not node.children:
            del node.parent.children[node.key]
            self.bytes -= node.bytes
            node = node.parent


def _tokens(ids: Any) -> array[int]:
    """The tokens of one request."""
    if isinstance(ids, Tensor):
        if ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8):
            raise TypeError(f"ids: got {ids.dtype}; expected integers")
        if ids.ndim > 2 or ids.ndim == 0 or (ids.ndim == 2 and ids.shape[0] != 1):
            raise ValueError(f"ids: got shape {list(ids.shape)}; expected [T] or [1,T], one request")
        return array("q", ids.flatten().tolist())
    if not isinstance(ids, Sequence) or isinstance(ids, (str, bytes)):
        raise TypeError(f"ids: got a {type(ids).__name__}; expected integers [T] or [1,T], or a list of them")
    wrong = next((x for x in ids if isinstance(x, bool) or not isinstance(x, int)), None)
    if wrong is not None:
        raise TypeError(f"ids: got a {type(wrong).__name__} among them; expected integers")
    return array("q", ids)


def _bytes(tensors: Any) -> int:
    return sum(t.nbytes for t in tensors if t is not None)
