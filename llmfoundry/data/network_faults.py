"""Which errors of a network are worth another attempt, and the attempts.

A bucket that answers 503, a connection cut in the middle of a body or a name server that is away for a moment must not end a run of weeks; a wrong key must end it at once. The clients
(botocore, google, oci, libcloud, aiohttp ...) each have their own classes for both and wrap them in one another, so errors are judged by HTTP status and class name along the whole
chain of causes, and none of these libraries is imported here.
"""

from __future__ import annotations

import errno
import logging
import random
import socket
import time
from typing import Any, Callable, Iterator, TypeVar
from urllib.parse import urlparse

__all__ = ['error_code', 'explain', 'http_status', 'is_transient', 'with_retries']

log = logging.getLogger(__name__)
T = TypeVar('T')

TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504, 509})
# S3 gives some of its "try again" answers with status 400.
TRANSIENT_CODES = frozenset({
    'BandwidthLimitExceeded', 'BadDigest', 'IncompleteBody', 'InternalError', 'PriorRequestNotComplete', 'RequestLimitExceeded', 'RequestThrottled', 'RequestTimeout', 'ServiceUnavailable',
    'SlowDown', 'Throttling', 'ThrottlingException', 'TooManyRequestsException', 'XAmzContentChecksumMismatch',
})  # fmt: skip
TRANSIENT_CLASSES = frozenset({
    'BadStatusLine', 'ChunkedEncodingError', 'ClientConnectionError', 'ClientConnectorError', 'ClientOSError', 'ClientPayloadError', 'ConnectTimeout', 'ConnectTimeoutError', 'ConnectionClosedError',
    'EndpointConnectionError', 'FSTimeoutError', 'HTTPClientError', 'IncompleteRead', 'IncompleteReadError', 'MaxRetryError', 'NameResolutionError', 'NewConnectionError', 'ObjectStoreTransientError',
    'ProtocolError', 'ProxyConnectionError', 'ReadTimeout', 'ReadTimeoutError', 'ResponseStreamingError', 'RetriesExceededError', 'RetryError', 'ServerDisconnectedError', 'TransferRetryError',
})  # fmt: skip
TRANSIENT_ERRNO = frozenset({
    errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETRESET, errno.ENETUNREACH, errno.EPIPE, errno.ETIMEDOUT,
})  # fmt: skip

SETTINGS = {
    's3': 'S3_ENDPOINT_URL (where the server is) and the credentials AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN or ~/.aws',
    'gs': 'GCS_KEY and GCS_SECRET, or GOOGLE_APPLICATION_CREDENTIALS',
    'oci': 'OCI_CONFIG_FILE',
    'azure': 'AZURE_ACCOUNT_NAME and AZURE_ACCOUNT_ACCESS_KEY',
    'dbfs': 'DATABRICKS_HOST and DATABRICKS_TOKEN',
}
NO_CREDENTIALS = frozenset({'NoCredentialsError', 'PartialCredentialsError', 'DefaultCredentialsError', 'CredentialRetrievalError', 'TokenRetrievalError'})
CLIENTS = frozenset({'botocore', 'boto3', 'google', 'oci', 'libcloud'})


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, and those it came from, outermost first."""
    seen: set[int] = set()
    waiting: list[Any] = [error]
    while waiting:
        here = waiting.pop(0)
        if not isinstance(here, BaseException) or id(here) in seen:
            continue
        seen.add(id(here))
        yield here
        waiting += [here.__cause__ or here.__context__, getattr(here, 'last_exception', None)]


def http_status(error: BaseException) -> int | None:
    """The HTTP status that an error of any client carries, or None."""
    for e in _chain(error):
        response = getattr(e, 'response', None)
        values = [
            response.get('ResponseMetadata', {}).get('HTTPStatusCode') if isinstance(response, dict) else getattr(response, 'status_code', None),
            getattr(e, 'code', None), getattr(e, 'status', None), error_code(e, follow=False),
        ]  # fmt: skip
        for value in values:
            number = int(value) if isinstance(value, str) and value.isdigit() else value
            if isinstance(number, int) and 100 <= number < 600:
                return int(number)
    return None


def error_code(error: BaseException, follow: bool = True) -> str | None:
    """S3's name of an error (``NoSuchBucket``), or None."""
    for e in _chain(error) if follow else [error]:
        response = getattr(e, 'response', None)
        if isinstance(response, dict) and isinstance(response.get('Error'), dict):
            return response['Error'].get('Code')
    return None


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed in a moment: the server is busy or out of order, or the connection failed. A full disk, a missing object or a refused key is not."""
    if error_code(error) in TRANSIENT_CODES:
        return True
    status = http_status(error)
    if status is not None:
        return status in TRANSIENT_STATUS
    return any(_connection_failed(e) for e in _chain(error))


def _connection_failed(error: BaseException) -> bool:
    names = {cls.__name__ for cls in type(error).__mro__}
    if 'SSLError' in names:
        return 'CERTIFICATE_VERIFY_FAILED' not in str(error)
    if isinstance(error, ConnectionError | TimeoutError | socket.gaierror) or names & TRANSIENT_CLASSES:
        return True
    return isinstance(error, OSError) and error.errno in TRANSIENT_ERRNO


def explain(error: BaseException, uri: str, setting: str, attempts: int | None = None) -> str | None:
    """What is wrong with a store and which setting is to be looked at; None if the error has nothing to do with the store (a full local disk, say).

    Args:
        error: of any client.
        uri: of the folder or object that was asked for.
        setting: the config key that holds it.
        attempts: how often it was tried, where that is known.
    """
    place = urlparse(uri)
    scheme, bucket = place.scheme or 'file', place.netloc.rpartition('@')[2]
    settings = f'Look at {SETTINGS[scheme]}.' if scheme in SETTINGS else f'Look at the address and credentials of {scheme}://.'
    cause = str(error).partition('\n')[0]
    status, code = http_status(error), error_code(error)
    if is_transient(error):
        tried = f' (given up after {attempts} attempts)' if attempts else ''
        return f'{cause}{tried}. Is the server reachable? {settings}'
    if type(error).__name__ in NO_CREDENTIALS or 'credentials' in cause.lower():
        return f'there are no usable credentials ({cause}). {settings}'
    if status in (401, 403) or isinstance(error, PermissionError):
        return f'access is refused ({code or status or cause}) for bucket {bucket!r}. {settings}'
    if code == 'NoSuchBucket' or (status == 404 and not isinstance(error, FileNotFoundError)):
        return f'bucket {bucket!r} does not exist at this address. Correct {setting} or create the bucket. {settings}'
    if status is not None or isinstance(error, ValueError) or type(error).__module__.partition('.')[0] in CLIENTS:
        return f'{cause}. {settings}'
    return None


def with_retries(function: Callable[[], T], what: str, *, attempts: int = 8, first_pause_s: float = 1.0, longest_pause_s: float = 60.0) -> T:
    """Calls ``function`` until it succeeds, fails for good, or has been tried ``attempts`` times.

    Pauses double from ``first_pause_s`` up to ``longest_pause_s``, each shortened by a random part up to a half, so that the ranks of a run do not come back together. The defaults wait
    about two minutes in all.

    Args:
        function: the call; must be safe to repeat.
        what: what it does, for the log.
    """
    for attempt in range(1, attempts + 1):
        try:
            return function()
        except Exception as e:  # judged below; what is not a fault of the network goes on at once
            if attempt == attempts or not is_transient(e):
                raise
            cause = f'{type(e).__name__}: {str(e).partition(chr(10))[0]}'
        pause_s = min(longest_pause_s, first_pause_s * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)
        log.warning('%s failed (attempt %d of %d): %s. Trying again in %.1f s.', what, attempt, attempts, cause, pause_s)
        time.sleep(pause_s)
    raise ValueError(f'attempts must be at least 1, not {attempts}')
