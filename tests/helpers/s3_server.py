"""A real S3 server on loopback (moto's, in a process of its own), and a proxy before it that makes it fail by rule and count."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Iterator

import pytest

__all__ = ['FaultyProxy', 'Rule', 'S3Server', 'faulty_proxy', 's3_server']

SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address='127.0.0.1', port=int(sys.argv[1]), verbose=False)
server.start()
print('ready', flush=True)
sys.stdin.read()
server.stop()
"""
SLICE_BYTES = 1 << 14


@dataclass
class S3Server:
    """A running server; ``environment`` is what a user would export to reach it."""

    endpoint: str
    bucket: str
    environment: dict[str, str] = field(default_factory=dict)

    def client(self) -> Any:
        """A boto3 client that talks to the server itself, past any proxy."""
        import boto3

        return boto3.client('s3', endpoint_url=self.endpoint, aws_access_key_id='test', aws_secret_access_key='test', region_name='us-east-1')

    def keys(self, prefix: str = '') -> list[str]:
        return sorted(o['Key'] for o in self.client().list_objects_v2(Bucket=self.bucket, Prefix=prefix).get('Contents', []))

    def read(self, key: str) -> bytes:
        return self.client().get_object(Bucket=self.bucket, Key=key)['Body'].read()

    def unfinished_uploads(self) -> list[str]:
        return [u['Key'] for u in self.client().list_multipart_uploads(Bucket=self.bucket).get('Uploads') or []]


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def s3_server(bucket: str = 'runs') -> Iterator[S3Server]:
    """Starts the server with one bucket; ends it, whatever happens, with the block. It dies with this process too, since it reads its standard input."""
    pytest.importorskip('moto', reason="the S3 server of the tests is moto's: pip install 'llm-foundry[dev]'")
    pytest.importorskip('flask_cors', reason="moto's server needs flask and flask-cors: pip install 'llm-foundry[dev]'")
    port = _free_port()
    process = subprocess.Popen([sys.executable, '-c', SERVER, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == 'ready\n', 'the S3 server did not start'
        endpoint = f'http://127.0.0.1:{port}'
        environment = {
            'S3_ENDPOINT_URL': endpoint, 'AWS_ACCESS_KEY_ID': 'test', 'AWS_SECRET_ACCESS_KEY': 'test', 'AWS_DEFAULT_REGION': 'us-east-1', 'AWS_EC2_METADATA_DISABLED': 'true',
            'AWS_CONFIG_FILE': os.devnull, 'AWS_SHARED_CREDENTIALS_FILE': os.devnull,
        }  # fmt: skip
        server = S3Server(endpoint, bucket, environment)
        server.client().create_bucket(Bucket=bucket)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate()


@dataclass
class Rule:
    """What happens to the next ``times`` requests that match.

    Args:
        method: regular expression of HTTP methods.
        path: regular expression, searched in the path with its query.
        status: answer with this status (an S3 error) instead of asking the server.
        cut_after: pass the body of the answer on up to this many bytes, or read as many of a PUT's or half of it, then close the connection.
        delay_s: seconds before the answer.
        hold: read the request and never answer it; the server does not see it.
    """

    method: str
    path: str
    times: int = 1
    status: int | None = None
    cut_after: int | None = None
    delay_s: float = 0.0
    hold: bool = False
    seen: int = 0


class FaultyProxy:
    """Forwards HTTP to ``server`` and applies the first rule that matches and has not been used up."""

    def __init__(self, server: S3Server) -> None:
        self.server = server
        self.rules: list[Rule] = []
        self.requests: list[tuple[str, str]] = []
        self.held = threading.Event()
        self._released = threading.Event()
        self._lock = threading.Lock()
        handler = type('Handler', (_Handler,), {'proxy': self})
        self._http = _QuietServer(('127.0.0.1', 0), handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def environment(self) -> dict[str, str]:
        """As the server's, with the proxy as the endpoint."""
        return {**self.server.environment, 'S3_ENDPOINT_URL': f'http://127.0.0.1:{self._http.server_address[1]}'}

    def add(self, *rules: Rule) -> None:
        with self._lock:
            self.rules += rules

    def rule_for(self, method: str, path: str) -> Rule | None:
        with self._lock:
            self.requests.append((method, path))
            for rule in self.rules:
                if rule.seen < rule.times and re.fullmatch(rule.method, method) and re.search(rule.path, path):
                    rule.seen += 1
                    return rule
        return None

    def hold(self) -> None:
        self.held.set()
        self._released.wait(600)

    def release(self) -> None:
        """Ends the requests that are held, and holds none from now on."""
        self._released.set()

    def close(self) -> None:
        self.release()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


class _QuietServer(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that were killed, or hung up on, are what the proxy is for."""
        if not isinstance(sys.exc_info()[1], ConnectionError | ValueError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    proxy: FaultyProxy

    def log_message(self, *args: Any) -> None:
        """Silent."""

    def _forward(self) -> None:
        rule = self.proxy.rule_for(self.command, self.path)
        if rule is not None and rule.cut_after is not None and self.command in ('PUT', 'POST'):
            self.rfile.read(min(rule.cut_after, int(self.headers.get('Content-Length') or rule.cut_after) // 2))
            self._hang_up()
            return
        if 'continue' in self.headers.get('Expect', '').lower():
            self.send_response_only(100)
            self.end_headers()
        body = self._read_body()
        if rule is not None and rule.hold:
            self.proxy.hold()
            self._hang_up()
            return
        if rule is not None and rule.delay_s:
            time.sleep(rule.delay_s)
        if rule is not None and rule.status is not None:
            self._answer(rule.status, {'Content-Type': 'application/xml'}, _error_body(rule.status))
            return
        host, port = self.proxy.server.endpoint.removeprefix('http://').split(':')
        connection = http.client.HTTPConnection(host, int(port), timeout=60)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ('connection', 'expect', 'transfer-encoding', 'content-length')}
        try:
            connection.request(self.command, self.path, body=body, headers=headers)
            answer = connection.getresponse()
            content = answer.read()
            self._answer(answer.status, dict(answer.getheaders()), content, None if rule is None else rule.cut_after)
        finally:
            connection.close()

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _forward

    def _read_body(self) -> bytes | None:
        if 'chunked' in self.headers.get('Transfer-Encoding', ''):
            parts = []
            while size := int(self.rfile.readline().split(b';')[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return b''.join(parts)
        length = int(self.headers.get('Content-Length') or 0)
        return self.rfile.read(length) if length else None

    def _answer(self, status: int, headers: dict[str, str], content: bytes, cut_after: int | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ('content-length', 'connection', 'transfer-encoding'):
                self.send_header(name, value)
        length = headers.get('Content-Length', str(len(content))) if self.command == 'HEAD' else str(len(content))
        self.send_header('Content-Length', length)
        self.end_headers()
        if self.command == 'HEAD':
            return
        if cut_after is not None and cut_after < len(content):
            self.wfile.write(content[:cut_after])
            self._hang_up()
            return
        for start in range(0, len(content), SLICE_BYTES):
            self.wfile.write(content[start : start + SLICE_BYTES])

    def _hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


def _error_body(status: int) -> bytes:
    code = {503: 'SlowDown', 500: 'InternalError', 403: 'AccessDenied', 404: 'NoSuchKey'}.get(status, 'InternalError')
    return f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>injected</Message></Error>'.encode()


@contextlib.contextmanager
def faulty_proxy(server: S3Server) -> Iterator[FaultyProxy]:
    """A proxy before ``server``, closed with the block."""
    proxy = FaultyProxy(server)
    try:
        yield proxy
    finally:
        proxy.close()


if __name__ == '__main__':  # to try commands by hand: prints the exports and waits
    with s3_server() as started:
        print(json.dumps(started.environment, indent=1), flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
