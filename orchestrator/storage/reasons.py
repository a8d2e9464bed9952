"""Why storage has failed, whichever library was asked: in words, never empty and without a secret; and as our errors.

An answer of S3 is known by its code and not by its message: some servers send none, and s3fs makes "None" of that.
Imports none of those libraries: their exceptions are known by name.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from orchestrator.errors import CheckpointError, StorageUnavailableError, UserError

_MAX_CHARACTERS = 300  # of a message: some are a whole page of HTML

_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
_UNKNOWN_KEY = {"InvalidAccessKeyId", "InvalidClientTokenId", "UnrecognizedClientException", "InvalidToken"}
# Source: https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html; a number where an answer has no body
_ANSWERS = {
    "NoSuchBucket": "no such bucket",
    **dict.fromkeys(("NoSuchKey", "NoSuchUpload", "NoSuchVersion", "404"), "no such file"),
    **dict.fromkeys(("AccessDenied", "AllAccessDisabled", "AccountProblem", "InvalidObjectState"), "access denied"),
    **dict.fromkeys(("403", "401", "405", "MethodNotAllowed", "Forbidden"), "access denied"),
    "SignatureDoesNotMatch": "access denied, the secret key is wrong",
    **dict.fromkeys(_UNKNOWN_KEY, "access denied, the server does not know this access key or token"),
    **dict.fromkeys(_EXPIRED, "the credentials have expired"),
    "RequestTimeTooSkewed": "this machine's clock differs too much from the server's, set it",
    **dict.fromkeys(("PermanentRedirect", "TemporaryRedirect", "301", "307"), "the bucket is in another region"),
    **dict.fromkeys(("AuthorizationHeaderMalformed", "IllegalLocationConstraintException"), "the region is wrong"),
    **dict.fromkeys(("SlowDown", "ServiceUnavailable", "Throttling", "429", "503"), "the server is busy"),
    "InternalError": "the server has failed",
    **dict.fromkeys(("500", "502", "504"), "the server has failed, or is no S3 server: look at the address"),
    **dict.fromkeys(("QuotaExceeded", "XMinioStorageFull", "507"), "no room is left"),
    "InvalidBucketName": "no bucket can have this name",
    "KeyTooLongError": "the path is too long",
    "400": "the server has refused the request: credentials that have expired, or another region",
    **dict.fromkeys(("NotImplemented", "501"), "the server cannot do that"),
}
_UNREACHABLE = "the server cannot be reached"
_LATE = "the server has not answered in time"
_TLS = "TLS has failed: look at http:// or https:// in the address, and at the certificate"
_EXCEPTIONS = {
    # botocore
    "NoCredentialsError": "no credentials were found in the environment, a profile, storage_options or the machine",
    "PartialCredentialsError": "the credentials are not complete",
    **dict.fromkeys(("CredentialRetrievalError", "ConfigParseError"), "the credentials cannot be read"),
    **dict.fromkeys(("UnauthorizedSSOTokenError", "TokenRetrievalError", "SSOTokenLoadError"), "the login has expired"),
    "ResponseParserError": "the answer is not one of S3: is an S3 server at this address, by http:// or https://?",
    **dict.fromkeys(("EndpointConnectionError", "ConnectTimeoutError", "ClientConnectorError"), _UNREACHABLE),
    **dict.fromkeys(("NoValidConnectionsError", "gaierror", "ConnectionRefusedError"), _UNREACHABLE),
    **dict.fromkeys(("ReadTimeoutError", "FSTimeoutError", "TimeoutError", "ServerTimeoutError"), _LATE),
    **dict.fromkeys(("SSLError", "ClientConnectorCertificateError", "ClientConnectorSSLError"), _TLS),
    # paramiko
    **dict.fromkeys(
        ("AuthenticationException", "BadAuthenticationType"), "access denied, the server does not let us in"
    ),
    "PasswordRequiredException": "the key file has a passphrase",
    "BadHostKeyException": "the server's host key is not the one in known_hosts",
    "EOFError": "the connection was closed",
    # Python
    "FileNotFoundError": "no such file or folder",
    "PermissionError": "access denied",
    "NotADirectoryError": "not a folder",
    "IsADirectoryError": "a folder",
    "FileExistsError": "there is something in its place",
    "NotImplementedError": "this storage cannot do that",
}
_UNUSABLE = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ConfigParseError"}
_UNUSABLE |= {"UnauthorizedSSOTokenError", "TokenRetrievalError", "SSOTokenLoadError"}
_REFUSED = {"400", "401", "403", "AccessDenied", "AllAccessDisabled", "Forbidden", "SignatureDoesNotMatch"}
_REFUSED |= {"MethodNotAllowed", "405"}
_LASTING = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG}
_SECRETS = (
    (re.compile(r"(://)[^/@\s]*:[^/@\s]*@"), r"\1"),  # a password in an address
    (re.compile(r"([?&](?:sig|token|signature|password|X-Amz-[\w-]+)=)[^&\s'\"]+", re.IGNORECASE), r"\1..."),
)


def reason_of(error: BaseException | None) -> str:
    """Return in words why storage has failed; in brackets what its library says."""
    if isinstance(error, UserError):  # ours, in words already
        return str(error)
    for each in _chain(error):
        if code := _code(each):
            return _of_answer(each, code)
    for each in _chain(error):
        if words := _known(each):
            return words
    return _unknown(error)


@contextmanager
def translated(what: str, to: type[UserError] | None = None, advice: str = "") -> Iterator[None]:
    """Raise an exception of a storage library as one of ours. `what` begins its message, `advice` ends it.

    to: the class. Default: StorageUnavailableError if the fault may pass, else CheckpointError.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # every storage library has exceptions of its own
        kind = to or (StorageUnavailableError if is_transient(error) else CheckpointError)
        raise kind(f"{what}: {reason_of(error)}{f'; {advice}' if advice else ''}") from error


def is_transient(error: BaseException) -> bool:
    """Return whether a fault may pass by itself. Missing permissions, lack of room and our own bugs do not.

    A missing folder may be there in the next attempt, and so may a multipart upload that the server has forgotten.
    SFTP says "Failure" to a full disk as to much else, so we retry that as well. Somebody may have renewed credentials
    that have expired.
    """
    if has_expired(error):
        return True
    for each in _chain(error, with_contexts=False):
        if isinstance(each, (PermissionError, NotADirectoryError, IsADirectoryError)):
            return False
        if isinstance(each, OSError) and each.errno in _LASTING:
            return False
    fault = error.__cause__ or error if isinstance(error, UserError) else error
    return isinstance(fault, Exception) and not isinstance(fault, (TypeError, AttributeError, LookupError))


def has_expired(error: BaseException) -> bool:
    """Return whether credentials are good no more, or not there at the moment: who reads them again may have others.

    Of an answer without a body, as to HEAD, the number is all that is known: 400 is then what AWS says of old tokens.
    """
    for each in _chain(error):
        if type(each).__name__ in _UNUSABLE or (code := _code(each)) in _EXPIRED | _UNKNOWN_KEY | {"400"}:
            return True
        if code and "expired" in _text(each).lower():
            return True
    return False


def is_refused(error: BaseException) -> bool:
    """Return whether storage does not let us do something: for good, or until other credentials are shown."""
    return has_expired(error) or any(
        isinstance(each, PermissionError)
        or _code(each) in _REFUSED
        or getattr(each, "status_code", getattr(each, "code", None)) in (401, 403)  # of Azure's and Google's libraries
        or (type(each) is OSError and str(each).startswith(("Forbidden", "Unauthorized")))  # gcsfs
        for each in _chain(error)
    )


def lacks_bucket(error: BaseException) -> bool:
    """Return whether it is the bucket that is not there, and not what was looked for in it."""
    return any(_code(each) == "NoSuchBucket" for each in _chain(error))


def _chain(error: BaseException | None, *, with_contexts: bool = True) -> Iterator[BaseException]:
    """Yield an exception, and those that it was made of; with_contexts: or in whose handling it came up."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        context = error.__context__ if with_contexts and not error.__suppress_context__ else None
        error = error.__cause__ or context


def _code(error: BaseException) -> str | None:
    """Return the code of an answer of S3's, such as AccessDenied; None for all other exceptions."""
    response: Any = getattr(error, "response", None)
    if not isinstance(response, dict) or not isinstance(response.get("Error"), dict):
        return None
    code = response["Error"].get("Code") or response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return str(code or "no code")


def _of_answer(error: Any, code: str) -> str:
    said = error.response["Error"].get("Message")
    detail = f"{code} to {operation}" if (operation := getattr(error, "operation_name", "")) else code
    words = _ANSWERS.get(code, "the server has refused it")
    return f"{words} ({detail}{f': {_clean(said)}' if said and said != 'None' else ''})"


def _known(error: BaseException) -> str | None:
    if isinstance(error, OSError) and error.errno and error.strerror == os.strerror(error.errno):
        return _unknown(error)  # the system's own words
    names = [kind.__name__ for kind in type(error).__mro__]
    words = next((_EXCEPTIONS[name] for name in names if name in _EXCEPTIONS), None)
    if words is None:
        return None
    text = _text(error)
    return f"{words} ({type(error).__name__}{f': {text}' if text else ''})"


def _unknown(error: BaseException | None) -> str:
    name, text = type(error).__name__, _text(error)
    if name == "OSError" and text == "Failure":
        return "the server says no more than Failure, as with a full disk (OSError)"  # of SFTP
    return f"{name}: {text}" if text else f"{name}, without a message"


def _text(error: BaseException | None) -> str:
    text = _clean(str(error))
    return "" if text == "None" else text


def _clean(text: str) -> str:
    """Return a message in one line, not too long, without what may be a secret."""
    for secret, rest in _SECRETS:
        text = secret.sub(rest, text)
    text = " ".join(text.split())
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]}..."
