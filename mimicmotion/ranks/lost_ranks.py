"""What a rank does where another has ended or is silent: it ends soon, and one of all says in a sentence which it was.

Beside its work each rank awaits a last word of the rank before it, in a ring of all. Of a killed process the system
closes the connections, and that wait fails at once. Of a machine that is gone it does not: there a step's own timeout
ends the wait for it, and the ranks that are left call the roll.
"""

import os
import threading
import time

import torch
from torch.distributed import ProcessGroup, Store

WORD_S = 2.0  # for a rank that was lost to be named, and for whoever has the sentence to say it before all are ended
ROLL_CALL_S = 5.0  # in which every rank that is still there answers
GRACE_S = 20.0  # until a rank whose own collective goes on waiting, as NCCL's does, is ended; torchrun kills after 30
# What gloo and NCCL say where another rank did not answer: the first one to give up closes its connections to the rest.
_OF_THE_NETWORK = ("timed out", "timeout", "connection closed", "connection reset", "broken pipe")
_LOST = "lost"  # the store's key of what was first: "RANK BY WHY", which rank ended, which one says so, and the words


class RankLostError(RuntimeError):
    """Another rank has ended or is silent: which, and what to do; no words where another rank says so."""


class FirstRankError(RuntimeError):
    """The first rank could not do what all wait for."""


class Watch:
    """Over the rank before this one; one on each rank, from the start to `leave` or an error that `explain` is told."""

    def __init__(self, rank: int, world_size: int, group: ProcessGroup, store: Store, *, again: str) -> None:
        """group: gloo's, of all ranks, with a long timeout. again: what to do after a loss, as part of a sentence."""
        self._rank, self._world_size, self._group, self._store, self._again = rank, world_size, group, store, again
        self._is_over = False
        self._listener = threading.Thread(target=self._listen, name="lost ranks", daemon=True)
        self._listener.start()

    def leave(self) -> None:
        """Give the rank after this one its word, and take one: where all is well, on every rank."""
        self._is_over = True
        torch.distributed.send(torch.zeros(1), (self._rank + 1) % self._world_size, self._group)
        self._listener.join(GRACE_S)

    def explain(self, error: BaseException) -> None:
        """Of an error that ends this rank: return where it is its own, and else raise RankLostError."""
        if isinstance(error, FirstRankError):
            time.sleep(WORD_S)
            raise RankLostError from error
        may_be_of_another = isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError)
        has_waited = may_be_of_another and any(word in str(error).lower() for word in _OF_THE_NETWORK)
        if has_waited and not self._is_named() and (silent := self._silent()):
            ranks = ", ".join(map(str, silent))
            self._name(silent[0], f"no word from rank {ranks} of {self._world_size} within parallel.timeout_minutes")
        own = str(error).strip() or type(error).__name__
        lost, by, why = self._name(self._rank, own)
        if lost == self._rank or not (may_be_of_another or why == own):
            return
        self._is_over = True
        if by == self._rank:
            raise RankLostError(f"{why}; {self._again}") from error
        time.sleep(WORD_S)
        raise RankLostError from error

    def _listen(self) -> None:
        before = (self._rank - 1) % self._world_size
        try:
            torch.distributed.recv(torch.zeros(1), before, self._group)
            return
        except RuntimeError:
            _, by, why = self._name(before, self._gone(before))
        time.sleep(GRACE_S)
        if by == self._rank and not self._is_over:
            os.write(2, f"\n{why}; {self._again}\n".encode())
        os._exit(1)

    def _gone(self, rank: int) -> str:
        return f"rank {rank} of {self._world_size} has ended without a word (killed, or out of the host's memory)"

    def _is_named(self) -> bool:
        """Whether a rank that was lost is known, or is soon."""
        until = time.monotonic() + WORD_S
        try:
            while not (is_named := self._store.check([_LOST])) and time.monotonic() < until:
                time.sleep(0.05)
        except torch.distributed.DistError:
            return True
        return is_named

    def _name(self, lost: int, why: str) -> tuple[int, int, str]:
        """Which rank was lost first, this one where none was before; which one says so, and why."""
        try:
            kept = self._store.compare_set(_LOST, "", f"{lost} {self._rank} {why}").decode()
        except torch.distributed.DistError:  # what keeps the store is gone, and that runs beside the first rank
            return 0, 1, self._gone(0)
        first, by, words = kept.split(" ", 2)
        return int(first), int(by), words

    def _silent(self) -> list[int]:
        """The ranks that do not answer."""
        self._store.set(f"here {self._rank}", "")
        time.sleep(ROLL_CALL_S)
        return [rank for rank in range(self._world_size) if not self._store.check([f"here {rank}"])]
