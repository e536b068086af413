"""The stream from actors and refiners to the learner: ROUTER and DEALER under a small windowed protocol.

The protocol
    Every sender numbers its batches 1, 2, 3, ... within its epoch (its restart count). A `credit` from the
    learner states three cumulative numbers of that count: `acknowledged` (consumed up to here), `received`
    (arrived without a gap up to here) and `granted` (may be produced up to here), and in `policy_version` the
    oldest weights that the next batch may be made with. A `hello` from the sender states what it knows of
    them; it is sent at the start, and every second while the sender waits. Each credit answers the latest
    hello by number.

Nothing acknowledged is lost
    A sender keeps a batch until it is acknowledged, and the learner acknowledges after `release`, which it
    calls once the batch is used or stored. A connection that breaks may swallow batches in flight. On one
    connection a hello arrives after all that was sent before it, so a credit that answers it with `received`
    below what had been sent names what was lost, and the sender sends that again. (Where a batch only waits
    to be read from the old connection, the copy is a duplicate.) Credits carry totals, not increments: a lost
    or repeated one changes nothing that the next one does not mend.

Nothing is inserted twice
    The learner takes from each (sender, epoch) only the batch numbered `received + 1`. What it has already is
    a duplicate, what leaves a gap is dropped and comes again in order. A process that is started again has a
    new epoch; batches of its former life that have arrived remain good data, and messages from it are
    refused.

Memory is bounded
    A sender holds at most `credits` unacknowledged batches, since granted <= acknowledged + credits; the
    learner drops a batch beyond what it granted. So the learner holds at most `credits` batches per sender,
    whatever their relative speeds, and sockets drop a frame above `max_message_bytes` before it takes memory.
    High-water marks alone would not do: every connection buffers several messages on either side.

Large batches are not copied through the socket
    Where both ends are processes of this machine, the hello offers memory of the sender's, which the learner maps;
    the credit says whether it could (see `shared_memory`). Then what is sent of a batch is its header and where its
    tensors are. They are checked as those that come in frames, and nothing of the protocol changes, but that what the
    learner takes is its own only until it releases it.

Nobody waits for a thread of the learner's, nor for its updates
    The calls of `StreamServer` receive and answer on the way: a credit leaves with the `release` that it follows from.
    While nobody calls, as in a long update, a thread does so twenty times a second.

Staleness is bounded, and nothing hangs on the dead
    Trajectories need a ticket from one window over all actors (see `credits`). A ticket held by a process
    whose connection is gone is taken back within half a second or so and given to another; a sender that is only
    cut off gets its own back with its next hello. All waits have a time-out, all sockets a bounded linger.
"""

from driftstream.buffers.stream_client import StreamClient
from driftstream.buffers.stream_config import SeedRequest, StreamConfig, StreamError
from driftstream.buffers.stream_server import StreamServer

__all__ = ["SeedRequest", "StreamClient", "StreamConfig", "StreamError", "StreamServer"]
