"""The operators' HTTP API as the shell calls it; no printing here."""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import quote

import httpx
import msgspec

from adapter_store.explanation import Explanation
from cloud.errors import RefusedError

# Longer than the longest wait the catalogue grants.
_TIMEOUT_S: Final = 75.0


class Client:
    """The catalogue, from an operator's side.

    Args:
        url: Where the catalogue listens.
        token: The operator token.
        operator: The name in the audit log.
        transport: How requests travel; for tests.
    """

    def __init__(
        self, url: str, token: str, operator: str, *, transport: httpx.BaseTransport | None = None
    ) -> None:
        self._url = url.rstrip("/")
        self._http = httpx.Client(
            headers={"authorization": f"Bearer {token}", "x-operator": quote(operator)},
            timeout=httpx.Timeout(_TIMEOUT_S, connect=5.0),
            transport=transport,
            # A proxy of the environment must not see the token.
            trust_env=False,
        )

    def get(self, *path: str, **params: Any) -> Any:
        """Ask.

        Args:
            path: The parts of the address after ``/v1``.
            params: The query; None leaves one out.

        Raises:
            RefusedError: The catalogue says no, or does not answer.
        """
        query = {name: value for name, value in params.items() if value is not None}
        return self._answer("GET", path, params=query)

    def explanation(self, device: str, episode: int) -> Explanation:
        """Why an episode of a device began.

        Raises:
            RefusedError: The catalogue has no such explanation, or does not answer.
        """
        found = self.get("devices", device, "explanations", str(episode))
        try:
            return msgspec.convert(found, Explanation)
        except msgspec.ValidationError as error:
            raise RefusedError(f"the explanation cannot be read: {error}") from error

    def post(self, *path: str, body: dict[str, Any]) -> Any:
        """Act.

        Raises:
            RefusedError: The catalogue says no, or does not answer.
        """
        return self._answer("POST", path, json=body)

    def _answer(self, method: str, path: tuple[str, ...], **options: Any) -> Any:
        address = "/".join([self._url, "v1", *(quote(part, safe="") for part in path)])
        try:
            response = self._http.request(method, address, **options)
        except httpx.TimeoutException as error:
            raise RefusedError(f"the catalogue at {self._url} did not answer in time") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise RefusedError(
                f"the catalogue cannot be reached at {self._url}: {error}; is it running?"
            ) from error
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if response.is_success and answer is not None:
            return answer
        said = answer.get("error") if isinstance(answer, dict) else None
        raise RefusedError(
            str(said) if said else f"{address} answered {response.status_code}, no catalogue's way"
        )
