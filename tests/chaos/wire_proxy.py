"""A TCP proxy between a client and its workers that harms what passes, as it is told on stdin.

It runs in the client's network namespace, whose firewall sends it all connections; its own bear a mark that the
firewall lets through. It cannot read what passes, which is TLS, nor does it have to.

A command is one JSON object a line: `host`, whose connections are harmed from now on, and how: `delay_s` holds all
back, either way, for so long; `byte_s` lets one byte pass every so often; `flip` turns one bit of the next thing that
the worker says. A command without any of them ends the harm. Each is answered by a line.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import sys
from collections import defaultdict
from dataclasses import dataclass

PORT = 6000
MARK = 0x51
READ_BYTES = 1 << 16
SO_ORIGINAL_DST = 80  # of netfilter: where a redirected connection was to go


@dataclass
class Harm:
    """What happens to what passes to and from one host."""

    delay_s: float = 0.0
    byte_s: float = 0.0
    flip: bool = False


HARMS: defaultdict[str, Harm] = defaultdict(Harm)


def original_address(sock: socket.socket) -> tuple[str, int]:
    port, packed = struct.unpack_from(">2xH4s", sock.getsockopt(socket.SOL_IP, SO_ORIGINAL_DST, 16))
    return socket.inet_ntoa(packed), port


async def connect(address: tuple[str, int]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, MARK)
    sock.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(sock, address)
    except OSError:
        sock.close()
        raise
    return await asyncio.open_connection(sock=sock)


def flipped(data: bytes) -> bytes:
    """With one bit turned, in its last byte: inside what TLS protects, and not in the length before it."""
    return data[:-1] + bytes([data[-1] ^ 1])


class Way:
    """One direction of a connection."""

    def __init__(self, host: str, source: asyncio.StreamReader, target: asyncio.StreamWriter, *, down: bool) -> None:
        self._host = host
        self._source = source
        self._target = target
        self._down = down
        self._under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as both:
            both.create_task(self._take())
            both.create_task(self._deliver())

    async def _take(self) -> None:
        loop = asyncio.get_running_loop()
        data = b" "
        while data:
            try:
                data = await self._source.read(READ_BYTES)
            except OSError:
                data = b""
            self._under_way.put_nowait((loop.time() + HARMS[self._host].delay_s, data))

    async def _deliver(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due, data = await self._under_way.get()
            await asyncio.sleep(max(0.0, due - loop.time()))
            if not data:
                self._target.write_eof()
                return
            harm = HARMS[self._host]
            if harm.flip and self._down:
                harm.flip, data = False, flipped(data)
            while harm.byte_s and data:
                self._target.write(data[:1])
                data = data[1:]
                await asyncio.sleep(harm.byte_s)
                harm = HARMS[self._host]
            self._target.write(data)
            await self._target.drain()


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    address = original_address(writer.get_extra_info("socket"))
    writers = [writer]
    try:
        with contextlib.suppress(OSError, ExceptionGroup):  # who breaks one side off has broken off the other
            there_reader, there_writer = await connect(address)
            writers.append(there_writer)
            up = Way(address[0], reader, there_writer, down=False)
            down = Way(address[0], there_reader, writer, down=True)
            async with asyncio.TaskGroup() as both:
                both.create_task(up.run())
                both.create_task(down.run())
    finally:
        for each in writers:
            each.transport.abort()


async def main() -> None:
    commands = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    async with await asyncio.start_server(serve, "127.0.0.1", PORT):
        print("ready", flush=True)
        while line := await commands.readline():
            command = json.loads(line)
            host = command.pop("host")
            HARMS[host] = Harm(**command)
            print("done", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
