"""Reading ROS 2 messages out of MCAP files that may be unfinished, damaged or hostile. Needs no ROS installation."""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from simtoreal.envs.errors import DatasetError, require

# Chunks of our own are far smaller; a damaged or hostile length must not exhaust the memory.
LARGEST_RECORD_BYTES = 512 * 1024 * 1024


class Message(NamedTuple):
    """A decoded message: topic, content, and when it arrived and was published (system clock, nanoseconds)."""

    topic: str
    content: Any
    arrived_ns: int
    published_ns: int


class BagReader:
    """Reads an MCAP file from its beginning, as far as it goes.

    Attributes:
        path: the file.
        complete: after reading, whether the file had an end; False for a recorder that was killed.
        damaged: after reading, one line per part that could not be read.
    """

    def __init__(self, path: Path) -> None:
        require("mcap", "ros")
        self.path = path
        self.complete = False
        self.damaged: list[str] = []

    def metadata(self, name: str) -> dict[str, str] | None:
        """Return the first metadata record of this name, if it comes before the messages as our recorder writes it.

        Raises:
            DatasetError: not an MCAP file.
        """
        from mcap.records import Chunk, Message, Metadata

        for record in self._records():
            if isinstance(record, Metadata) and record.name == name:
                return dict(record.metadata)
            if isinstance(record, Chunk | Message):
                return None
        return None

    def messages(self, topics: Collection[str]) -> Iterator[Message]:
        """Yield the messages of ``topics`` in the order of the file.

        Raises:
            DatasetError: not an MCAP file, or a topic is not encoded as ROS 2 does.
        """
        from mcap.exceptions import McapError
        from mcap.records import Channel, Schema
        from mcap.records import Message as MessageRecord
        from mcap_ros2.decoder import DecoderFactory

        factory = DecoderFactory()
        schemas: dict[int, Any] = {}
        decoders: dict[int, tuple[str, Any]] = {}
        for record in self._unpacked():
            if isinstance(record, Schema):
                schemas[record.id] = record
            elif isinstance(record, Channel) and record.topic in topics and record.id not in decoders:
                decoder = factory.decoder_for(record.message_encoding, schemas.get(record.schema_id))
                if decoder is None:
                    raise DatasetError(f"{self.path}: topic {record.topic} does not hold ROS 2 messages (cdr, ros2msg)")
                decoders[record.id] = record.topic, decoder
            elif isinstance(record, MessageRecord) and record.channel_id in decoders:
                topic, decoder = decoders[record.channel_id]
                try:
                    content = decoder(record.data)
                except (McapError, ValueError, IndexError, struct.error) as error:
                    self.damaged.append(f"a message on {topic}: {error}")
                    continue
                yield Message(topic, content, record.log_time, record.publish_time)

    def _unpacked(self) -> Iterator[Any]:
        """Yield records with those inside chunks; a damaged chunk is noted and left out."""
        from mcap.exceptions import McapError
        from mcap.records import Chunk
        from mcap.stream_reader import breakup_chunk

        for record in self._records():
            if not isinstance(record, Chunk):
                yield record
                continue
            try:
                if record.uncompressed_size > LARGEST_RECORD_BYTES:
                    raise ValueError(f"it claims {record.uncompressed_size} bytes")
                inside = list(breakup_chunk(record, validate_crc=True))
            except (McapError, ValueError, RuntimeError, EOFError, struct.error) as error:
                self.damaged.append(f"a chunk of {len(record.data)} bytes: {error}")
                continue
            yield from inside

    def _records(self) -> Iterator[Any]:
        from mcap.exceptions import InvalidMagic, McapError
        from mcap.records import Footer
        from mcap.stream_reader import StreamReader

        try:
            stream = open(self.path, "rb")  # noqa: SIM115 - closed below, the generator may be abandoned
        except OSError as error:
            raise DatasetError(f"cannot read {self.path}: {error.strerror}") from error
        with stream:
            records = StreamReader(stream, emit_chunks=True, record_size_limit=LARGEST_RECORD_BYTES).records
            first = True
            while True:
                try:
                    record = next(records)
                except StopIteration:
                    return
                except InvalidMagic as error:
                    if first:
                        raise DatasetError(f"{self.path} is not an MCAP file.") from error
                    return
                except (McapError, ValueError, EOFError, struct.error) as error:
                    if first:
                        raise DatasetError(f"{self.path} is not an MCAP file ({error}).") from error
                    self.damaged.append(f"the file ends in the middle ({type(error).__name__})")
                    return
                first = False
                self.complete = self.complete or isinstance(record, Footer)
                yield record
