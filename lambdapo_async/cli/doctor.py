"""`lambdapo doctor URL`: is this Redis set up for a run?"""

import contextlib

import redis
import typer

from lambdapo_async.broker.client import words_of
from lambdapo_async.broker.connection import BrokerRefusedError, connect, redact
from lambdapo_async.broker.doctor import examine
from lambdapo_async.errors import BrokerUnreachableError

_TIMEOUT_S = 5.0


def diagnose(url: str, *, max_bytes: int) -> bool:
    """Print every finding; whether all of them are right.

    Raises:
        BrokerUnreachableError: nobody answers there.
        BrokerRefusedError: somebody who does not let us in.
    """
    with contextlib.closing(connect(url, timeout_s=_TIMEOUT_S)) as client:
        try:
            findings = examine(client, url, max_bytes=max_bytes)
        except (redis.AuthenticationError, redis.ResponseError) as error:
            raise BrokerRefusedError(
                f"{redact(url)}: {words_of(error)}: check user, password and database of the URL"
            ) from error
        except (redis.ConnectionError, redis.TimeoutError) as error:
            question = "does it run, with TLS at this port?" if url.startswith("rediss") else "does it run?"
            raise BrokerUnreachableError(f"{redact(url)} did not answer: {words_of(error)}; {question}") from error
    for finding in findings:
        typer.echo(str(finding))
    return all(finding.problem is None for finding in findings)
