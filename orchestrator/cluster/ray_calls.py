"""What calls of Ray's fail with while the head, a node or the way to them is gone."""

from __future__ import annotations

import grpc
from ray.exceptions import RayError

RAY_CALL_ERRORS = (RayError, grpc.RpcError, OSError, RuntimeError)
