"""Who may produce how much: the arithmetic of the stream's flow control, without sockets or clocks.

`channels` explains the protocol. Here stand the learner's side of it: per sender a window of sequence numbers
(acknowledged <= received <= granted <= acknowledged + credits), and over all paced senders a sliding window
of tickets. A ticket is the right to produce one batch. The window starts at the oldest ticket whose batch is
not yet consumed and holds all that were handed out since, consumed or not; a new one is handed out only while
fewer than `window` are in it. So between a ticket's hand-out and its batch's consumption at most
2 (window - 1) other batches are consumed, however unequal the senders' speeds are. That bounds staleness
without discarding anything.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

Ticket = tuple[str, int, int]  # sender, epoch, sequence


class Arrival(Enum):
    """What a batch's sequence number says about it."""

    NEW = 1
    DUPLICATE = 2
    OUT_OF_ORDER = 3


@dataclass
class Sender:
    """The stream of one sender in one epoch; each sequence number means all batches up to it."""

    name: str
    epoch: int
    paced: bool
    acknowledged: int = 0
    received: int = 0
    granted: int = 0
    connected: bool = True
    last_ticket: int = 0
    consumed: set[int] = field(default_factory=set)

    @property
    def outstanding(self) -> int:
        """Batches that are granted and not yet consumed."""
        return self.granted - self.acknowledged


class CreditLedger:
    """All senders' windows, and the tickets of those that are paced.

    `credits` is the number of unacknowledged batches a sender may have, `window` the width of the ticket
    window. Senders that are not paced (their data does not age: refined terminal states) are bound by their
    credits only.
    """

    def __init__(self, credits: int, window: int) -> None:
        self.credits = credits
        self.window = window
        self.senders: dict[str, Sender] = {}
        # From the oldest ticket whose batch is not consumed, in the order of hand-out: is its batch consumed?
        self._tickets: dict[Ticket, bool] = {}
        self._handed_out = 0

    @property
    def outstanding(self) -> int:
        """Tickets that are handed out and whose batch is not yet consumed."""
        return sum(not consumed for consumed in self._tickets.values())

    def greet(self, name: str, epoch: int, paced: bool, acknowledged: int, sent: int, granted: int) -> Sender | None:
        """The sender that says hello with what it knows of its stream, or None if that cannot be.

        A new epoch starts afresh. A sender that is not known (the learner was restarted) goes on where it
        says it stands: what it still holds unacknowledged, it will send again.
        """
        sender = self.senders.get(name)
        if sender is None or epoch > sender.epoch:
            if granted > acknowledged + self.credits:
                return None
            if sender is not None:
                self._drop_tickets(sender)
            sender = Sender(name, epoch, paced, acknowledged, acknowledged, granted)
            self.senders[name] = sender
        elif epoch < sender.epoch or paced != sender.paced or not sender.received <= sent <= sender.granted:
            return None
        sender.connected = True
        self._add_tickets(sender, range(sender.received + 1, sender.granted + 1))
        return sender

    def disconnect(self, name: str) -> None:
        """Take back the unused tickets of a sender whose connection is gone, until it says hello again."""
        sender = self.senders[name] = self.senders.pop(name)  # the latest to go comes last
        sender.connected = False
        self._drop_tickets(sender)

    def forget_one(self) -> str | None:
        """Forget the sender that has been gone for longest, of those of which nothing is unconsumed; its name, if any.

        Should it come back, it goes on where it says it stands: a batch whose acknowledgement it missed counts twice.
        """
        gone = (s.name for s in self.senders.values() if not s.connected and s.acknowledged == s.received)
        name = next(gone, None)
        if name is not None:
            del self.senders[name]
        return name

    def receive(self, sender: Sender, sequence: int) -> Arrival:
        """Take in a batch's number: only the next one in the sender's order, within its credits, is new."""
        if sequence <= sender.received:
            return Arrival.DUPLICATE
        if sequence > sender.received + 1 or sequence > sender.granted:
            return Arrival.OUT_OF_ORDER
        sender.received = sequence
        self._add_tickets(sender, [sequence])
        return Arrival.NEW

    def consume(self, name: str, epoch: int, sequence: int) -> None:
        """Mark a received batch as consumed, whatever has become of its sender since."""
        if (name, epoch, sequence) in self._tickets:
            self._tickets[name, epoch, sequence] = True
            self._trim()
        sender = self.senders.get(name)
        if sender is None or sender.epoch != epoch or not sender.acknowledged < sequence <= sender.received:
            return
        sender.consumed.add(sequence)
        while sender.acknowledged + 1 in sender.consumed:
            sender.acknowledged += 1
            sender.consumed.remove(sender.acknowledged)

    def grant(self) -> set[str]:
        """Hand out all that may be handed out; returns the senders that got something.

        A ticket goes to the sender with the fewest outstanding batches, and among equals to the one that has
        waited longest.
        """
        lucky: set[str] = set()
        for sender in self.senders.values():
            if not sender.paced and sender.outstanding < self.credits:
                sender.granted = sender.acknowledged + self.credits
                lucky.add(sender.name)
        while self._window_open() and (waiting := self._waiting()):
            sender = min(waiting, key=lambda s: (s.outstanding, s.last_ticket))
            sender.granted += 1
            self._add_tickets(sender, [sender.granted])
            lucky.add(sender.name)
        return lucky

    def blocking(self) -> list[str]:
        """Connected senders that hold tickets for which others wait: worth a look whether they live."""
        if self._window_open() or not self._waiting():
            return []
        return [s.name for s in self.senders.values() if s.paced and s.connected and s.received < s.granted]

    def _window_open(self) -> bool:
        return len(self._tickets) < self.window

    def _waiting(self) -> list[Sender]:
        return [s for s in self.senders.values() if s.paced and s.connected and s.outstanding < self.credits]

    def _add_tickets(self, sender: Sender, sequences: Iterable[int]) -> None:
        for sequence in sequences if sender.paced else ():
            ticket = (sender.name, sender.epoch, sequence)
            if ticket not in self._tickets:
                self._handed_out += 1
                sender.last_ticket = self._handed_out
                self._tickets[ticket] = False

    def _drop_tickets(self, sender: Sender) -> None:
        for sequence in range(sender.received + 1, sender.granted + 1):
            self._tickets.pop((sender.name, sender.epoch, sequence), None)
        self._trim()

    def _trim(self) -> None:
        for ticket, consumed in list(self._tickets.items()):
            if not consumed:
                break
            del self._tickets[ticket]
