"""Why storage has failed, in words: the exceptions of its libraries, as they raise them."""

from __future__ import annotations

import errno
import os
import socket
from typing import Any

import paramiko
import pytest
from botocore import exceptions as botocore
from fsspec.exceptions import FSTimeoutError
from s3fs.errors import translate_boto_error

from orchestrator.errors import CheckpointError, StorageUnavailableError
from orchestrator.storage.reasons import has_expired, is_refused, is_transient, lacks_bucket, reason_of

KEY = paramiko.RSAKey.generate(1024)


def answer(code: str, message: str | None = None, status: int = 403, operation: str = "PutObject") -> BaseException:
    """Return what s3fs raises for an answer of S3's; servers leave out the message, and some the code."""
    response: Any = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error: BaseException = translate_boto_error(botocore.ClientError(response, operation))
    return error


def raised(error: BaseException, *, of: BaseException, suppressed: bool = False) -> BaseException:
    """Return an error as it is when it was raised while another one was handled."""
    try:
        try:
            raise of
        except type(of):
            if suppressed:
                raise error from None
            raise error  # noqa: B904
    except type(error) as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (answer("NoSuchBucket"), "no such bucket (NoSuchBucket to PutObject)"),
        (answer("AccessDenied"), "access denied (AccessDenied to PutObject)"),
        (answer("AccessDenied", "None"), "access denied (AccessDenied to PutObject)"),
        (answer("403", "Forbidden", operation="HeadObject"), "access denied (403 to HeadObject: Forbidden)"),
        (answer("PermanentRedirect", status=301), "the bucket is in another region (PermanentRedirect to PutObject)"),
        (answer("", status=503), "the server is busy (503 to PutObject)"),
        (answer("Unheard", "of"), "the server has refused it (Unheard to PutObject: of)"),
        (raised(PermissionError("x"), of=answer("AccessDenied")), "access denied (AccessDenied to PutObject)"),
        (FileNotFoundError(None), "no such file or folder (FileNotFoundError)"),
        (PermissionError("None"), "access denied (PermissionError)"),
        (EOFError(), "the connection was closed (EOFError)"),
        (FSTimeoutError(), "the server has not answered in time (FSTimeoutError)"),
        (TimeoutError(), "the server has not answered in time (TimeoutError)"),
        (botocore.NoCredentialsError(), "no credentials were found"),
        (botocore.EndpointConnectionError(endpoint_url="http://a"), "the server cannot be reached (EndpointConnection"),
        (botocore.SSLError(endpoint_url="https://a", error="x"), "TLS has failed: look at http:// or https://"),
        (socket.gaierror(-2, "Name or service not known"), "the server cannot be reached (gaierror: [Errno -2] Name"),
        (paramiko.AuthenticationException("Authentication failed."), "access denied, the server does not let us in ("),
        (
            paramiko.BadHostKeyException("host", KEY, KEY),
            "the server's host key is not the one in known_hosts (BadHost",
        ),
        (paramiko.PasswordRequiredException("Private key file is encrypted"), "the key file has a passphrase ("),
        (OSError("Failure"), "the server says no more than Failure, as with a full disk"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a"), "OSError: [Errno 28] No space left on device: '/a'"),
        (NotImplementedError(), "this storage cannot do that (NotImplementedError)"),
        (RuntimeError(), "RuntimeError, without a message"),
        (CheckpointError("in words already"), "in words already"),
    ],
)
def test_each_is_told_in_words(error: BaseException, words: str) -> None:
    assert reason_of(error).startswith(words)
    assert "None" not in reason_of(error)


def test_a_page_is_one_short_line_and_secrets_are_left_out() -> None:
    page = botocore.ClientError({"Error": {"Code": "502", "Message": "<html>\n" + "<p>\n" * 900}}, "GetObject")
    assert "\n" not in reason_of(page)
    assert len(reason_of(page)) < 500
    said = reason_of(ValueError("https://me:s3cr3t@host/x?sig=s3cr3t&X-Amz-Security-Token=s3cr3t%2B and sv=1"))
    assert "s3cr3t" not in said
    assert said.endswith("and sv=1")


def test_what_may_be_put_right_by_other_credentials_is_known() -> None:
    expired = [
        answer("ExpiredToken", status=400),
        answer("InvalidAccessKeyId"),
        answer("AccessDenied", "token expired"),
    ]
    for error in (*expired, botocore.NoCredentialsError()):
        assert has_expired(error)
        assert is_transient(error)
        assert is_refused(raised(StorageUnavailableError("x"), of=error))
    denied = answer("AccessDenied")
    assert is_refused(denied)
    assert not has_expired(denied)
    assert not is_transient(denied)
    assert not is_refused(answer("SlowDown", status=503))
    assert not is_refused(raised(OSError("another"), of=denied, suppressed=True))


def test_a_bucket_that_is_missing_is_told_from_a_file() -> None:
    assert lacks_bucket(answer("NoSuchBucket"))
    assert not lacks_bucket(answer("NoSuchKey"))


def test_an_exception_that_is_its_own_cause_is_judged_as_well() -> None:
    error = ConnectionResetError("reset")
    error.__cause__ = error
    assert is_transient(error)
    assert "reset" in reason_of(error)
